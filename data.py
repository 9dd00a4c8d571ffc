"""From videos and photos to what the networks see: landmarks, crops, prepared folders, training episodes.

    python data.py --videos DIR --out DIR                       # FAN landmarks as in the paper; slow on a CPU
    python data.py --videos DIR --out DIR --landmarks dlib      # offline, 10 ms a frame on a CPU core

Every folder below DIR is one sequence i of the paper: the clips of a VoxCeleb2 video (id/video/clip.mp4), the
frames of a VoxCeleb1 video, or the photos of a person. In DIR itself, every clip is a sequence, and all
photos together are one. A prepared sequence is one file, a dictionary with

    "jpeg", "offsets"       the bytes of all n crops, and where each begins and ends: (n + 1,)
    "landmarks"             (n, 68, 2) float32, in pixels of the crops
    "file", "seconds"       (n,), which clip or photo of the sequence a frame comes from, and its time in it
    "made_up"               (n,), the share of a crop that lies beyond the border of the picture, 0 to 1
    "image_size", "detector"

A folder that was not finished is continued by running the command again.
"""
import hashlib
import io
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from media.crops import MADE_UP
from media.lines import draw_lines
from media.prepare import default_workers, prepare
from runtime.device import usable_cores
from runtime.files import UserError, make_parser, raise_if_out_of_memory, run, warn
from runtime.resume import worker_signals

SIZES = (64, 128, 256, 512)     # S: the image sizes that the networks accept

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
# The paper gives neither colours nor width. With this share of the picture's width, the lines are as bright
# as those with which the bundled checkpoint was trained.
LINE_WIDTH = 1.85 / 256


def draw_landmarks(points, size):
    """y of Sec. 3.1: points (68, 2) in pixels of the crop -> lines on black, uint8 (size, size, 3)."""
    image = np.zeros((size, size, 3), np.float32)
    lines = [(points[first:end], closed, colour) for first, end, closed, colour in LINES]
    draw_lines(image, lines, LINE_WIDTH * size)
    return image.round().astype(np.uint8)


# --------------------------------------------------------------------------------- datasets and episodes

class PreparedVideos:
    """The sequences of a prepared folder. len() is their number.

    Opening it checks every file. A damaged one gets a warning and counts as a sequence without frames.
    Raises UserError if files are from different landmark detectors, or smaller than image_size.
    """

    def __init__(self, folder, image_size=None):
        """image_size: of the frames that load() returns; None means the smallest that is stored."""
        self.folder = folder
        self.files = sorted(str(f) for f in Path(folder).rglob("*.pt")) if os.path.isdir(folder) else []
        if not self.files:
            raise UserError(f"no prepared videos in {folder}: make them with `python data.py --videos DIR "
                            f"--out {folder}` (meta_train.py and evaluate.py also have --toy)")
        names = "\n".join(os.path.relpath(f, folder) for f in self.files)
        self.name = hashlib.sha256(names.encode()).hexdigest()[:12]  # names the data that W's rows belong to
        self._made_up, kinds = [], {}
        for i, file in enumerate(self.files):
            try:
                sequence = self._open(i)
                self._made_up.append(sequence["made_up"].numpy().copy())    # without a copy, it stays open
                kinds.setdefault((sequence["detector"], sequence["image_size"]), file)
            except UserError as e:
                self._made_up.append(np.empty(0))       # 0 frames
                warn(e)
        if not kinds:
            raise UserError(f"none of the files in {folder} can be used, for the reasons above: prepare it "
                            "again")
        self.detector, self.image_size = self._agreement(kinds, image_size)

    @staticmethod
    def _agreement(kinds, image_size):
        """kinds: {(detector, stored size): the first such file} -> the detector and image size of all."""
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
        try:  # memory-mapped, so that reading a few frames of a long video does not read all of it
            sequence = torch.load(self.files[i], mmap=True, weights_only=True)
            for key in ("jpeg", "offsets", "landmarks", "file", "seconds", "made_up", "image_size",
                        "detector"):
                sequence[key]
            return sequence
        except OSError as e:    # for example no permission, or a network drive that is gone
            raise UserError(f"cannot read {self.files[i]}: {e.strerror or e}") from None
        except Exception as e:
            raise_if_out_of_memory(e)
            raise UserError(f"{self.files[i]} is damaged, or was not made by this version of data.py: move "
                            "it elsewhere, and if data.py made it, prepare it again") from None

    def __len__(self):
        return len(self.files)

    def count(self, i):
        """The number of frames of sequence i; 0 if its file is damaged."""
        return len(self._made_up[i])

    def usable(self, i):
        """The numbers of the frames of sequence i that training may use: "made_up" is at most MADE_UP."""
        return np.flatnonzero(self._made_up[i] <= MADE_UP)

    def landmarks(self, i):
        """All landmarks of sequence i (n, 68, 2), in pixels of its stored size."""
        return self._open(i)["landmarks"].numpy()

    def times(self, i):
        """For each frame of sequence i, the number of its clip or photo, and its time there in seconds."""
        sequence = self._open(i)
        return sequence["file"].numpy(), sequence["seconds"].numpy()

    def load(self, i, ts):
        """The frames ts (k,) of sequence i: uint8 (k, S, S, 3), and their landmarks (k, 68, 2)."""
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
                                "move the file elsewhere and prepare it again") from None
        points = sequence["landmarks"][list(ts)].numpy()
        return np.stack(frames), (points + 0.5) * (S / sequence["image_size"]) - 0.5


