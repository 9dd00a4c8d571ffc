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
import re
import sys
import warnings
from array import array
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from model import Config, UserError, save_tensors

PHOTOS = {".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif"}
CLIPS = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".3gp", ".ts", ".mts", ".wmv", ".flv"}


def run(main):
    """Run a script's main(): what the user can mend becomes one line on stderr and exit code 2."""
    try:
        return main()
    except UserError as e:  # from a loader's worker it comes with that worker's traceback before it
        message, code = "error: " + str(e).strip().splitlines()[-1].removeprefix("model.UserError: "), 2
    except KeyboardInterrupt:
        message, code = "stopped", 130
    sys.exit(print(message, file=sys.stderr) or code)  # only now: a progress bar has been closed with the exception


def check_paths(inputs, outputs=()):
    """UserError now, rather than after minutes of work, if an input is missing or an output cannot or must not be written.

    inputs, outputs: lists of paths, None where a flag was not given.
    """
    inputs = [path for path in inputs if path is not None]
    for path in inputs:
        if not os.path.isfile(path):
            raise UserError(f"no file {path}")
    for path in (path for path in outputs if path is not None):
        folder = os.path.dirname(path) or "."
        if os.path.isdir(path) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
            raise UserError(f"cannot write {path}: " + ("it is a folder" if os.path.isdir(path) else f"no folder {folder} to write to"))
        if os.path.exists(path) and any(os.path.samefile(path, i) for i in inputs):
            raise UserError(f"cannot write {path}: it is also an input, and would be lost")


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


def landmark_detector(kind):
    """-> detect(image uint8 (H, W, 3)): points (68, 2) float32 of the largest face, or None. Build it once.

    kind "fan": face-alignment, the paper's detector [7].  "dlib": the same 68 points, offline and fast on a CPU.
    """
    return {"fan": _fan_detector, "dlib": _dlib_detector}[kind]()


def dlib_model(name):
    """The path of a file in face_recognition_models, which cannot be imported under current setuptools."""
    return os.path.join(find_spec("face_recognition_models").submodule_search_locations[0], "models", name)


def _dlib_detector():
    import dlib
    predictor = dlib.shape_predictor(dlib_model("shape_predictor_68_face_landmarks.dat"))
    detector = dlib.get_frontal_face_detector()

    def detect(image):
        for side in (256, 512, 1024):  # it sees faces of 80 pixels and more; small copies are quick, so they go first
            scale = side / max(image.shape[:2])
            boxes = detector(np.asarray(shrink(image, scale)))
            if boxes:
                box = max(boxes, key=lambda b: b.area())  # it can see a second, false face
                box = dlib.rectangle(*(round(v / scale) for v in (box.left(), box.top(), box.right(), box.bottom())))
                shape = predictor(image, box)
                return np.array([(p.x, p.y) for p in shape.parts()], np.float32)
        return None

    return detect


def _fan_detector():
    import face_alignment
    from face_alignment.detection.sfd import sfd_detector
    device, folder = "cuda" if torch.cuda.is_available() else "cpu", os.path.join(torch.hub.get_dir(), "checkpoints")
    try:
        os.makedirs(folder, exist_ok=True)
        for url in (sfd_detector.models_urls["s3fd"], face_alignment.api.models_urls["2DFAN-4"]):
            path = os.path.join(folder, os.path.basename(url))
            if not os.path.exists(path):    # the library would not check the hash that the name carries
                print(f"Downloading {url} to {path}", file=sys.stderr)
                published = re.search(r"-([0-9a-f]{8,})\.", url)
                torch.hub.download_url_to_file(url, path, hash_prefix=published and published[1])
        # compile=False: the default spends minutes compiling on a CPU
        fan = face_alignment.FaceAlignment(face_alignment.LandmarksType.TWO_D, device=device, compile=False)
    except (OSError, RuntimeError) as e:  # no network, a wrong hash
        raise UserError(f"cannot get the weights of face-alignment ({e}): put them into {folder} yourself, "
                        "or prepare and train with data.py --landmarks dlib") from None

    def detect(image):
        scale = min(1, 640 / max(image.shape[:2]))  # its face detector would take minutes over a whole photo
        faces = fan.get_landmarks_from_image(np.asarray(shrink(image, scale)))
        return max(faces, key=lambda p: np.ptp(p[:, 0]) * np.ptp(p[:, 1]))[:, :2].astype(np.float32) / scale if faces else None

    return detect


def shrink(image, scale):
    """uint8 (H, W, 3) -> a PIL picture, `scale` times as large."""
    height, width = image.shape[:2]
    return Image.fromarray(image).resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.BILINEAR)


