"""From folders of videos and photos to prepared ones: what a folder holds, the faces in a file, the crops.

`python data.py` prepares with it; finetune.py and infer.py find the faces of their photos with it.
"""
import io
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context, resource_tracker
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from media.crops import MADE_UP, crop, face_box, inside, made_up, to_crop
from media.decode import count_frames, read_video, to_rgb, to_srgb_from_hdr
from media.faces import TURNED, landmark_detector, upright, which_face, words_on_choice
from media.photos import read_photo
from media.recognition import are_several, dlib_recognition
from media.tracking import track_video
from runtime.device import free_memory, usable_cores
from runtime.files import (UserError, leave_on_signals, make_folder, pass_on_want_of_memory, save_tensors,
                           warn)

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
        lines.append(f"neither videos nor photos: {first_names(others)}")
    if empty:
        lines.append("no videos or photos in this folder")
    return lines


def first_names(names):
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# --------------------------------------------------------------------------------------------- faces

class Shot(NamedTuple):
    """A face as all stages see it, cut out of a photo or of a frame of a clip."""
    image: np.ndarray       # uint8 (size, size, 3)
    points: np.ndarray      # (68, 2) float32, in pixels of the image
    seconds: float          # the frame's time in its clip; 0 for a photo
    made_up: float          # the share of the image that lies beyond the picture's border, 0 to 1
    width: float            # of the face in the picture that it comes from, in pixels


class Photo(NamedTuple):
    """A photo of a person, or the frames of a clip, with their landmarks: m = 1 for a photo."""
    frames: np.ndarray      # uint8 (m, S, S, 3)
    points: np.ndarray      # (m, 68, 2), in pixels of the frames


def cut_shot(image, points, box, size, seconds):
    """A picture uint8 (H, W, 3), points (68, 2) in its pixels and a box (3,) of face_box -> Shot."""
    box = inside(box, image)
    return Shot(crop(image, box, size), to_crop(points, box, size), seconds, made_up(box, image),
                float(np.ptp(points[:, 0])))


def faces_in(path, detect, size, max_frames=0, complain=warn, recognition=None):
    """Yield the Shot of a photo, or those of a clip's frames that show a face.

    max_frames: at most so many frames of a clip, evenly spread; 0: all. UserError where no face is found.
    complain(line) is told which of several faces was taken, and what was turned.  recognition: of a Follower.
    """
    suffix = Path(path).suffix.lower()
    if suffix in CLIPS or (suffix not in PHOTOS and count_frames(path) > 1):
        yield from faces_in_clip(path, detect, size, max_frames, complain, recognition)
    else:
        yield face_in_photo(path, detect, size, complain)


def face_in_photo(path, detect, size, complain):
    """-> Shot, as above."""
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
    return cut_shot(image, points, face_box(points), size, 0.0)


def faces_in_clip(path, detect, size, max_frames, complain, recognition):
    """Yield the Shot of each frame, as above."""
    count = count_frames(path) if max_frames else 0
    chosen = set(evenly(range(count), max_frames)) if count > max_frames else range(sys.maxsize)
    track = track_video(path, detect, lambda k: k in chosen, complain=complain, recognition=recognition)
    times = track.seconds()
    boxes = track.boxes()
    numbers = {pts: k for k, pts in enumerate(track.pts) if track.found[k]}     # by time, as in read_crops()
    for frame in read_video(path, lambda line: None):
        k = numbers.get(frame.pts)
        if k is not None:
            image = np.rot90(to_rgb(frame), track.turns)
            shot = cut_shot(image, track.points[k], boxes[k], size, float(times[k]))
            yield shot._replace(image=to_srgb_from_hdr(shot.image, frame))


# ----------------------------------------------------------------------------------- preparing a folder

WORKER = 627e6      # bytes that a worker takes

COMPARED = 4        # files of a sequence: do they show one person?
_detect = _recognise = None     # each worker process builds them once
_stopped = False    # whether it had a signal


