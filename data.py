"""From videos and photos to what the networks see: landmarks, crops, prepared folders, training episodes.

    python data.py --videos DIR --out DIR                       # FAN landmarks as in the paper: wants a GPU
    python data.py --videos DIR --out DIR --landmarks dlib      # offline, about 10 ms a frame on a CPU core

Every folder below DIR is one sequence i: the clips of a VoxCeleb2 video (id/video/clip.mp4), the frames of a
VoxCeleb1 video, or the photos of a person. Clips that lie directly in DIR are a sequence each, photos there one together.
A prepared sequence is one file: {"jpeg": bytes of all crops, "offsets": (n+1,), "landmarks": (n, 68, 2) in pixels,
"image_size", "detector"}.
Running it again goes on where it stopped.
"""
import argparse
import hashlib
import io
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from faces import landmark_detector
from files import UserError, run, save_tensors, warn
from model import Config
from sources import evenly, faces_in, find_sequences


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

    Drawn at 256 pixels or more and averaged down, so that small images keep positions finer than a pixel.
    """
    canvas = max(size, 256)
    image = Image.new("RGB", (canvas, canvas))
    pen, width = ImageDraw.Draw(image), max(1, size // 128) * (canvas // size)  # 2 pixels at 256
    points = (np.asarray(points, np.float64) + 0.5) * (canvas / size) - 0.5     # pixel centres to pixel centres
    for first, end, closed, colour in LINES:
        line = [tuple(p) for p in points[first:end]]
        pen.line(line + line[:1] * closed, fill=colour, width=width, joint="curve")
    return np.asarray(image.reduce(canvas // size) if canvas > size else image)


# --------------------------------------------------------------------------------- datasets and episodes

class PreparedVideos:
    """The sequences of a prepared folder. len(): how many; count(i): frames of one; load(i, choose): some of them."""

    def __init__(self, folder, image_size=None):
        self.folder = folder
        self.files = sorted(str(f) for f in Path(folder).rglob("*.pt")) if os.path.isdir(folder) else []
        if not self.files:
            raise UserError(f"no prepared videos in {folder}: make them with `python data.py --videos DIR --out {folder}`, "
                            "or train on drawn heads with --toy")
        names = "\n".join(os.path.relpath(f, folder) for f in self.files)
        self.name = hashlib.sha256(names.encode()).hexdigest()[:12]     # rows of W belong to these files in this order
        kinds = {}      # detector and size of each folder's first readable file: they may have been prepared one by one
        for i, file in enumerate(self.files):
            if os.path.dirname(file) not in kinds:
                try:
                    first = self._open(i)
                    kinds[os.path.dirname(file)] = first["detector"], first["image_size"]
                except UserError as e:
                    problem = e
        if not kinds:
            raise problem
        self.detector = next(iter(kinds.values()))[0]
        self.image_size = image_size or min(stored for _, stored in kinds.values())
        for part, (detector, stored) in kinds.items():
            if detector != self.detector:
                raise UserError(f"{part} was prepared with {detector} landmarks, another part of {folder} with {self.detector}: "
                                "prepare one of them again")
            if stored < self.image_size:
                raise UserError(f"{part} was prepared at {stored} pixels: prepare it again with --image-size {self.image_size}")

    def _open(self, i):
        try:  # memory-mapped: a few frames of a long video cost a few frames
            sequence = torch.load(self.files[i], mmap=True, weights_only=True)
            sequence["image_size"], sequence["detector"], sequence["landmarks"], sequence["offsets"], sequence["jpeg"]
            return sequence
        except Exception as e:
            raise UserError(f"{self.files[i]} is damaged or not from data.py ({type(e).__name__}): delete it and prepare it again") from None

    def __len__(self):
        return len(self.files)

    def count(self, i):
        """Frames of sequence i; 0, and a warning, where its file is damaged."""
        try:
            return len(self._open(i)["landmarks"])
        except UserError as e:
            warn(e)
            return 0

    def load(self, i, choose):
        """choose(count) -> frame numbers ts; returns frames uint8 (k, S, S, 3) and landmarks (k, 68, 2) in pixels."""
        sequence, S = self._open(i), self.image_size
        frames, ts = [], choose(len(sequence["landmarks"]))
        for t in ts:
            start, end = sequence["offsets"][t:t + 2].tolist()
            try:
                image = Image.open(io.BytesIO(sequence["jpeg"][start:end].numpy()))
                image.draft("RGB", (S, S))  # the JPEG decoder itself can shrink by 2, 4, 8
                frames.append(np.asarray(image if image.size == (S, S) else image.resize((S, S), Image.BICUBIC)))
            except (OSError, SyntaxError, ValueError) as e:
                raise UserError(f"frame {t} of {self.files[i]} is damaged ({e}): delete the file and prepare it again") from None
        points = sequence["landmarks"][ts].numpy()
        return np.stack(frames), (points + 0.5) * (S / sequence["image_size"]) - 0.5


class Episodes(torch.utils.data.Dataset):
    """Sec. 3.2: item n = step * slots + slot is an episode, a pure function of (seed, step, rank, slot).

    So resuming is exact, and the order does not depend on the number of loader workers. Item: (row, x, y): x, y uint8
    (K+1, 3, S, S), the target frame t first, then s_1 ... s_K; row: the sequence's row in this rank's W.
    Rank r draws only the sequences i with i mod world = r, so that each row of W is learned in one D.
    """

    def __init__(self, videos, K, slots, seed=0, rank=0, world=1, config=Config()):
        self.videos, self.K, self.slots, self.seed, self.rank, self.world = videos, K, slots, seed, rank, world
        self.augment, self.stills, self.damaged = config.augment, config.stills, set()
        own = range(rank, len(videos), world)
        self.rows = len(own)
        if not self.rows:
            raise UserError(f"{len(videos)} sequences are too few for {world} ranks")
        odds = np.cumsum([videos.count(i) if config.by_frames else 1 for i in own])
        if not odds[-1]:
            raise UserError("none of the prepared videos can be read")
        self.odds = odds / odds[-1]

    def __len__(self):
        return sys.maxsize  # drawn without end

    def __getitem__(self, n):
        step, slot = divmod(n, self.slots)
        rng = np.random.default_rng((self.seed, step, self.rank, slot))
        still = rng.random() < self.stills      # these are drawn evenly: one photo is as good as a long video for them
        for attempt in range(100):
            row = int(rng.integers(self.rows) if still else np.searchsorted(self.odds, rng.random(), side="right"))
            try:
                frames, points = self.videos.load(row * self.world + self.rank, lambda count: draw_frames(rng, count, self.K, still))
                break
            except UserError as e:  # one damaged file among many must not stop a training of days
                if row not in self.damaged:
                    warn(f"{e}. Another sample takes its place.")
                self.damaged.add(row)
        else:
            raise UserError(f"100 samples in a row could not be read; the last one: {self.videos.files[row * self.world + self.rank]}")
        if still:
            frames, points = warp(rng, frames, points)
        if self.augment:
            frames, points = recolour_and_mirror(rng, frames, points)
        x, y = to_tensors(frames, points)
        return row, x, y


def draw_frames(rng, count, K, still=False):
    """[t, s_1, ..., s_K]: the target t is never one of the s; fewer than K + 1 frames: the s repeat. still: K + 1 times t."""
    t = int(rng.integers(count))
    if still:
        return [t] * (K + 1)
    others = np.delete(np.arange(count), t)
    return [t, *rng.choice(others, K, replace=len(others) < K).tolist()]


def warp(rng, frames, points):
    """Turn, scale, shear and shift every frame a little by itself: one photo becomes a short video (not in the paper)."""
    S, warped, moved = frames.shape[1], [], []
    for frame, p in zip(frames, points):
        A = np.eye(2) + rng.uniform(-.15, .15, (2, 2))                          # result -> source, about the middle
        shift = (np.eye(2) - A) @ (S / 2, S / 2) + rng.uniform(-.06, .06, 2) * S
        padded = Image.fromarray(np.pad(frame, ((S // 2,) * 2, (S // 2,) * 2, (0, 0)), mode="reflect"))
        (a, b), (c, d) = A
        warped.append(np.asarray(padded.transform((S, S), Image.AFFINE, (a, b, shift[0] + S // 2, c, d, shift[1] + S // 2), Image.BICUBIC)))
        moved.append((p + 0.5 - shift) @ np.linalg.inv(A).T - 0.5)
    return np.stack(warped), np.stack(moved)


MIRRORED = np.r_[16:-1:-1, 26:16:-1, 27:31, 35:30:-1, 45:41:-1, 47, 46, 39:35:-1, 41, 40, 54:47:-1, 59:54:-1, 64:59:-1, 67:64:-1]


def recolour_and_mirror(rng, frames, points):
    """Gamma and tint, the same for an episode's frames, and half of the episodes mirrored (not in the paper)."""
    gamma = 2 ** (rng.uniform(-.5, .5) + rng.uniform(-.15, .15, 3))
    table = (255 * np.linspace(0, 1, 256)[:, None] ** gamma).round().astype(np.uint8)      # (256, 3)
    frames = table[frames, np.arange(3)]
    if rng.random() < .5:
        frames, points = frames[:, :, ::-1], points[:, MIRRORED]
        points = np.stack([frames.shape[2] - 1 - points[..., 0], points[..., 1]], axis=-1)
    return frames, points


