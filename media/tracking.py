"""Tracks: the landmarks of one face in every frame of a video, and files that store them.

    track = track_video("v.mp4", landmark_detector("dlib"))     # a Track
    frames = read_crops("v.mp4", track, [0, 10], 256)           # {0: uint8 (256, 256, 3), 10: ...}
"""
from array import array
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from media.crops import crop, shots, steady_boxes, to_crop
from media.decode import read_video, to_rgb
from media.faces import TURNED
from media.following import Follower
from runtime.files import UserError, atomic, raise_if_out_of_memory, warn

# ----------------------------------------------------------------------------------------------- tracks

class Track(NamedTuple):
    """The landmarks of the face that was followed through the n frames of a video.

    A frame without a face repeats the landmarks of the frame before it, or the first ones that were found.
    The time of a frame is pts * time_base[0] / time_base[1] seconds.
    """
    points: np.ndarray      # (n, 68, 2) float32, in pixels of the upright frames
    found: np.ndarray       # (n,) bool: whether the face was found in this frame
    cuts: np.ndarray        # (n,) bool: whether this is the first frame with a face after a visible cut
    pts: np.ndarray         # (n,) int64
    time_base: np.ndarray   # (2,) int64
    detector: str           # "fan" or "dlib"
    turns: int = 0          # np.rot90(frame, turns) is upright; not 0 for a video that lies on its side

    def seconds(self):
        return self.pts * (self.time_base[0] / self.time_base[1])

    def shots(self):
        """The number of the shot to which each frame belongs, (n,). Each shot has a frame with a face."""
        return shots(self.points, self.found, self.cuts)

    def boxes(self):
        """The box of each frame's crop, (n, 3), as crops.face_box() returns them."""
        return steady_boxes(self.points, self.seconds(), self.shots())

    def in_crops(self, size):
        """The landmarks in pixels of each frame's crop, which has size x size pixels, (n, 68, 2)."""
        return to_crop(self.points, self.boxes(), size)

    def first(self, n):
        """The Track of the first n frames."""
        return self._replace(**{name: getattr(self, name)[:n] for name in ("points", "found", "cuts", "pts")})


STORED = Track._fields[:-1]     # what a file stores: all but the turns, because the points are upright


def save_track(path, track):
    """Write a Track as .npz. Raises UserError if it cannot be written."""
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **{name: getattr(track, name) for name in STORED})


def load_track(path):
    """-> the Track that save_track() wrote. Raises UserError if the file is not one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            track = Track(*(file[name] for name in STORED))
        n = len(track.pts)
        shapes = [getattr(track, name).shape for name in ("points", "found", "cuts", "pts", "time_base")]
        if (n == 0 or shapes != [(n, 68, 2), (n,), (n,), (n,), (2,)] or not np.isfinite(track.points).all()
                or (track.time_base < 1).any() or (np.diff(track.pts) < 1).any()
                or not track.found.any() or (track.cuts & ~track.found).any()
                or track.cuts[:np.argmax(track.found) + 1].any()):
            raise ValueError("its arrays have other shapes or values")
        return track._replace(detector=str(track.detector))
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except Exception as e:  # numpy and zipfile raise many types for damaged files and files of other kinds
        raise_if_out_of_memory(e)
        raise UserError(f"{path} is not a landmark track as infer.py --save-track writes it ({e}): save it "
                        "again, or use the video itself") from None


# ------------------------------------------------------------------------------------------- following

def track_video(path, detect, keep=lambda k: True, progress=False, complain=warn, recognition=None):
    """-> the Track of the frames k of a video for which keep(k) is true.

    detect: a faces.Detector.  recognition: as for a Follower.  complain(line) is called if the video is
    damaged, lies on its side, or shows several faces. Raises UserError if no frame shows a face.
    """
    follower = Follower(detect, recognition)
    track = follow_face(path, follower, keep, progress, complain)
    turns = int(np.argmax(follower.turned))
    if follower.turned[turns] and track.found.mean() < 0.1:     # it seems to lie on its side: rotate it
        again = Follower(detect, recognition, turns)
        turned = follow_face(path, again, keep, progress, lambda line: None)
        if turned.found.sum() > track.found.sum():
            follower, track = again, turned
            complain(f"{path} {TURNED[turns]}")
    if not track.found.any():
        raise UserError(f"no face found in any of the {len(track.found)} frames of {path}, not even with the "
                        "video rotated: use one with a face that looks at the camera")
    if follower.report(path):
        complain(follower.report(path))
    own, first = np.arange(len(track.found)), np.argmax(track.found)
    before = np.maximum.accumulate(np.where(track.found, own, first))
    return track._replace(points=track.points[before], cuts=track.cuts & (own > first))


def follow_face(path, follower, keep, progress, complain):
    """-> a Track whose points are 0 in frames in which no face was found."""
    # arrays, because one object for each frame would fragment the memory
    points, found, cuts, pts = array("f"), array("b"), array("b"), array("q")
    lines = []                              # for complain(), after the progress bar has been closed
    frames = read_video(path, lines.append)
    frames = chain([next(frames)], frames)  # a file that cannot be read is refused before the bar is drawn
    bar = tqdm(frames, "landmarks", unit=" frames", disable=not progress)
    begins = False      # whether there was a cut, but no face since
    for (frame, image, cut, new), after in pairwise(chain(kept(bar, follower, keep), [None])):
        following = after[1] if after else None
        face = follower.look(image, float(frame.pts * frame.time_base), cut, following)
        begins = begins or new
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


def kept(frames, follower, keep):
    """Yield (frame, its image, cut, new) for each of the frames k with keep(k).

    cut: whether there was a cut since the frame before.  new: whether one of these cuts did not directly
    follow another one; a shaken camera looks like a cut at every frame.
    """
    cut = seen = new = False
    for k, frame in enumerate(frames):
        small = frame.to_ndarray(format="gray", width=32, height=32, interpolation="AREA", threads=1)
        before, seen = seen, follower.is_cut(small)
        cut = cut or seen
        new = new or (seen and not before)
        if keep(k):
            yield frame, np.ascontiguousarray(np.rot90(to_rgb(frame), follower.turns)), cut, new
            cut = new = False


def read_crops(path, track, wanted, size):
    """-> {k: uint8 (size, size, 3)}: the crops, as in Track.in_crops(), of the frames k in `wanted`.

    Frames are identified by their times, because FFmpeg does not always decode the same frames of a damaged
    video. A frame that is missing this time is left out.
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
    """A video or a saved track (.npz) -> Track. Tells the user about problems with it.

    landmarks: the detector that the checkpoint was trained with.  recognition: as for a Follower.
    Raises UserError if the file cannot be read or shows no face.
    """
    if is_track(path):
        track = load_track(path)
        if track.detector != landmarks:
            warn(f"{path} holds {track.detector} landmarks, but the checkpoint was trained with {landmarks} "
                 "landmarks, so the result may suffer: use the video itself as the driver")
    else:
        track = track_video(path, detect, progress=True, recognition=recognition)
    missed = len(track.found) - int(track.found.sum())
    if missed:
        print(f"no face in {missed} of {len(track.found)} frames of {path}: their landmarks are filled in "
              "from the frames around them")
    return track


def is_track(path):
    return path.lower().endswith(".npz")
