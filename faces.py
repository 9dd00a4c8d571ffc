"""Faces in pictures: the detectors of the 68 landmarks, the one crop of training, photos and drivers, and photos.

    detect = landmark_detector("dlib")
    points = detect(read_photo("x.jpg"))        # (68, 2), or None
"""
import os
import re
import sys
import warnings
from importlib.util import find_spec

import numpy as np
import torch
from PIL import Image, ImageOps

from files import UserError

# ------------------------------------------------------------------------------------------- detectors

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


# ----------------------------------------------------------------------------------------------- photos

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
