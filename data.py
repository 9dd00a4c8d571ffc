"""From videos and photos to what the networks see: landmarks, crops, prepared folders, training episodes.

    python data.py --videos DIR --out DIR                       # FAN landmarks as in the paper: wants a GPU
    python data.py --videos DIR --out DIR --landmarks dlib      # offline, about 10 ms a frame on a CPU core

Every folder below DIR is one sequence i: the clips of a VoxCeleb2 video (id/video/clip.mp4), the frames of
a VoxCeleb1 video, or the photos of a person. Clips that lie directly in DIR are a sequence each, photos
there one together. A prepared sequence is one file, a dictionary with

    "jpeg", "offsets"       the bytes of all n crops, and where each begins and ends: (n + 1,)
    "landmarks"             (n, 68, 2) float32, in pixels of the crops
    "file", "seconds"       (n,), which clip or photo of the sequence a frame comes from, and its time there
    "made_up"               (n,), the share of a crop that lies beyond the border of the picture, 0 to 1
    "image_size", "detector"

Running it again goes on where it stopped.
"""
import hashlib
import io
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader

from media.crops import MADE_UP
from media.folders import default_workers, prepare
from runtime.device import usable_cores
from runtime.files import UserError, make_parser, pass_on_want_of_memory, run, warn
from runtime.resume import worker_signals

SIZES = (64, 128, 256, 512)     # of the pictures that the networks take

# ------------------------------------------------------------------------------------------- landmarks

LINES = [  # the 68 iBUG points: (first, last + 1, closed, colour); right and left are the person's own
    (0, 17, False, (255, 255, 255)),    # jaw
    (17, 22, False, (255, 0, 0)),       # right brow
    (22, 27, False, (0, 255, 0)),       # left brow
    (27, 31, False, (0, 0, 255)),       # nose bridge
    (31, 36, False, (0, 0, 255)),       # nose base
    (36, 42, True, (255, 0, 255)),      # right eye
    (42, 48, True, (0, 255, 255)),      # left eye
    (48, 60, True, (255, 255, 0)),      # outer lips
    (60, 68, True, (255, 128, 0)),      # inner lips
]


