"""From folders of videos and photos to prepared ones: what a folder holds, the faces in a file, the crops.

`python data.py` prepares with it; finetune.py and infer.py find the faces of their photos with it.
"""
import io
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from media.decode import count_frames, read_photo, read_video, to_rgb, to_srgb_from_hdr
from media.faces import (TURNED, crop, face_box, inside, landmark_detector, steady_boxes, to_crop, upright,
                         which_face, words_on_choice)
from media.tracking import track_video
from runtime.files import UserError, save_tensors, warn

PHOTOS = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".heic", ".heif", ".hif", ".bmp",
          ".tif", ".tiff", ".gif"}
CLIPS = {".mp4", ".m4v", ".mov", ".qt", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".3gp", ".3g2", ".ts",
         ".mts", ".m2ts", ".wmv", ".asf", ".flv", ".f4v", ".vob", ".dv", ".mxf", ".ogv"}
SYSTEM = {"__macosx", "@eadir", "#recycle", "@recycle", "$recycle.bin", "recycler", "lost+found",
          "system volume information", "#snapshot", "@recently-snapshot"}  # of desktops and NAS


# ------------------------------------------------------------------------------------------- folders

def evenly(items, n):
    """At most n of the items, evenly spread from the first to the last."""
    if len(items) <= n:
        return items
    return [items[k] for k in np.linspace(0, len(items) - 1, n).round().astype(int)]


def find_sequences(root, out=None):
    """-> {name: [files]} of the sequences below root, and [lines on all that is not used].

    out: a folder to pass over without a word.
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
    """Yield (folder, [its photos and clips], [lines on what else is there]) for root and all below, once.

    Links to folders are followed, but after the folders themselves, and never up. Hidden folders and those
    that systems leave behind are passed over: they hold copies and thumbnails.
    """
    above = Path(os.path.realpath(root)).parents
    seen = {identity(folder) for folder in above}
    ours = identity(out) if out and os.path.isdir(out) else None
    folders, links = [root], []
    while folders or links:
        folder = folders.pop(0) if folders else links.pop(0)
        if identity(folder) in seen:
            yield folder, [], ["a link to a folder that is used already"]
            continue
        seen.add(identity(folder))
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as e:
            yield folder, [], [e.strerror]
            continue
        inner = [entry for entry in entries if entry.is_dir() and identity(entry.path) != ours]
        for entry in inner:
            if not is_system(entry.name):
                (links if entry.is_symlink() else folders).append(entry.path)
        beside = [entry for entry in entries if not entry.is_dir()]
        files = [Path(entry.path) for entry in beside if is_source(entry)]
        others = [entry.name for entry in beside if not is_source(entry)]
        passed = [entry.name for entry in inner if is_system(entry.name)]
        yield folder, files, words_on_unused(others, passed, empty=not files and not inner)


def identity(folder):
    """What is the same for all names of a folder."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def is_system(name):
    return name.startswith(".") or name.lower() in SYSTEM


def is_source(entry):
    """Whether an os.DirEntry is a photo or a clip. "._1.jpg" is what a Mac leaves beside 1.jpg."""
    return entry.is_file() and not is_system(entry.name) and Path(entry.name).suffix.lower() in PHOTOS | CLIPS


def words_on_unused(others, passed, empty):
    """Lines on what a folder holds that is not used: other files, folders that are passed over."""
    lines = [f"the hidden or system folder {name} is passed over" for name in passed]
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        lines.append(f"neither videos nor photos: {', '.join(others[:5])}{more}")
    if empty:
        lines.append("no videos or photos in this folder")
    return lines


# --------------------------------------------------------------------------------------------- faces

def faces_in(path, detect, size, max_frames=0, complain=warn):
    """Yield (crop uint8 (size, size, 3), points (68, 2) in it, seconds) of a photo, or of a clip's frames
    with a face. seconds: the frame's time in its clip, 0 for a photo.

    max_frames: at most so many frames of a clip, evenly spread; 0: all. UserError where no face is found.
    complain(line) is told which of several faces was taken, and what was turned.
    """
    suffix = Path(path).suffix.lower()
    if suffix in CLIPS or (suffix not in PHOTOS and count_frames(path) > 1):
        yield from faces_in_clip(path, detect, size, max_frames, complain)
    else:
        yield face_in_photo(path, detect, size, complain)