# ------------------------------------------------------------------------------------------------ crops

def face_box(points):
    """The one crop of training, photos and drivers: points (..., 68, 2) -> (..., 3): centre x, y and half side.

    Centred between eyes and mouth: VoxCeleb's own frames end not far above the brows."""
    eyes = np.stack([points[..., 36:42, :].mean(-2), points[..., 42:48, :].mean(-2)], axis=-2)
    mouth = points[..., [48, 54], :].mean(-2)
    between = eyes.mean(-2)
    eye_distance = np.linalg.norm(eyes[..., 0, :] - eyes[..., 1, :], axis=-1)
    mouth_distance = np.linalg.norm(mouth - between, axis=-1)
    half = np.maximum(2 * eye_distance, 1.8 * mouth_distance)
    return np.concatenate([between + 0.5 * (mouth - between), half[..., None]], axis=-1)


def steady_boxes(points, times):
    """face_box for a video: a Gaussian mean over about a second either side, so that the crop does not jitter.

    points (n, 68, 2), times (n,) in seconds -> (n, 3). Nothing is averaged across a cut, where the face jumps.
    """
    boxes = face_box(points)
    shot = np.cumsum(np.linalg.norm(np.diff(boxes[:, :2], axis=0, prepend=boxes[:1, :2]), axis=1) > boxes[:, 2])
    result = np.empty_like(boxes)
    for k, t in enumerate(times):
        a, b = np.searchsorted(times, [t - 3, t + 3])
        weight = np.exp(-0.5 * (times[a:b] - t) ** 2) * (shot[a:b] == shot[k])
        result[k] = weight @ boxes[a:b] / weight.sum()
    return result


def inside(box, image):
    """A box moved into the picture as far as it fits: what lies beyond can only be made up. box (3,) -> (3,)."""
    room = np.array(image.shape[1::-1]) - 2 * box[2]            # x and y that are left, negative where it is too large
    corner = np.clip(box[:2] + 0.5 - box[2], np.minimum(room / 2, 0), np.maximum(room / 2, room))
    return np.append(corner + box[2] - 0.5, box[2])


def crop(image, box, size):
    """image uint8 (H, W, 3), box (3,) of face_box -> uint8 (size, size, 3), antialiased, reflected beyond the border."""
    height, width = image.shape[:2]
    (x, y), half = box[:2] + 0.5, box[2]        # +0.5: from pixel centres to the edges that PIL counts in
    edges = np.array([x - half, y - half, x + half, y + half])
    over = np.ceil(np.array([-edges[0], -edges[1], edges[2] - width, edges[3] - height])).clip(0).astype(int)
    if over.any():  # reflection: repeated edges draw streaks, which a generator then learns
        image = np.pad(image, ((over[1], over[3]), (over[0], over[2]), (0, 0)), mode="reflect" if min(height, width) > 1 else "edge")
        edges += np.tile(over[:2], 2)
    return np.asarray(Image.fromarray(image).resize((size, size), Image.BICUBIC, box=tuple(edges)))


def to_crop(points, box, size):
    """Points in the image (..., 68, 2) -> in pixels of its crop by `box` (..., 3)."""
    centre, half = np.split(box[..., None, :], [2], axis=-1)
    result = np.subtract(points, centre - half, dtype=np.float32)    # in place: a long driver has many
    result *= (size / (2 * half)).astype(np.float32)
    result -= 0.5
    return result


# ------------------------------------------------------------------------------------ photos and videos

