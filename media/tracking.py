"""Following one face through a video: its landmarks in every frame, and the files that keep them.

    track = track_video("v.mp4", landmark_detector("dlib"))     # the landmarks of every frame
"""
from array import array
from itertools import chain
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from media.crops import crop, shots, steady_boxes, to_crop
from media.decode import read_video, to_rgb
from media.faces import TURNED
from media.following import Follower
from runtime.files import UserError, atomic, pass_on_want_of_memory, warn

# ----------------------------------------------------------------------------------------------- tracks

class Track(NamedTuple):
    """The landmarks of a video, in pixels of its upright frames.

    Times are pts * time_base[0] / time_base[1] seconds.
    A frame without a face repeats the face before it, or the first one.
    """
    points: np.ndarray      # (n, 68, 2) float32
    found: np.ndarray       # (n,) bool
    cuts: np.ndarray        # (n,) bool: the first frames with a face behind the cuts that the pictures show
    pts: np.ndarray         # (n,) int64
    time_base: np.ndarray   # (2,) int64
    detector: str           # fan | dlib
    turns: int = 0          # of a video that lies on its side: np.rot90(frame, turns) is upright

    def seconds(self):
        return self.pts * (self.time_base[0] / self.time_base[1])

    def shots(self):
        """The number of each frame's shot, (n,). Each shot has a frame with a face."""
        return shots(self.points, self.found, self.cuts)

    def boxes(self):
        """Where each frame is cropped, (n, 3)."""
        return steady_boxes(self.points, self.seconds(), self.shots())

    def in_crops(self, size):
        """The landmarks in the pixels of a steady size x size crop, (n, 68, 2)."""
        return to_crop(self.points, self.boxes(), size)

    def first(self, n):
        """The Track of the first n frames."""
        return self._replace(**{name: getattr(self, name)[:n] for name in ("points", "found", "cuts", "pts")})


STORED = Track._fields[:-1]     # in a file; its points are those of the upright frames


def save_track(path, track):
    """Write a track as .npz, by way of a temporary name."""
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **{name: getattr(track, name) for name in STORED})


def load_track(path):
    """-> Track of save_track. UserError if the file is none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            track = Track(*(file[name] for name in STORED))
        n = len(track.pts)
        shapes = [getattr(track, name).shape for name in ("points", "found", "cuts", "pts", "time_base")]
        if (n == 0 or shapes != [(n, 68, 2), (n,), (n,), (n,), (2,)] or not np.isfinite(track.points).all()
                or (track.time_base < 1).any() or (np.diff(track.pts) < 1).any()
                or not track.found.any() or (track.cuts & ~track.found).any()
                or track.cuts[:np.argmax(track.found) + 1].any()):
            raise ValueError("its arrays are not those of a track")
        return track._replace(detector=str(track.detector))
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except Exception as e:  # numpy and zipfile raise many types on foreign or damaged files
        pass_on_want_of_memory(e)
        raise UserError(f"{path} is not a landmark track ({e})") from None


# ------------------------------------------------------------------------------------------- following

def track_video(path, detect, keep=lambda k: True, progress=False, complain=warn, recognition=None):
    """Landmarks of those frames k of a video for which keep(k). UserError if no face is in any of them.

    detect: a faces.Detector.  recognition: of a Follower.
    complain(line) is told what is not as it should be.
    """
    follower = Follower(detect, recognition)
    track = follow_face(path, follower, keep, progress, complain)
    turns = int(np.argmax(follower.turned))
    if follower.turned[turns] and track.found.mean() < 0.1:     # it lies on its side: once more, upright
        again = Follower(detect, recognition, turns)
        turned = follow_face(path, again, keep, progress, lambda line: None)
        if turned.found.sum() > track.found.sum():
            follower, track = again, turned
            complain(f"{path} {TURNED[turns]}")
    if not track.found.any():
        raise UserError(f"no face found in any of the {len(track.found)} frames of {path}, however turned")
    if follower.report(path):
        complain(follower.report(path))
    own, first = np.arange(len(track.found)), np.argmax(track.found)
    before = np.maximum.accumulate(np.where(track.found, own, first))
    return track._replace(points=track.points[before], cuts=track.cuts & (own > first))


def follow_face(path, follower, keep, progress, complain):
    """-> Track whose points are 0 where no face was found."""
    # an object a frame would fragment memory
    points, found, cuts, pts = array("f"), array("b"), array("b"), array("q")
    lines = []                              # to be said when the progress bar is closed
    frames = read_video(path, lines.append)
    frames = chain([next(frames)], frames)  # what cannot be read is refused before a progress bar is drawn
    cut = seen = begins = False     # begins: a cut, behind which no face was found yet
    for k, frame in enumerate(tqdm(frames, "landmarks", unit=" frames", disable=not progress)):
        small = frame.to_ndarray(format="gray", width=32, height=32, interpolation="AREA")
        before, seen = seen, follower.is_cut(small)
        cut = cut or seen                           # in any frame since the last one that was kept
        begins = begins or (seen and not before)    # a shaken camera looks like a cut in every frame
        if not keep(k):
            continue
        image = np.ascontiguousarray(np.rot90(to_rgb(frame), follower.turns))
        face = follower.look(image, float(frame.pts * frame.time_base), cut)
        cut = False
        found.append(face is not None)
        cuts.append(begins and face is not None)
        begins = begins and face is None
        points.frombytes((np.zeros((68, 2), np.float32) if face is None else face).tobytes())
        pts.append(frame.pts)
    for line in lines:
        complain(line)
    base = np.array([frame.time_base.numerator, frame.time_base.denominator], np.int64)
    points = np.frombuffer(points, np.float32).reshape(-1, 68, 2)
    found, cuts, pts = np.array(found, bool), np.array(cuts, bool), np.array(pts, np.int64)
    return Track(points, found, cuts, pts, base, follower.detector.kind, follower.turns)


def read_crops(path, track, wanted, size):
    """The frames of a video with the numbers `wanted` as in Track.in_crops: {k: uint8 (size, size, 3)}.

    They are known by their times: of a damaged video, FFmpeg does not decode the same frames every time. One
    that is not there any more is left out.
    """
    boxes, crops = track.boxes(), {}
    numbers = {track.pts[k]: k for k in wanted}
    for frame in read_video(path, lambda line: None):
        k = numbers.pop(frame.pts, None)
        if k is not None:
            crops[k] = crop(np.rot90(to_rgb(frame), track.turns), boxes[k], size)
        if not numbers:
            break
    return crops


def read_driver(path, landmarks, detect, recognition=None):
    """A video or a saved track (.npz) -> Track, with a word on what is not as it should be.

    landmarks: "fan" or "dlib", the kind that the checkpoint was trained with.  recognition: of a Follower.
    """
    if is_track(path):
        track = load_track(path)
        if track.detector != landmarks:
            warn(f"{path} holds {track.detector} landmarks, the checkpoint was trained with {landmarks}")
    else:
        track = track_video(path, detect, progress=True, recognition=recognition)
    missed = len(track.found) - int(track.found.sum())
    if missed:
        print(f"no face in {missed} of {len(track.found)} frames of {path}: "
              "they repeat the landmarks before them, or the first ones")
    return track


def is_track(path):
    return path.lower().endswith(".npz")