def to_tensors(frames, points):
    """Frames uint8 (k, S, S, 3) and landmarks (k, 68, 2) -> x, y uint8 (k, 3, S, S), y drawn here (Sec. 3.1)."""
    y = np.stack([draw_landmarks(p, frames.shape[1]) for p in points])
    return tuple(torch.from_numpy(np.ascontiguousarray(a.transpose(0, 3, 1, 2))) for a in (frames, y))


def to_float(images, device="cpu"):
    """uint8 -> float32 in [-1, 1] on the device."""
    return images.to(device, non_blocking=True).float() / 127.5 - 1


def to_uint8(images):
    """Float tensor (..., 3, S, S) in [-1, 1] -> uint8 array (..., S, S, 3)."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().movedim(-3, -1).cpu().numpy()


# ----------------------------------------------------------------------------------- preparing a folder

_detect = None  # each worker process builds its detector once


def _start_worker(kind):
    global _detect
    torch.set_num_threads(1)
    _detect = landmark_detector(kind)


def _prepare(files, out, kind, size, max_frames):
    """One sequence -> one file. Returns (frames stored, [what could not be used])."""
    files = evenly(files, max_frames or len(files))
    jpegs, landmarks, problems = [], [], []
    for file in files:
        try:
            share = max_frames // len(files)
            for face, points in faces_in(file, _detect, kind, size, share, problems.append):
                buffer = io.BytesIO()
                Image.fromarray(face).save(buffer, "JPEG", quality=95, subsampling=0)
                jpegs.append(torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8))
                landmarks.append(torch.from_numpy(points))
        except UserError as e:
            problems.append(str(e))
        except Exception as e:  # one odd file among a million must not stop the rest; the summary names it
            problems.append(f"{file}: {type(e).__name__}: {e}")
    if len(jpegs) < 2:
        return 0, problems + [f"{files[0].parent}: {len(jpegs)} frames with a face, and 2 are needed"]
    offsets = torch.tensor([0] + [len(j) for j in jpegs]).cumsum(0)
    save_tensors({"jpeg": torch.cat(jpegs), "offsets": offsets, "landmarks": torch.stack(landmarks),
                  "image_size": size, "detector": kind}, out)
    return len(jpegs), problems


def prepare(videos, out, kind, size, max_frames, workers):
    """`python data.py`: every sequence below `videos` becomes a file in `out`. Prints a summary."""
    if not os.path.isdir(videos):
        raise UserError(f"no folder {videos}: name the one with the videos or photos by --videos DIR")
    sequences, problems = find_sequences(videos, out)
    if not sequences:
        raise UserError(f"{videos} holds neither videos nor photos")
    there = PreparedVideos(out) if any(Path(out).rglob("*.pt")) else None
    if there and (there.image_size, there.detector) != (size, kind):
        raise UserError(f"{out} was prepared with --image-size {there.image_size} "
                        f"--landmarks {there.detector}: name the same, or another --out")
    todo = {name: files for name, files in sequences.items() if not os.path.exists(f"{out}/{name}.pt")}
    landmark_detector(kind)  # fails here, before the workers start, if it cannot be built

    # the work
    done, frames, stop = 0, 0, None
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (kind,)) as pool:
        jobs = [pool.submit(_prepare, files, f"{out}/{name}.pt", kind, size, max_frames)
                for name, files in todo.items()]
        try:
            for job in tqdm(as_completed(jobs), "preparing", len(jobs), unit=" sequences"):
                count, lines = job.result()
                done += count > 0
                frames += count
                problems += lines
        except BrokenProcessPool:
            stop = UserError("a worker process died, perhaps for want of memory: run it again to go on, "
                             "with fewer --workers")
        except UserError as e:  # it cannot be written
            stop = e
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    # the summary
    before = len(sequences) - len(todo)
    print(f"{out}: {done} sequences with {frames} frames prepared, {before} were there already")
    if problems:
        print(f"not used, not all of it, or worth a look ({len(problems)}):", *sorted(problems), sep="\n  ")
    if stop or (done == 0 and before == 0):
        raise stop or UserError(f"nothing in {videos} could be used")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", default="videos", metavar="DIR", help="videos, or folders of frames or photos (default: videos)")
    parser.add_argument("--out", default="prepared", metavar="DIR", help="the prepared folder (default: prepared)")
    parser.add_argument("--landmarks", choices=("fan", "dlib"), default="fan", help="the detector (default: fan, the paper's)")
    parser.add_argument("--image-size", type=int, default=256, help="pixels of a crop (default: 256)")
    parser.add_argument("--max-frames", type=int, default=128, help="at most so many frames per sequence, evenly spread; 0: all, "
                        "a sequence's crops then stay in memory until it is written (default: 128)")
    parser.add_argument("--workers", type=int, help="processes (default: one a core; for fan on a GPU 2, which share it)")
    args = parser.parse_args()
    workers = args.workers or (2 if args.landmarks == "fan" and torch.cuda.is_available() else os.cpu_count())
    if workers < 1 or args.max_frames < 0:
        raise UserError("--workers must be at least 1, --max-frames at least 0")
    Config(image_size=args.image_size)  # refuses what no network takes
    prepare(args.videos, args.out, args.landmarks, args.image_size, args.max_frames, workers)


if __name__ == "__main__":
    run(main)