def read_photo(path):
    """-> uint8 (H, W, 3), upright (EXIF), alpha over white, the first picture of an animation. UserError if it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I"):  # 16 bits, which PIL would clip to 8
                    image = Image.fromarray((np.asarray(image, np.float64) / 257).clip(0, 255).astype(np.uint8))
                if image.has_transparency_data:
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                return np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise UserError(f"{path} is not a picture that can be read ({e})") from None


def warn(message):
    print(f"warning: {message}", file=sys.stderr)


def read_video(path, complain=warn):
    """Yield every frame of a video as an av.VideoFrame, with pts (rising) and time_base, streaming.

    UserError if there is no frame to be had; what ends early is used as far as it goes, and `complain` is told.
    """
    import av
    last, offset, count, problem = None, 0, 0, "it ends early"
    try:
        with av.open(os.fspath(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path} has no video in it")
            stream = container.streams.video[0]
            base, rate = stream.time_base, stream.average_rate or 25
            expected = stream.frames or float((container.duration or 0) / av.time_base * rate)
            for frame in container.decode(stream):
                pts = frame.pts if frame.pts is None else frame.pts + offset
                if pts is None or (last is not None and pts <= last):  # every frame needs a time of its own
                    following = 0 if last is None else last + max(1, round(1 / (rate * base)))
                    if pts is not None and (last - pts) * base > 1:    # the clock started anew: it goes on from here
                        offset += following - pts
                    pts = following
                frame.pts, frame.time_base = pts, base
                last, count = pts, count + 1
                yield frame
    except (av.FFmpegError, OSError) as e:
        problem = e.strerror or str(e)
        if not count:
            raise UserError(f"no file {path}" if not os.path.exists(path) else f"{path} is not a video that can be read ({problem})") from None
    if not count:
        raise UserError(f"{path} is a video without a frame that can be read")
    if count < 0.95 * expected - 1 or problem != "it ends early":  # containers' own counts are a little off at times
        complain(f"{path}: only {count} of about {expected:.0f} frames could be read ({problem})")


def count_frames(path):
    """How many frames a video has, without decoding it; 0 if it cannot be read."""
    import av
    try:
        with av.open(os.fspath(path)) as container:
            return sum(packet.size > 0 for packet in container.demux(video=0))
    except (av.FFmpegError, OSError, IndexError):
        return 0


def evenly(items, n):
    """At most n of the items, evenly spread from the first to the last."""
    return items if len(items) <= n else [items[k] for k in np.linspace(0, len(items) - 1, n).round().astype(int)]


def to_rgb(frame):
    """av.VideoFrame -> uint8 (H, W, 3), upright: phones store the rotation beside the pixels."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))


class Track(NamedTuple):
    """The landmarks of a video, in pixels of its upright frames; times are pts * time_base[0] / time_base[1] seconds."""
    points: np.ndarray      # (n, 68, 2) float32; a frame without a face repeats the face before it, or the first one
    found: np.ndarray       # (n,) bool
    pts: np.ndarray         # (n,) int64
    time_base: np.ndarray   # (2,) int64
    detector: str           # fan | dlib

    def seconds(self):
        return self.pts * (self.time_base[0] / self.time_base[1])

    def in_crops(self, size):
        """The landmarks in the pixels of a steady size x size crop, (n, 68, 2)."""
        return to_crop(self.points, steady_boxes(self.points, self.seconds()), size)


def track_video(path, detect, detector, keep=lambda k: True, progress=False, complain=warn):
    """Landmarks of those frames k of a video for which keep(k). UserError if no face is in any of them."""
    points, found, pts, frames = array("f"), array("b"), array("q"), read_video(path, complain)  # an object a frame would fragment memory
    frames = chain([next(frames)], frames)  # what cannot be read is refused before a progress bar is drawn
    for k, frame in enumerate(tqdm(frames, "landmarks", unit=" frames", disable=not progress)):
        if keep(k):
            face = detect(to_rgb(frame))
            found.append(face is not None)
            points.frombytes(np.zeros((68, 2), np.float32).tobytes() if face is None else face.tobytes())
            pts.append(frame.pts)
    found, points = np.array(found, bool), np.frombuffer(points, np.float32).reshape(-1, 68, 2)
    if not found.any():
        raise UserError(f"no face found in any of the {len(points)} frames of {path}")
    before = np.maximum.accumulate(np.where(found, np.arange(len(points)), np.argmax(found)))
    base = frame.time_base
    return Track(points[before], found, np.array(pts, np.int64),
                 np.array([base.numerator, base.denominator], np.int64), detector)


def faces_in(path, detect, detector, size, max_frames=0, complain=warn):
    """Yield (crop uint8 (size, size, 3), points (68, 2) in the crop) of a photo, or of a clip's frames that show a face.

    max_frames: at most so many frames of a clip, evenly spread; 0: all. UserError where no face is found.
    """
    if Path(path).suffix.lower() not in CLIPS:
        image = read_photo(path)
        points = detect(image)
        if points is None:
            raise UserError(f"no face found in {path}; if there is one, cut the picture closer to it")
        box = inside(face_box(points), image)
        yield crop(image, box, size), to_crop(points, box, size)
        return
    count = count_frames(path) if max_frames else 0
    chosen = set(evenly(range(count), max_frames)) if count > max_frames else range(sys.maxsize)
    track = track_video(path, detect, detector, lambda k: k in chosen, complain=complain)
    boxes = steady_boxes(track.points, track.seconds())
    kept = (frame for k, frame in enumerate(read_video(path, lambda message: None)) if k in chosen)
    for frame, box, points, found in zip(kept, boxes, track.points, track.found):
        if found:
            image = to_rgb(frame)
            box = inside(box, image)
            yield crop(image, box, size), to_crop(points, box, size)


