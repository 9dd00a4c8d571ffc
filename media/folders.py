"""The photos and clips in folders, and the faces in them.

    sequences, notes = find_sequences("videos")                     # for data.py
    for shot in faces_in("x.jpg", landmark_detector("dlib"), 256):  # for all stages
        ...
"""
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from media.crops import crop, face_box, inside, made_up, to_crop
from media.decode import count_frames, is_spoilt, read_video, to_rgb, to_srgb_from_hdr
from media.faces import TURNED, upright, which_face, words_on_choice
from media.photos import read_photo
from media.tracking import track_video
from runtime.files import UserError, warn

PHOTOS = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".heic", ".heif", ".hif", ".bmp",
          ".tif", ".tiff", ".gif"}
CLIPS = {".mp4", ".m4v", ".mov", ".qt", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".3gp", ".3g2", ".ts",
         ".mts", ".m2ts", ".wmv", ".asf", ".flv", ".f4v", ".vob", ".dv", ".mxf", ".ogv"}
SYSTEM = {"__macosx", "@eadir", "#recycle", "@recycle", "$recycle.bin", "recycler", "lost+found",
          "system volume information", "#snapshot", "@recently-snapshot"}  # made by desktops and NAS devices


# ------------------------------------------------------------------------------------------- folders

def evenly(items, n):
    """At most n of the items, evenly spaced, including the first and the last (only the first if n = 1)."""
    if len(items) <= n:
        return items
    return [items[k] for k in np.linspace(0, len(items) - 1, n).round().astype(int)]


def find_sequences(root, out=None):
    """-> {name: [files]} of the sequences below root, and a list of lines about what is not used.

    A folder is a sequence. In root itself, every clip is a sequence, and all photos together are one.
    out: the output folder, which is skipped without a line about it.
    """
    sequences, unused = {}, []
    for folder, files, lines in walk(root, out):
        name = os.path.relpath(folder, root)
        unused += [f"{name}: {line}" for line in lines]
        if name == ".":
            clips = [f for f in files if f.suffix.lower() in CLIPS]
            sequences |= {f.name: [f] for f in clips}
            files, name = [f for f in files if f not in clips], "_photos"
        if files:
            sequences[name] = files
    return sequences, unused


def walk(root, out=None):
    """Yield (folder, [its photos and clips], [lines about what is not used]) for root and all folders below.

    Every folder is visited once. Links to folders are followed after all real folders, but not to a folder
    above root. Hidden folders and those of the system are skipped, because they hold copies and thumbnails.
    """
    above = Path(os.path.realpath(root)).parents
    seen = {folder_id(folder) for folder in above}
    own = folder_id(out) if out and os.path.isdir(out) else None
    folders, links = [root], []
    while folders or links:
        folder = folders.pop(0) if folders else links.pop(0)
        if folder_id(folder) in seen:
            yield folder, [], ["skipped, because it links to a folder that is used already or lies above"]
            continue
        seen.add(folder_id(folder))
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as e:
            yield folder, [], [f"cannot be read ({e.strerror})"]
            continue
        subfolders = [entry for entry in entries if entry.is_dir() and folder_id(entry.path) != own]
        for entry in subfolders:
            if not is_system(entry.name):
                (links if entry.is_symlink() else folders).append(entry.path)
        rest = [entry for entry in entries if not entry.is_dir()]
        files = [Path(entry.path) for entry in rest if is_source(entry)]
        others = [entry.name for entry in rest if not is_source(entry)]
        skipped = [entry.name for entry in subfolders if is_system(entry.name)]
        yield folder, files, words_on_unused(others, skipped, empty=not files and not subfolders)


