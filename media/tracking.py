"""Following one face through a video: its landmarks in every frame, and the files that keep them.

    track = track_video("v.mp4", landmark_detector("dlib"))     # the landmarks of every frame
"""
import math
from array import array
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from media.decode import read_video, to_rgb
from media.faces import NEARLY, SURE, TURNED, crop, overlap, steady_boxes, to_crop, which_face, where
from runtime.files import UserError, atomic, warn

# ----------------------------------------------------------------------------------------------- tracks

class Track(NamedTuple):
    """The landmarks of a video, in pixels of its upright frames.

    Times are pts * time_base[0] / time_base[1] seconds.
    A frame without a face repeats the face before it, or the first one.
    """
    points: np.ndarray      # (n, 68, 2) float32
    found: np.ndarray       # (n,) bool
    pts: np.ndarray         # (n,) int64
    time_base: np.ndarray   # (2,) int64
    detector: str           # fan | dlib
    turns: int = 0          # of a video that lies on its side: np.rot90(frame, turns) is upright

    def seconds(self):
        return self.pts * (self.time_base[0] / self.time_base[1])

    def in_crops(self, size):
        """The landmarks in the pixels of a steady size x size crop, (n, 68, 2)."""
        return to_crop(self.points, steady_boxes(self.points, self.seconds()), size)


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
        shapes = [track.points.shape, track.found.shape, track.pts.shape, track.time_base.shape]
        if (n == 0 or shapes != [(n, 68, 2), (n,), (n,), (2,)] or not np.isfinite(track.points).all()
                or (track.time_base < 1).any() or (np.diff(track.pts) < 1).any()):
            raise ValueError("its arrays are not those of a track")
        return track._replace(detector=str(track.detector))
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except Exception as e:  # numpy and zipfile raise many types on foreign or damaged files
        raise UserError(f"{path} is not a landmark track ({e})") from None


# ------------------------------------------------------------------------------------------- following

class Follower:
    """Which face of a video is looked at: within a shot the one that was followed.

    It is chosen anew only after a cut, or a second without it.
    """

    LOST = 1.0          # seconds without the followed face, after which another one may be chosen
    PATIENCE = 0.5      # seconds between two looks at large copies where there is no face: they take long

    def __init__(self, detector, turns=0):
        self.detector, self.turns = detector, turns
        self.face = None            # the followed one, where it was seen last
        self.seen = -math.inf       # when, in seconds
        self.missed = 0             # looks since then
        self.searched = -math.inf   # when the large copies were looked at last
        self.thumbnail = None       # of the frame before, to tell a cut
        self.looks = self.with_others = self.choices = 0
        self.place = None           # of the face that was chosen first among others, in words
        self.turned = np.zeros(4, int)  # how many of the searches showed a face with the frame turned so

    def is_cut(self, thumbnail):
        """Whether a new shot begins: this small copy (32, 32) has little in common with the one before."""
        before, self.thumbnail = self.thumbnail, thumbnail.astype(np.float32)
        return before is None or np.abs(self.thumbnail - before).mean() > 20

    def look(self, image, seconds, cut):
        """image uint8 (H, W, 3) -> points (68, 2) of the followed face, None where it is not to be seen."""
        self.looks += 1
        lost = self.missed >= 2 and seconds - self.seen > self.LOST
        if self.face is not None and not cut and not lost:
            faces, chosen = self.find_again(image)
        else:
            faces, chosen = self.choose(image, seconds, cut)
        others = [face for face in faces if face is not chosen and face.score >= SURE]
        self.with_others += bool(others)
        if chosen is None:
            self.missed += 1
            return None
        if others and self.place is None:
            self.place = where(chosen, [chosen, *others])
        self.face, self.seen, self.missed = chosen, seconds, 0
        return self.detector.landmarks(image, chosen)

    def find_again(self, image):
        """-> ([Face] of the frame, the followed one or None): where it was, about as large."""
        sides, last = self.detector.sides, self.face
        at = sides.index(last.side)
        if at > 0 and last.width() * sides[at - 1] / max(image.shape[:2]) > 100:
            at -= 1                         # it is large enough to be found on a smaller copy
        faces, again = [], None
        for side in sides[at:at + 2]:       # a face that grows smaller is found on the next one
            faces = self.detector.faces(image, (side,))
            near = [face for face in faces if is_near(face, last)]
            if near:
                again = max(near, key=lambda face: overlap(face.box, last.box))
                break
        surest = max(faces, key=lambda face: face.score, default=None)
        if surest and last.score < SURE <= surest.score:    # what was followed hardly looked like a face
            again = surest
        return faces, again

    def choose(self, image, seconds, cut):
        """-> ([Face] of the frame, the one to follow from here on or None)."""
        thorough = cut or seconds - self.searched >= self.PATIENCE
        faces = self.detector.faces(image, None if thorough else self.detector.sides[:1])
        if thorough:
            self.searched = seconds
        if not faces:
            if thorough:
                self.look_turned(image)
            return [], None
        chosen = which_face(faces, image)
        if self.face is not None:           # a flash is no cut: rather the same face, if it is where it was
            likely = [face for face in faces if face.score >= NEARLY * chosen.score]
            same = [face for face in likely if is_near(face, self.face)]
            chosen = max(same, key=lambda face: overlap(face.box, self.face.box), default=chosen)
            self.choices += not same
        return faces, chosen

    def look_turned(self, image):
        for k in (1, 2, 3):
            faces = self.detector.faces(np.ascontiguousarray(np.rot90(image, k)), self.detector.sides[:2])
            self.turned[k] += bool(faces and faces[0].score >= SURE)

    def report(self, path):
        """One line on what was chosen, None where there was no choice."""
        if not self.with_others:
            return None
        count = f"{self.with_others} of {self.looks} frames"
        words = f"{path}: {count} show others too: followed the face {self.place}"
        if self.choices:
            words += f", and chose anew {self.choices} times, after a cut or a second without it"
        return words