def _start_worker(kind):
    global _detect, _recognise
    leave_on_signals(signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    torch.set_num_threads(1)
    _detect, _recognise = landmark_detector(kind), dlib_recognition()


def _job(*arguments):
    """_prepare() in a worker. After a signal it does no more, though the pool gives it what waits in line."""
    global _stopped
    if _stopped:
        sys.exit()
    try:
        return _prepare(*arguments)
    except SystemExit:
        _stopped = True
        raise


def _prepare(files, out, size, max_frames):
    """One sequence -> one file. Returns (frames stored, how many of them are above MADE_UP, [what could not
    be used])."""
    files = evenly(files, max_frames or len(files))
    jpegs, numbers, shots, vectors, problems = [], [], [], [], []
    compared = evenly(range(len(files)), COMPARED)
    for number, file in enumerate(files):
        try:
            share = max_frames // len(files)
            for shot in faces_in(file, _detect, size, share, problems.append):
                if number in compared and number not in numbers:
                    vectors.append(_recognise(shot.image, shot.points))
                buffer = io.BytesIO()
                Image.fromarray(shot.image).save(buffer, "JPEG", quality=95, subsampling=0)
                jpegs.append(torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8))
                shots.append(shot._replace(image=None))     # in memory the JPEG alone is kept
                numbers.append(number)
        except UserError as e:
            problems.append(str(e))
        except Exception as e:  # one odd file among a million must not stop the rest
            pass_on_want_of_memory(e)
            problems.append(f"{file}: {type(e).__name__}: {e}")
    if len(jpegs) < 2:
        return 0, 0, problems + [f"{files[0].parent}: {len(jpegs)} frames with a face, and 2 are needed"]
    if are_several(vectors):
        problems.append(f"{files[0].parent}: the files seem to show several people, who are prepared as one "
                        "person: give each a folder")
    shares = torch.tensor([shot.made_up for shot in shots])
    save_tensors({"jpeg": torch.cat(jpegs),
                  "offsets": torch.tensor([0] + [len(j) for j in jpegs]).cumsum(0),
                  "landmarks": torch.from_numpy(np.stack([shot.points for shot in shots])),
                  "file": torch.tensor(numbers),
                  "seconds": torch.tensor([shot.seconds for shot in shots], dtype=torch.float64),
                  "made_up": shares, "image_size": size, "detector": _detect.kind}, out)
    return len(jpegs), int((shares > MADE_UP).sum()), problems


def default_workers(kind):
    """How many worker processes prepare() may start on this machine. kind: of landmark_detector."""
    if kind == "fan" and torch.cuda.is_available():
        return 2    # they share the GPU
    return max(1, int(min(usable_cores(), free_memory() / WORKER)))


def results(jobs, kind, workers):
    """Yield what _prepare() returns for each of these arguments, as they are done."""
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    resource_tracker.ensure_running()       # multiprocessing's own helper: other signals it ignores by itself
    signal.signal(signal.SIGHUP, handler)
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (kind,)) as pool:
        jobs = [pool.submit(_job, *job) for job in jobs]
        try:
            for job in tqdm(as_completed(jobs), "preparing", len(jobs), unit=" sequences"):
                yield job.result()
        except (KeyboardInterrupt, SystemExit, GeneratorExit):      # a signal that they may not have had
            for worker in active_children():
                worker.terminate()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def prepare(videos, out, kind, size, max_frames, workers):
    """`python data.py`: every sequence below `videos` becomes a file in `out`. Prints a summary."""
    if not os.path.isdir(videos):
        raise UserError(f"no folder {videos}: name the one that holds the videos or photos with --videos DIR")
    sequences, problems = find_sequences(videos, out)
    if not sequences:
        raise UserError(f"{videos} holds neither videos nor photos")
    make_folder(out)
    todo = {name: files for name, files in sequences.items() if not os.path.exists(f"{out}/{name}.pt")}
    landmark_detector(kind)  # fails here, before the workers start, if it cannot be built

    # the work
    done, frames, tight, stop = 0, 0, 0, None
    jobs = [(files, f"{out}/{name}.pt", size, max_frames) for name, files in todo.items()]
    try:
        for count, cut_tight, lines in results(jobs, kind, workers):
            done += count > 0
            frames += count
            tight += cut_tight
            problems += lines
    except BrokenProcessPool:
        stop = UserError("a worker process died, perhaps for want of memory: run it again to go on, "
                         "with fewer --workers")
    except UserError as e:  # it cannot be written
        stop = e

    # the summary
    before = len(sequences) - len(todo)
    left_out = {name: len(files) - max_frames for name, files in todo.items() if 0 < max_frames < len(files)}
    print(f"{out}: {done} sequences with {frames} frames prepared, {before} were there already")
    if left_out:
        print(f"left out by --max-frames {max_frames}: {sum(left_out.values())} photos and clips of "
              f"{first_names(list(left_out))}")
    if tight:
        print(f"{tight} of these frames are cut so tight that more than {MADE_UP:.0%} of the crop had to be "
              "made up: training leaves them out")
    if problems:
        print(f"not used, not all of it, or worth a look ({len(problems)}):", *sorted(problems), sep="\n  ")
    if stop or (done == 0 and len(sequences) == len(todo)):
        raise stop or UserError(f"nothing in {videos} could be used")