def face_in_photo(path, detect, size, complain):
    """-> (crop, points, 0.0), as above."""
    image, faces, turns = upright(read_photo(path), detect)
    if not faces:
        raise UserError(f"no face found in {path}, however turned; if there is one that looks at the camera, "
                        "cut the picture closer to it")
    face = which_face(faces, image)
    choice = words_on_choice(faces, face, path)
    if choice:
        complain(choice)
    if turns:
        complain(f"{path} {TURNED[turns]}")
    points = detect.landmarks(image, face)
    box = inside(face_box(points), image)
    return crop(image, box, size), to_crop(points, box, size), 0.0


def faces_in_clip(path, detect, size, max_frames, complain):
    """Yield (crop, points, seconds), as above."""
    count = count_frames(path) if max_frames else 0
    chosen = set(evenly(range(count), max_frames)) if count > max_frames else range(sys.maxsize)
    track = track_video(path, detect, lambda k: k in chosen, complain=complain)
    times = track.seconds()
    boxes = steady_boxes(track.points, times)
    kept = (frame for k, frame in enumerate(read_video(path, lambda line: None)) if k in chosen)
    for frame, box, points, found, time in zip(kept, boxes, track.points, track.found, times):
        if found:
            image = np.rot90(to_rgb(frame), track.turns)
            box = inside(box, image)
            shown = to_srgb_from_hdr(crop(image, box, size), frame)
            yield shown, to_crop(points, box, size), float(time)


# ----------------------------------------------------------------------------------- preparing a folder

_detect = None  # each worker process builds its detector once


def _start_worker(kind):
    global _detect
    torch.set_num_threads(1)
    _detect = landmark_detector(kind)


def _prepare(files, out, size, max_frames):
    """One sequence -> one file. Returns (frames stored, [what could not be used])."""
    files = evenly(files, max_frames or len(files))
    jpegs, landmarks, numbers, times, problems = [], [], [], [], []
    for number, file in enumerate(files):
        try:
            share = max_frames // len(files)
            for face, points, seconds in faces_in(file, _detect, size, share, problems.append):
                buffer = io.BytesIO()
                Image.fromarray(face).save(buffer, "JPEG", quality=95, subsampling=0)
                jpegs.append(torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8))
                landmarks.append(torch.from_numpy(points))
                numbers.append(number)
                times.append(seconds)
        except UserError as e:
            problems.append(str(e))
        except Exception as e:  # one odd file among a million must not stop the rest
            problems.append(f"{file}: {type(e).__name__}: {e}")
    if len(jpegs) < 2:
        return 0, problems + [f"{files[0].parent}: {len(jpegs)} frames with a face, and 2 are needed"]
    offsets = torch.tensor([0] + [len(j) for j in jpegs]).cumsum(0)
    times = torch.tensor(times, dtype=torch.float64)
    save_tensors({"jpeg": torch.cat(jpegs), "offsets": offsets, "landmarks": torch.stack(landmarks),
                  "file": torch.tensor(numbers), "seconds": times, "image_size": size,
                  "detector": _detect.kind}, out)
    return len(jpegs), problems


def prepare(videos, out, kind, size, max_frames, workers):
    """`python data.py`: every sequence below `videos` becomes a file in `out`. Prints a summary."""
    if not os.path.isdir(videos):
        raise UserError(f"no folder {videos}: name the one that holds the videos or photos with --videos DIR")
    sequences, problems = find_sequences(videos, out)
    if not sequences:
        raise UserError(f"{videos} holds neither videos nor photos")
    todo = {name: files for name, files in sequences.items() if not os.path.exists(f"{out}/{name}.pt")}
    landmark_detector(kind)  # fails here, before the workers start, if it cannot be built

    # the work
    done, frames, stop = 0, 0, None
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (kind,)) as pool:
        jobs = [pool.submit(_prepare, files, f"{out}/{name}.pt", size, max_frames)
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
    if stop or (done == 0 and len(sequences) == len(todo)):
        raise stop or UserError(f"nothing in {videos} could be used")