def is_near(face, last):
    """Whether a face can be the one that was `last` a moment ago: it overlaps, or is close and as large."""
    if overlap(face.box, last.box) > 0.2:
        return True
    distance = np.linalg.norm(face.centre() - last.centre())
    return distance < 0.7 * last.width() and 0.5 < face.width() / last.width() < 2


def track_video(path, detect, keep=lambda k: True, progress=False, complain=warn):
    """Landmarks of those frames k of a video for which keep(k). UserError if no face is in any of them.

    detect: a faces.Detector.  complain(line) is told what is not as it should be.
    """
    follower = Follower(detect)
    track = follow_face(path, follower, keep, progress, complain)
    turns = int(np.argmax(follower.turned))
    if follower.turned[turns] and track.found.mean() < 0.1:     # it lies on its side: once more, upright
        again = Follower(detect, turns)
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
    return track._replace(points=track.points[before])


def follow_face(path, follower, keep, progress, complain):
    """-> Track whose points are 0 where no face was found."""
    points, found, pts = array("f"), array("b"), array("q")     # an object a frame would fragment memory
    frames = read_video(path, complain)
    frames = chain([next(frames)], frames)  # what cannot be read is refused before a progress bar is drawn
    cut = False
    for k, frame in enumerate(tqdm(frames, "landmarks", unit=" frames", disable=not progress)):
        small = frame.to_ndarray(format="gray", width=32, height=32, interpolation="AREA")
        cut = follower.is_cut(small) or cut         # of any frame since the last one that was kept
        if not keep(k):
            continue
        image = np.ascontiguousarray(np.rot90(to_rgb(frame), follower.turns))
        face = follower.look(image, float(frame.pts * frame.time_base), cut)
        cut = False
        found.append(face is not None)
        points.frombytes((np.zeros((68, 2), np.float32) if face is None else face).tobytes())
        pts.append(frame.pts)
    base = np.array([frame.time_base.numerator, frame.time_base.denominator], np.int64)
    points = np.frombuffer(points, np.float32).reshape(-1, 68, 2)
    found, pts = np.array(found, bool), np.array(pts, np.int64)
    return Track(points, found, pts, base, follower.detector.kind, follower.turns)


def read_crops(path, track, wanted, size):
    """The frames of a video with the numbers `wanted` as in Track.in_crops: {k: uint8 (size, size, 3)}."""
    boxes, crops = steady_boxes(track.points, track.seconds()), {}
    for k, frame in enumerate(islice(read_video(path, lambda line: None), max(wanted) + 1)):
        if k in wanted:
            crops[k] = crop(np.rot90(to_rgb(frame), track.turns), boxes[k], size)
    return crops


def read_driver(path, landmarks, detect):
    """A video or a saved track (.npz) -> Track, with a word on what is not as it should be.

    landmarks: "fan" or "dlib", the kind that the checkpoint was trained with.
    """
    if is_track(path):
        track = load_track(path)
        if track.detector != landmarks:
            warn(f"{path} holds {track.detector} landmarks, the checkpoint was trained with {landmarks}")
    else:
        track = track_video(path, detect, progress=True)
    missed = len(track.found) - int(track.found.sum())
    if missed:
        print(f"no face in {missed} of {len(track.found)} frames of {path}: "
              "they repeat the landmarks before them, or the first ones")
    return track


def is_track(path):
    return path.lower().endswith(".npz")