def folder_id(folder):
    """A value that is equal for two paths of the same folder."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def is_system(name):
    return name.startswith(".") or name.lower() in SYSTEM


def is_source(entry):
    """Whether an os.DirEntry is a photo or a clip. macOS adds files such as "._1.jpg", which are neither."""
    return entry.is_file() and not is_system(entry.name) and Path(entry.name).suffix.lower() in PHOTOS | CLIPS


def words_on_unused(others, skipped, empty):
    """-> lines about what is not used in a folder. others, skipped: names of files and of folders."""
    lines = [f"skipped the hidden or system folder {name}" for name in skipped]
    if others:
        lines.append(f"skipped files that are neither videos nor photos: {first_names(others)}")
    if empty:
        lines.append("no videos or photos in this folder")
    return lines


def first_names(names):
    """The first five of these names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# --------------------------------------------------------------------------------------------- faces

class FaceCrop(NamedTuple):
    """The crop of a face in a photo or in a frame of a clip, as all stages use it."""
    image: np.ndarray       # uint8 (size, size, 3)
    points: np.ndarray      # landmarks (68, 2) float32, in pixels of the image
    seconds: float          # the frame's time in its clip; 0 for a photo
    made_up: float          # the share of the image that lies beyond the picture's border, 0 to 1
    width: float            # of the face, in pixels of the original picture


class Photo(NamedTuple):
    """A photo of a person (m = 1) or the frames of a clip, with their landmarks."""
    frames: np.ndarray      # uint8 (m, S, S, 3)
    points: np.ndarray      # (m, 68, 2), in pixels of the frames


def crop_face(image, points, box, size, seconds):
    """Picture uint8 (H, W, 3), landmarks (68, 2) in its pixels, box (3,) from face_box() -> FaceCrop."""
    box = inside(box, image)
    return FaceCrop(crop(image, box, size), to_crop(points, box, size), seconds, made_up(box, image),
                    float(np.ptp(points[:, 0])))


def faces_in(path, detect, size, max_frames=0, complain=warn, recognition=None):
    """Yield the FaceCrop of a photo, or one for each frame of a clip that shows a face.

    detect: a faces.Detector.  size: of the crops.  max_frames: use at most this many frames of a clip, evenly
    spaced; 0 means all.  recognition: as for a Follower.  complain(line) is called if the picture had to be
    rotated, shows several faces, or is damaged. Raises UserError if there is no face, or the file cannot be
    read.
    """
    suffix = Path(path).suffix.lower()
    if suffix in CLIPS or (suffix not in PHOTOS and count_frames(path) > 1):
        yield from faces_in_clip(path, detect, size, max_frames, complain, recognition)
    else:
        yield face_in_photo(path, detect, size, complain)


def face_in_photo(path, detect, size, complain):
    """-> FaceCrop; see faces_in()."""
    image, faces, turns = upright(read_photo(path), detect)
    if not faces:
        raise UserError(f"no face found in {path}, not even with the photo rotated; if it shows a face that "
                        "looks at the camera, crop the photo closer to it")
    face = which_face(faces, image)
    choice = words_on_choice(faces, face, path)
    if choice:
        complain(choice)
    if turns:
        complain(f"{path} {TURNED[turns]}")
    points = detect.landmarks(image, face)
    return crop_face(image, points, face_box(points), size, 0.0)


def faces_in_clip(path, detect, size, max_frames, complain, recognition):
    """Yield a FaceCrop of each frame with a face, except frames that damage has spoilt; see faces_in()."""
    count = count_frames(path) if max_frames else 0
    chosen = set(evenly(range(count), max_frames)) if count > max_frames else range(sys.maxsize)
    track = track_video(path, detect, lambda k: k in chosen, complain=complain, recognition=recognition)
    times = track.seconds()
    boxes = track.boxes()
    numbers = {pts: k for k, pts in enumerate(track.pts) if track.found[k]}     # by time, as in read_crops()
    used = 0
    for frame in read_video(path, lambda line: None):
        k = numbers.get(frame.pts)
        if k is not None and not is_spoilt(frame):
            used += 1
            image = np.rot90(to_rgb(frame), track.turns)
            face = crop_face(image, track.points[k], boxes[k], size, float(times[k]))
            yield face._replace(image=to_srgb_from_hdr(face.image, frame))
    if not used:
        raise UserError(f"{path} is so damaged that no frame with a face can be used: use another file")
