"""The protocol of Sec. 4: which videos are evaluated, and which frames are learned from or held out."""
import os
import re

import numpy as np

from beyond.toy import ToyHeads
from data import PreparedVideos
from media.folders import first_names
from runtime.files import UserError, warn

GAP = 1.0   # seconds, at least, between the frames that are learned from and those that are held out


def find_videos(data):
    """-> {name: (the sequence to learn from, the sequence to hold out)}, as indices into `data`.

    They are the same sequence, unless the prepared folder is already split into train/NAME and test/NAME.
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


def person_of(name):
    """The person whom a sequence shows: "id00061" for VoxCeleb's "clips/id00061/rrdqJsdrS3o".

    Without a folder of that kind in its name, every sequence counts as a person of its own.
    """
    return next((folder for folder in name.split("/") if re.fullmatch(r"id\d+", folder)), name)


def frame_times(data, i):
    """The times of the frames of sequence i in seconds (n,), as if its clips followed each other directly.

    All are 0 for photos and for cartoon heads.
    """
    if not isinstance(data, PreparedVideos):
        return np.zeros(data.count(i))
    file, seconds = data.times(i)
    passed = np.where(file[1:] == file[:-1], np.diff(seconds), 0)   # the time between two files is unknown
    return np.concatenate([[0], passed.cumsum()])


def split_in_time(seconds, learn, holdout):
    """Split a video's frames, at times `seconds` (n,), into those before and after a gap of GAP seconds.

    Returns the numbers of both. The two parts are as equal in size as they can be if the first needs `learn`
    frames and the second `holdout`. Both are empty if the video is too short for that.
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
    """Draw at most `count` videos, and frames of each, uniformly.

    Returns {name: {"learn": [frame numbers], "holdout": [frame numbers]}}.
    "learn" has as many frames as the largest T in `shots`. A smaller T uses the first T of them.
    Raises UserError if no video has enough frames.
    """
    rng, need = np.random.default_rng(seed), max(shots)
    protocol, too_short = {}, []
    videos = list(find_videos(data).items())
    for v in rng.permutation(len(videos)):
        name, (i, j) = videos[v]
        frames = data.count(i)
        if i != j:
            learn, held_out = rng.permutation(frames), rng.permutation(data.count(j))
        elif frames and (seconds := frame_times(data, i))[-1] > 0:
            learn, held_out = map(rng.permutation, split_in_time(seconds, need, holdout))
        else:
            shuffled = rng.permutation(frames)
            learn, held_out = shuffled[:need], shuffled[need:]
        if len(learn) < need or len(held_out) < holdout:
            too_short.append(name)
        elif len(protocol) < count:
            held_out = sorted(held_out[:holdout].tolist())
            protocol[name] = {"learn": learn[:need].tolist(), "holdout": held_out}
    if too_short:
        warn(f"left out {first_names(sorted(too_short))}: {need} frames to learn from and {holdout} to hold "
             "out are needed, and in a video a second must pass between them")
    if not protocol:
        raise UserError(f"no video has {need} frames to learn from and {holdout} to hold out: ask for fewer "
                        "with --shots or --holdout")
    return protocol