# ----------------------------------------------------------------------------------- preparing a folder

def find_sequences(root):
    """-> {name: [files]} of the sequences below root, and the names of folders that hold neither clips nor photos."""
    sequences, empty = {}, []
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders.sort()
        files = [Path(folder, n) for n in sorted(names) if Path(n).suffix.lower() in PHOTOS | CLIPS]
        name = os.path.relpath(folder, root)
        if name == ".":
            clips = [f for f in files if f.suffix.lower() in CLIPS]
            sequences |= {f.name: [f] for f in clips}
            files, name = [f for f in files if f not in clips], "_photos"
        elif not files and not subfolders:
            empty.append(name)
        if files:
            sequences[name] = files
    return sequences, empty


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
            for face, points in faces_in(file, _detect, kind, size, max_frames // len(files), problems.append):
                buffer = io.BytesIO()
                Image.fromarray(face).save(buffer, "JPEG", quality=95, subsampling=0)
                jpegs.append(torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8))
                landmarks.append(torch.from_numpy(points))
        except UserError as e:
            problems.append(str(e))
        except Exception as e:  # one odd file among a million must not stop the rest; it is named in the summary
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
        raise UserError(f"no folder {videos}: name the one that holds the videos or photos with --videos DIR")
    sequences, empty = find_sequences(videos)
    if not sequences:
        raise UserError(f"{videos} holds neither videos nor photos")
    there = PreparedVideos(out) if any(Path(out).rglob("*.pt")) else None
    if there and (there.image_size, there.detector) != (size, kind):
        raise UserError(f"{out} was prepared with --image-size {there.image_size} --landmarks {there.detector}: "
                        "name the same, or another --out")
    todo = {name: files for name, files in sequences.items() if not os.path.exists(f"{out}/{name}.pt")}
    landmark_detector(kind)  # fails here, before the workers start, if it cannot be built
    done, frames, problems, stop = 0, 0, [f"{name}: no videos or photos in this folder" for name in empty], None
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (kind,)) as pool:
        jobs = [pool.submit(_prepare, files, f"{out}/{name}.pt", kind, size, max_frames) for name, files in todo.items()]
        try:
            for job in tqdm(as_completed(jobs), "preparing", len(jobs), unit=" sequences"):
                count, what = job.result()
                done, frames, problems = done + (count > 0), frames + count, problems + what
        except BrokenProcessPool:
            stop = UserError("a worker process died, perhaps for want of memory: run it again to go on, with fewer --workers")
        except UserError as e:  # it cannot be written
            stop = e
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    print(f"{out}: {done} sequences with {frames} frames prepared, {len(sequences) - len(todo)} were there already")
    if problems:
        print(f"not used, or not all of it ({len(problems)}):", *sorted(problems), sep="\n  ")
    if stop or (done == 0 and len(sequences) == len(todo)):
        raise stop or UserError(f"nothing in {videos} could be used")


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


