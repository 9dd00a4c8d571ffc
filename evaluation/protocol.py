"""The protocol of Sec. 4: which videos, which of their frames to learn from, and which to hold out."""
import os
import re

import numpy as np
import torch

from beyond.toy import ToyHeads
from data import PreparedVideos
from runtime.files import UserError, warn

GAP = 1.0  # seconds at least between what is learned from and what is held out


def find_videos(data):
    """-> {name: (index of the sequence to learn from, index of the one with the hold-out frames)}.

    Both are the same one, unless the folder has train/NAME and test/NAME.
    """
    if isinstance(data, ToyHeads):
        return {f"head {data.first + i}": (i, i) for i in range(len(data))}
    names = [os.path.relpath(file, data.folder).removesuffix(".pt") for file in data.files]
    numbers = {name: i for i, name in enumerate(names)}
    split = {}
    for name, i in numbers.items():
        folder, _, rest = name.partition("/")
        if folder == "train" and f"test/{rest}" in numbers:
            split[rest] = i, numbers[f"test/{rest}"]
    return split or {name: (i, i) for name, i in numbers.items()}


def person(name):
    """VoxCeleb's id00061 of clips/id00061/rrdqJsdrS3o; elsewhere every sequence is a person of its own."""
    return next((part for part in name.split("/") if re.fullmatch(r"id\d+", part)), name)


def clock(data, i):
    """When the frames of a sequence were, in seconds (n,), its clips laid end to end; all 0 for photos.

    None where nobody knows: drawn heads, and folders prepared before data.py kept "file", the number of
    the clip or photo that a frame is of, and "seconds", its time in it.
    """
    if not isinstance(data, PreparedVideos):
        return None
    stored = torch.load(data.files[i], mmap=True, weights_only=True)
    if "seconds" not in stored:
        return None
    file, seconds = stored["file"].numpy(), stored["seconds"].numpy()
    passed = np.where(file[1:] == file[:-1], np.diff(seconds), 0)   # nobody knows the time between files
    return np.concatenate([[0], passed.cumsum()])


def parts(seconds, learn, holdout):
    """-> the numbers of the frames before and after a gap of GAP seconds.

    The parts are as equal as they can be where the first needs `learn` frames and the second `holdout`;
    both are empty where a video is too short for that.
    """
    ends = np.arange(learn, len(seconds))
    starts = np.searchsorted(seconds, seconds[ends - 1] + GAP)
    sizes = len(seconds) - starts
    ends, starts, sizes = (a[sizes >= holdout] for a in (ends, starts, sizes))
    if not len(ends):
        return np.arange(0), np.arange(0)
    k = abs(ends - sizes).argmin()
    return np.arange(ends[k]), np.arange(starts[k], len(seconds))


def draw_protocol(data, shots, holdout, count, seed):
    """-> {name: {"learn": [frame numbers], "holdout": [...]}} of `count` videos, drawn uniformly.

    T frames are the first T of these.
    """
    rng, need = np.random.default_rng(seed), max(shots)
    protocol, short, unknown = {}, [], []
    videos = list(find_videos(data).items())
    for v in rng.permutation(len(videos)):
        name, (i, j) = videos[v]
        frames = data.count(i)
        seconds = clock(data, i) if i == j and frames else None
        if i != j:
            learn, held = rng.permutation(frames), rng.permutation(data.count(j))
        elif seconds is not None and seconds[-1] > 0:
            learn, held = map(rng.permutation, parts(seconds, need, holdout))
        else:
            shuffled = rng.permutation(frames)
            learn, held = shuffled[:need], shuffled[need:]
        if len(learn) < need or len(held) < holdout:
            short.append(name)
        elif len(protocol) < count:
            held = sorted(held[:holdout].tolist())
            protocol[name] = {"learn": learn[:need].tolist(), "holdout": held}
            if i == j and seconds is None:
                unknown.append(name)
    if short:
        warn(f"left out, with fewer than {need} + {holdout} frames, in videos a second apart: "
             f"{', '.join(sorted(short))}")
    if not protocol:
        raise UserError(f"no video has {need} + {holdout} frames: ask for fewer with --shots or "
                        "--holdout")
    if unknown and isinstance(data, PreparedVideos):
        warn(f"{len(unknown)} of {len(protocol)} sequences were prepared without times: if they are videos "
             "and no photos, neighbours in time are on both sides; prepare them again")
    return protocol