def check_landmarks(videos, folder, config, checkpoint):
    """Raise UserError if these videos and the checkpoint's training data are from different detectors."""
    if videos.detector != config.landmarks:
        raise UserError(f"{folder} was prepared with {videos.detector} landmarks, but {checkpoint} was "
                        f"trained with {config.landmarks}: run data.py with --landmarks {config.landmarks}")


class Episodes(torch.utils.data.Dataset):
    """The episodes of Sec. 3.2. Item n = step * slots + slot depends on (seed, step, rank, slot) alone.

    So a run can be resumed exactly, and its data does not depend on the number of loader workers. Rank r
    draws only the sequences i with i mod world = r, so that each row of W belongs to the D of one rank.
    """

    def __init__(self, videos, K, slots, seed=0, rank=0, world=1, augment=None, stills=0.0):
        """slots: the number of episodes of a step on this rank.

        Ours: augment changes an episode (beyond.augment); stills is the share of episodes made of one frame.
        """
        self.videos, self.K, self.slots = videos, K, slots
        self.seed, self.rank, self.world = seed, rank, world
        self.augment, self.stills = augment, stills
        self.damaged = set()
        self.rows = len(range(rank, len(videos), world))
        if not self.rows:
            raise UserError(f"{len(videos)} sequences are too few for {world} ranks")
        if not any(len(videos.usable(self.video(row))) >= 2 for row in range(self.rows)):
            raise UserError("none of the prepared videos has two frames that training can use: frames are "
                            f"damaged, or more than {MADE_UP:.0%} of each crop lies outside the picture")

    def __len__(self):
        return sys.maxsize  # there is no last episode

    def __getitem__(self, n):
        """-> the row of this rank's W, and x, y uint8 (K+1, 3, S, S), with the target frame t first."""
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
        """-> row, K + 1 frames, landmarks. Training does not stop for a damaged file: another is drawn."""
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
                    warn(f"{e}. Other sequences are used instead.")
                self.damaged.add(row)
        raise UserError(f"1000 samples in a row could not be used; the last was {self.videos.files[video]}")


def draw_frames(rng, usable, K, still=False):
    """Draw [t, s_1, ..., s_K] from these frame numbers. The target t is never one of the s_k.

    If there are fewer than K + 1 frames, the s_k repeat. still: return [t] * (K + 1) instead.
    """
    t = int(rng.choice(usable))
    if still:
        return [t] * (K + 1)
    others = usable[usable != t]
    return [t, *rng.choice(others, K, replace=len(others) < K).tolist()]


def to_tensors(frames, points):
    """Frames uint8 (k, S, S, 3) and landmarks (k, 68, 2) -> x, and y drawn from them: uint8 (k, 3, S, S)."""
    drawn = np.stack([draw_landmarks(p, frames.shape[1]) for p in points])
    x, y = (np.ascontiguousarray(part.transpose(0, 3, 1, 2)) for part in (frames, drawn))
    return torch.from_numpy(x), torch.from_numpy(y)


def to_float(images, device="cpu"):
    """uint8 levels -> float32 in [-1, 1] on the device."""
    return images.to(device, non_blocking=True).float() / 127.5 - 1


def landmark_images(points, size, device="cpu"):
    """Landmarks (n, 68, 2) in pixels -> y for G: float (n, 3, size, size) in [-1, 1]."""
    drawn = np.stack([draw_landmarks(p, size) for p in points])
    return to_float(torch.from_numpy(drawn).movedim(-1, 1), device)


def to_uint8(images):
    """Float tensor (..., 3, S, S) in [-1, 1] -> uint8 array (..., S, S, 3)."""
    levels = (images.float().clamp(-1, 1) + 1) * 127.5
    return levels.round().byte().movedim(-3, -1).cpu().numpy()


def batches(episodes, start, steps, device):
    """From step `start` on, yield row (B,), x, y (B, K+1, 3, S, S) in [-1, 1] and the seconds of waiting."""
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
        help="folder of videos, or of folders with videos, frames or photos (default: videos)")
    add("--out", default="prepared", metavar="DIR", help="the prepared folder (default: prepared)")
    add("--landmarks", choices=("fan", "dlib"), default="fan",
        help="the landmark detector (default: fan, as in the paper)")
    add("--image-size", type=int, default=256, help="width of the crops in pixels (default: 256)")
    add("--max-frames", type=int, default=128,
        help="use at most this many frames of a sequence, evenly spaced; 0 means all, which are then kept "
             "in memory until the sequence is written (default: 128)")
    add("--workers", type=int,
        help="number of processes (default: one per core if memory allows; with fan on a GPU, 2 that share "
             "it)")
    args = parser.parse_args()
    workers = default_workers(args.landmarks) if args.workers is None else args.workers
    if workers < 1 or args.max_frames < 0:
        raise UserError("--workers must be at least 1, and --max-frames at least 0")
    if args.image_size not in SIZES:
        raise UserError(f"--image-size {args.image_size}: it must be one of {SIZES}")
    there = PreparedVideos(args.out) if any(Path(args.out).rglob("*.pt")) else None
    if there and (there.image_size, there.detector) != (args.image_size, args.landmarks):
        raise UserError(f"{args.out} was prepared with --image-size {there.image_size} --landmarks "
                        f"{there.detector}: use the same settings, or another --out")
    prepare(args.videos, args.out, args.landmarks, args.image_size, args.max_frames, workers)


if __name__ == "__main__":
    run(main)