class ToyHeads:
    """Drawn heads with known landmarks, for learning and tests: needs no files, no detector and no download.

    Head i has a face shape, skin, hair, eyes and a background of its own; its frame t a pose: yaw, pitch, roll, blink,
    mouth. The same interface as PreparedVideos: `heads` heads from number `first` on, each with 64 frames.
    """
    detector, name = "dlib", "toy"

    def __init__(self, heads, image_size=64, first=0):
        self.heads, self.image_size, self.first = heads, image_size, first

    def __len__(self):
        return self.heads

    def count(self, i):
        return 64

    def load(self, i, choose):
        pairs = [self.draw(self.first + i, t) for t in choose(self.count(i))]
        return np.stack([f for f, _ in pairs]), np.stack([p for _, p in pairs])

    def draw(self, i, t):
        """Frame t of head i -> uint8 (S, S, 3), points (68, 2) in pixels."""
        who, pose = np.random.default_rng((1, i)), np.random.default_rng((2, i, t))
        width, chin, eye, gap, lip, fringe, long = who.uniform((.85, 1.0, .13, .38, .05, -.2, .0), (1.1, 1.3, .19, .46, .1, .25, 1.6))
        skin = np.array((255, 214, 180)) * who.uniform(.35, 1) * who.uniform(.92, 1.08, 3)
        hair, iris, wall, shirt = who.uniform(15, 200, 3), who.uniform(20, 170, 3), who.uniform(40, 240, (2, 3)), who.uniform(20, 235, 3)
        yaw, pitch, roll = pose.uniform((-.6, -.25, -.2), (.6, .25, .2))
        blink, smile, mouth, shift = pose.uniform() ** .5, pose.uniform(-.05, .06), max(0, pose.uniform(-.1, .25)), pose.uniform(-.12, .12, 2)

        # the 68 points in 3D: x to the right of the picture, y down, z towards the viewer; the jaw is about 1 wide
        def arc(n, x, y, z):  # over the jaw (y > 0) or the forehead (y < 0), from ear to ear; z: how far the middle stands out
            a = np.linspace(-1.6, 1.6, n)
            return np.stack([x * np.sin(a), y * np.cos(a) - .05, z * np.cos(a) - .7], 1)

        def ring(n, w, h, drop):  # lips, from the left corner over the upper one and back; drop: how far the jaw is open
            c = np.linspace(np.pi, -np.pi, n, endpoint=False)
            y = .66 - (h + drop * (np.sin(c) < 0)) * np.sin(c) - smile * np.cos(c) ** 2
            return np.stack([w * np.cos(c), y, .25 - .15 * np.cos(c) ** 2], 1)

        b, c, flip = np.linspace(0, 1, 5), np.radians([180, 120, 60, 0, -60, -120]), (-1, 1, 1)
        brow = np.stack([-.72 + .5 * b, -.42 - .1 * np.sin(np.pi * b), .1 + .1 * b], 1)
        bridge = np.linspace((0, -.2, .2), (0, .22, .55), 4)
        base = np.stack([-.2 + .4 * b, .34 + .05 * np.sin(np.pi * b), .25 + .1 * np.sin(np.pi * b)], 1)
        lid = np.stack([-gap + eye * np.cos(c), -.18 - .55 * eye * blink * np.sin(c), .1 + 0 * c], 1)
        points = np.concatenate([arc(17, width, chin, .8), brow, (brow * flip)[::-1], bridge, base, lid,
                                 (lid * flip)[[3, 2, 1, 0, 5, 4]], ring(12, .32, lip, mouth), ring(8, .26, .3 * lip, mouth)])

        (cy, cp, cr), (sy, sp, sr) = np.cos((yaw, pitch, roll)), np.sin((yaw, pitch, roll))
        turn = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]]) @ [[1, 0, 0], [0, cp, -sp], [0, sp, cp]] @ [[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]]
        S = 2 * self.image_size                                                 # drawn twice as large, then averaged
        still = lambda p: np.asarray(p) * (S / 3.9) + S / 2                     # neck and shirt do not turn with the head
        place = lambda p: still((p @ turn.T)[:, :2] + shift + (0, .12))
        image = Image.new("RGB", (S, S), tuple(wall[0].astype(int)))
        pen, k = ImageDraw.Draw(image), np.linspace(0, 2 * np.pi, 24)
        fill = lambda p, colour: pen.polygon([tuple(q) for q in p], fill=tuple(np.clip(colour, 0, 255).astype(int)))
        line = lambda p, colour, width: pen.line([tuple(q) for q in p], fill=tuple(colour.astype(int)), width=width)
        blob = lambda x, y, z, rx, ry: place(np.stack([x + rx * np.cos(k), y + ry * np.sin(k), z + 0 * k], 1))
        fill([(0, S * .62), (S, S * .5), (S, S), (0, S)], wall[1])
        fill(blob(0, .1 + long / 2, -.9, width * 1.15, 1.25 + long / 2), hair * .8)                 # the hair behind
        fill(still([(-.45, .6), (.45, .6), (.5, 2), (-.5, 2)]), skin * .8)                          # neck
        fill(still([(-1.6, 2), (-1.2, 1.55), (-.45, 1.35), (0, 1.5), (.45, 1.35), (1.2, 1.55), (1.6, 2)]), shirt)
        q, skull = place(points), place(arc(15, width, -1.1, .6))
        fill(np.concatenate([q[:17], skull[::-1]]), skin)
        fill(np.concatenate([skull + (skull - S / 2) * .12, place(arc(15, width, fringe - .75, .75))[::-1]]), hair)
        for outline, x in ((q[36:42], -gap), (q[42:48], gap)):
            fill(outline, (245, 245, 245))
            if blink > .35:
                fill(blob(x, -.18, .1, eye * .4, eye * .5 * blink), iris)
        line(q[17:22], hair * .7, S // 40), line(q[22:27], hair * .7, S // 40)
        line(q[[27, 30, 33]], skin * .8, S // 60), line(q[31:36], skin * .65, S // 60)
        fill(q[48:60], skin * (.8, .5, .5))
        fill(q[60:68], (60, 15, 20))
        return np.asarray(image.reduce(2)), ((q + .5) / 2 - .5).astype(np.float32)


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