def draw_landmarks(points, size):
    """y of Sec. 3.1: points (68, 2) in pixels of a size x size crop -> uint8 (size, size, 3), lines on black.

    Drawn twice as large, or at 256 pixels where that is more, and averaged down, because that keeps positions
    finer than a pixel.
    """
    canvas = max(2 * size, 256)
    image = Image.new("RGB", (canvas, canvas))
    pen, width = ImageDraw.Draw(image), canvas // 128       # 2 pixels of 256
    points = np.asarray(points, np.float64)
    points = (points + 0.5) * (canvas / size) - 0.5     # pixel centres to pixel centres
    for first, end, closed, colour in LINES:
        line = [tuple(p) for p in points[first:end]]
        pen.line(line + line[:1] * closed, fill=colour, width=width, joint="curve")
    return np.asarray(image.reduce(canvas // size))


# --------------------------------------------------------------------------------- datasets and episodes

class PreparedVideos:
    """The sequences of a prepared folder, each of which is checked: all must have the same landmarks.

    len(): how many sequences.  count(i): the frames of one.  usable(i): the numbers of those that training
    may use.  load(i, ts): some of them.
    """

    def __init__(self, folder, image_size=None):
        """image_size: of the frames that load() returns; None: the smallest that is stored."""
        self.folder = folder
        self.files = sorted(str(f) for f in Path(folder).rglob("*.pt")) if os.path.isdir(folder) else []
        if not self.files:
            raise UserError(f"no prepared videos in {folder}: make them with `python data.py --videos DIR "
                            f"--out {folder}`, or train on drawn heads with --toy")
        names = "\n".join(os.path.relpath(f, folder) for f in self.files)
        self.name = hashlib.sha256(names.encode()).hexdigest()[:12]  # what rows of W belong to
        self._made_up, kinds, problem = [], {}, None
        for i, file in enumerate(self.files):
            try:
                sequence = self._open(i)
                self._made_up.append(np.array(sequence["made_up"]))     # a copy: the file is closed again
                kinds.setdefault((sequence["detector"], sequence["image_size"]), file)
            except UserError as e:
                problem = problem or e
                self._made_up.append(np.empty(0))       # 0 frames
                warn(e)
        if not kinds:
            raise problem
        self.detector, self.image_size = self._agreement(kinds, image_size)

    @staticmethod
    def _agreement(kinds, image_size):
        """kinds: {(detector, stored size): the first file of that kind} -> the detector and size of all."""
        image_size = image_size or min(stored for _, stored in kinds)
        (detector, _), first = next(iter(kinds.items()))
        for (other, stored), file in kinds.items():
            if other != detector:
                raise UserError(f"{file} was prepared with {other} landmarks, but {first} with {detector}: "
                                "prepare one of them again")
            if stored < image_size:
                raise UserError(f"{file} was prepared at {stored} pixels: prepare it again with "
                                f"--image-size {image_size}")
        return detector, image_size

    def _open(self, i):
        try:  # memory-mapped: a few frames of a long video cost a few frames
            sequence = torch.load(self.files[i], mmap=True, weights_only=True)
            for key in ("image_size", "detector", "landmarks", "offsets", "jpeg", "made_up"):
                sequence[key]
            return sequence
        except OSError as e:    # a folder of somebody else's, a network drive that is gone
            raise UserError(f"cannot read {self.files[i]}: {e.strerror or e}") from None
        except Exception as e:
            pass_on_want_of_memory(e)
            raise UserError(f"{self.files[i]} is damaged or not from this version of data.py "
                            f"({type(e).__name__}): delete it and prepare it again") from None

    def __len__(self):
        return len(self.files)

    def count(self, i):
        """Frames of sequence i; 0 where its file is damaged."""
        return len(self._made_up[i])

    def usable(self, i):
        """The numbers of the frames of sequence i of which at most MADE_UP is made up."""
        return np.flatnonzero(self._made_up[i] <= MADE_UP)

    def landmarks(self, i):
        """Of all frames of sequence i: (n, 68, 2), in pixels of its stored size. UserError if damaged."""
        return self._open(i)["landmarks"].numpy()

    def load(self, i, ts):
        """Frames with the numbers ts (k,) of sequence i: uint8 (k, S, S, 3), and landmarks (k, 68, 2)."""
        sequence, S = self._open(i), self.image_size
        frames = []
        for t in ts:
            start, end = sequence["offsets"][t:t + 2].tolist()
            try:
                image = Image.open(io.BytesIO(sequence["jpeg"][start:end].numpy()))
                image.draft("RGB", (S, S))  # the JPEG decoder itself can shrink by 2, 4, 8
                if image.size != (S, S):
                    image = image.resize((S, S), Image.BICUBIC)
                frames.append(np.asarray(image))
            except (OSError, SyntaxError, ValueError) as e:
                raise UserError(f"frame {t} of {self.files[i]} is damaged ({e}): "
                                "delete the file and prepare it again") from None
        points = sequence["landmarks"][list(ts)].numpy()
        return np.stack(frames), (points + 0.5) * (S / sequence["image_size"]) - 0.5


def check_landmarks(videos, folder, config, checkpoint):
    """UserError where the videos of a folder have other landmarks than a checkpoint's training had."""
    if videos.detector != config.landmarks:
        raise UserError(f"{folder} was prepared with {videos.detector} landmarks, {checkpoint} "
                        f"trained with {config.landmarks}")


class Episodes(torch.utils.data.Dataset):
    """Sec. 3.2: item n = step * slots + slot is an episode, a pure function of (seed, step, rank, slot).

    So resuming is exact, and the order does not depend on the number of loader workers. slots: how many of
    a step's episodes are this rank's.
    Rank r draws only the sequences i with i mod world = r, so that each row of W is learned in one D.
    """

    def __init__(self, videos, K, slots, seed=0, rank=0, world=1, augment=None, stills=0.0):
        """Ours: augment changes an episode (beyond.augment); stills is the share of episodes of one frame."""
        self.videos, self.K, self.slots = videos, K, slots
        self.seed, self.rank, self.world = seed, rank, world
        self.augment, self.stills = augment, stills
        self.damaged = set()
        self.rows = len(range(rank, len(videos), world))
        if not self.rows:
            raise UserError(f"{len(videos)} sequences are too few for {world} ranks")
        if not any(len(videos.usable(self.video(row))) >= 2 for row in range(self.rows)):
            raise UserError("none of the prepared videos has two frames that training can use: they are "
                            f"damaged, or more than {MADE_UP:.0%} of their crops is made up")

    def __len__(self):
        return sys.maxsize  # drawn without end

    def __getitem__(self, n):
        """-> the row in this rank's W, and x, y uint8 (K+1, 3, S, S), the target frame t first."""
        step, slot = divmod(n, self.slots)
        rng = np.random.default_rng((self.seed, step, self.rank, slot))
        still = rng.random() < self.stills
        row, frames, points = self.draw(rng, still)
        if self.augment:
            frames, points = self.augment(rng, frames, points, still)
        x, y = to_tensors(frames, points)
        return row, x, y

    def video(self, row):
        """The number of the video that this row of W belongs to."""
        return row * self.world + self.rank

    def draw(self, rng, still):
        """K + 1 frames of a random sequence; one damaged file among many must not stop a training of days."""
        for attempt in range(1000):
            row = int(rng.integers(self.rows))
            video = self.video(row)
            usable = self.videos.usable(video)
            if len(usable) < (1 if still else 2):
                continue
            try:
                return row, *self.videos.load(video, draw_frames(rng, usable, self.K, still))
            except UserError as e:
                if row not in self.damaged:
                    warn(f"{e}. Another sample takes its place.")
                self.damaged.add(row)
        raise UserError(f"1000 samples in a row could not be used; the last one: {self.videos.files[video]}")


def draw_frames(rng, usable, K, still=False):
    """[t, s_1, ..., s_K] of these frame numbers: the target t is never one of the s.

    Where there are fewer than K + 1 frames, the s repeat. still: K + 1 times t.
    """
    t = int(rng.choice(usable))
    if still:
        return [t] * (K + 1)
    others = usable[usable != t]
    return [t, *rng.choice(others, K, replace=len(others) < K).tolist()]


def to_tensors(frames, points):
    """Frames uint8 (k, S, S, 3), landmarks (k, 68, 2) -> x, y uint8 (k, 3, S, S), y drawn here (Sec. 3.1)."""
    drawn = np.stack([draw_landmarks(p, frames.shape[1]) for p in points])
    x, y = (np.ascontiguousarray(part.transpose(0, 3, 1, 2)) for part in (frames, drawn))
    return torch.from_numpy(x), torch.from_numpy(y)


def to_float(images, device="cpu"):
    """uint8 -> float32 in [-1, 1] on the device."""
    return images.to(device, non_blocking=True).float() / 127.5 - 1


def landmark_images(points, size, device="cpu"):
    """y(t) for G: landmarks (n, 68, 2) in pixels -> their drawings, float (n, 3, size, size) in [-1, 1]."""
    drawn = np.stack([draw_landmarks(p, size) for p in points])
    return to_float(torch.from_numpy(drawn).movedim(-1, 1), device)


def to_uint8(images):
    """Float tensor (..., 3, S, S) in [-1, 1] -> uint8 array (..., S, S, 3)."""
    levels = (images.float().clamp(-1, 1) + 1) * 127.5
    return levels.round().byte().movedim(-3, -1).cpu().numpy()


def batches(episodes, start, steps, device):
    """Yield (row (B,), x, y (B, K+1, 3, S, S) in [-1, 1], seconds waited) for the steps from `start` on."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    slots = episodes.slots
    loader = DataLoader(episodes, slots, sampler=range(start * slots, steps * slots),
                        num_workers=min(8, max(1, usable_cores() // ranks - 1)),
                        pin_memory=device.type == "cuda", worker_init_fn=worker_signals)
    began = time.time()
    for row, x, y in loader:                                    # x, y uint8
        waited = time.time() - began
        yield row.to(device), to_float(x, device), to_float(y, device), waited
        began = time.time()


# ---------------------------------------------------------------------------------------- the command

def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--videos", default="videos", metavar="DIR",
        help="videos, or folders of frames or photos (default: videos)")
    add("--out", default="prepared", metavar="DIR", help="the prepared folder (default: prepared)")
    add("--landmarks", choices=("fan", "dlib"), default="fan",
        help="the detector (default: fan, the paper's)")
    add("--image-size", type=int, default=256, help="pixels of a crop (default: 256)")
    add("--max-frames", type=int, default=128,
        help="at most so many frames per sequence, evenly spread; 0: all, and a sequence's crops stay in "
             "memory until it is written (default: 128)")
    add("--workers", type=int,
        help="processes (default: one a core that memory allows; for fan on a GPU 2, which share it)")
    args = parser.parse_args()
    workers = default_workers(args.landmarks) if args.workers is None else args.workers
    if workers < 1 or args.max_frames < 0:
        raise UserError("--workers must be at least 1, --max-frames at least 0")
    if args.image_size not in SIZES:
        raise UserError(f"--image-size {args.image_size}: it must be one of {SIZES}")
    there = PreparedVideos(args.out) if any(Path(args.out).rglob("*.pt")) else None
    if there and (there.image_size, there.detector) != (args.image_size, args.landmarks):
        raise UserError(f"{args.out} was prepared with --image-size {there.image_size} --landmarks "
                        f"{there.detector}: name the same, or another --out")
    prepare(args.videos, args.out, args.landmarks, args.image_size, args.max_frames, workers)


if __name__ == "__main__":
    run(main)
