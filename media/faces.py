"""Faces in pictures: detectors of faces and of their 68 landmarks, and which of several faces to use.

    detect = landmark_detector("dlib")
    points = detect(read_photo("x.jpg"))        # (68, 2), or None without a face
"""
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from runtime.files import UserError

SURE = 0.5          # faces with at least this score are hardly ever false (on dlib's scale, most have 1 to 3)
NEARLY = 0.4        # faces with less than this share of the best score are not candidates
CUT_WIDTH = 400     # landmarks are predicted on a copy in which the face's box has at least this width

MIRRORED = np.r_[       # points[MIRRORED], with x mirrored, are the landmarks of the mirrored picture
    16:-1:-1, 26:16:-1,                             # jaw, brows
    27:31, 35:30:-1,                                # nose
    45:41:-1, 47, 46, 39:35:-1, 41, 40,             # eyes
    54:47:-1, 59:54:-1, 64:59:-1, 67:64:-1]         # outer lips, inner lips


# ------------------------------------------------------------------------------------------- detectors

class Face(NamedTuple):
    """A face that a detector has found."""
    box: tuple          # left, top, right, bottom in pixels of the picture
    score: float        # the detector's confidence, above 0
    side: int = 0       # the longer side in pixels of the scaled copy on which it was found

    def width(self):
        return self.box[2] - self.box[0]

    def centre(self):
        left, top, right, bottom = self.box
        return np.array([(left + right) / 2, (top + bottom) / 2])


class Detector:
    """detect(image uint8 (H, W, 3)) -> landmarks (68, 2) float32 of the face to use, or None without a face.

    Use one object for all pictures, because building it takes a second or more.
    """

    kind: str           # "fan" or "dlib"; a network that was trained with one must be given the same
    sides = (0,)        # the sizes (longer side) of the copies that faces() searches; (0,): the picture
    margin: float       # how much of the surroundings predict() is given, in widths of the face's box

    def __call__(self, image):
        faces = self.faces(image)
        return self.landmarks(image, which_face(faces, image)) if faces else None

    def faces(self, image, sides=None):
        """image uint8 (H, W, 3) -> [Face], the highest score first.

        sides: the sizes of the scaled copies to search, one after the other, until the detector is sure of a
        face; None means self.sides.
        """
        raise NotImplementedError

    def begin(self, image, side):
        """Announce a call of faces(image, (side,)), so that the search can start in a thread."""

    def landmarks(self, image, face):
        """-> landmarks (68, 2) float32 of one of the faces, in pixels of the image, with sub-pixel positions.

        Both predictors return whole pixels, and dlib's reads its input without interpolation. They are
        therefore given an enlarged copy of the face, and their points are mapped back.
        """
        left, top, right, bottom = face.box
        width, margin = right - left, self.margin * (right - left)
        x0, y0 = max(0, int(left - margin)), max(0, int(top - margin))
        cut = image[y0:int(bottom + margin) + 1, x0:int(right + margin) + 1]
        large = rescaled(cut, max(1, CUT_WIDTH / width))
        scale = np.array(large.shape[1::-1]) / cut.shape[1::-1]     # x and y can differ a little by rounding
        corners = (np.array([[left, top], [right, bottom]]) + 0.5 - (x0, y0)) * scale - 0.5
        points = self.predict(large, corners.ravel())
        return ((points + 0.5) / scale - 0.5 + (x0, y0)).astype(np.float32)

    def predict(self, image, box):
        """-> points (68, 2), in whole pixels, of the face in this box (left, top, right, bottom)."""
        raise NotImplementedError


def landmark_detector(kind):
    """-> a Detector.

    kind "fan": face-alignment, the paper's detector [7]. Its weights are downloaded once; raises UserError if
    that fails.  kind "dlib": dlib's detector of the same 68 points, offline and fast on a CPU.
    """
    return {"fan": FanDetector, "dlib": DlibDetector}[kind]()


def dlib_model(name):
    """The path of a file of face_recognition_models, which cannot be imported with current setuptools."""
    return os.path.join(find_spec("face_recognition_models").submodule_search_locations[0], "models", name)


class DlibDetector(Detector):
    kind = "dlib"
    sides = (256, 512, 1024)    # small copies first, as they are fast; it finds faces of 80 pixels or more
    margin = 0.4

    def __init__(self):
        import dlib
        self.rectangle = dlib.rectangle
        self.detector = dlib.get_frontal_face_detector()
        self.predictor = dlib.shape_predictor(dlib_model("shape_predictor_68_face_landmarks.dat"))
        self.thread = ThreadPoolExecutor(1)     # of self.detector, which can search one picture at a time
        self.begun = None, 0, None              # the image and side of begin(), and their result to come

    def faces(self, image, sides=None):
        found = []
        for side in sides or self.sides:
            found = without_duplicates(found + self.faces_at(image, side))
            choice = len(found) > 1 and side < 512      # then a larger copy can tell which one is better
            if found and found[0].score >= SURE and not choice:
                break
        return found

    def begin(self, image, side):
        self.begun = image, side, self.search(image, side)

    def faces_at(self, image, side):
        """-> [Face] on a copy of the image whose longer side has this many pixels."""
        begun_image, begun_side, search = self.begun
        if image is not begun_image or side != begun_side:
            search = self.search(image, side)
        (boxes, scores, _), scale = search.result(), side / max(image.shape[:2])
        edges = [(b.left(), b.top(), b.right(), b.bottom()) for b in boxes]
        return [Face(tuple(v / scale for v in box), score, side) for box, score in zip(edges, scores)]

    def search(self, image, side):
        """-> a Future of what dlib's detector returns for a copy whose longer side has this many pixels."""
        # The copy is made here, because a second thread that uses torch would slow down fine-tuning later:
        # OpenMP keeps the threads of both, and if there are more than cores, it puts waiting ones to sleep.
        copy = rescaled(image, side / max(image.shape[:2]))
        return self.thread.submit(self.detector.run, copy, 0, 0.0)

    def predict(self, image, box):
        shape = self.predictor(image, self.rectangle(*(round(v) for v in box)))
        return np.array([(p.x, p.y) for p in shape.parts()])


class FanDetector(Detector):
    kind = "fan"
    margin = 0.8

    def __init__(self):
        import face_alignment
        download_fan_weights()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:    # compile=False, because compiling takes minutes on a CPU
            kind = face_alignment.LandmarksType.TWO_D
            self.fan = face_alignment.FaceAlignment(kind, device=device, compile=False)
        except (OSError, RuntimeError) as e:
            raise no_fan_weights(e) from None

    def faces(self, image, sides=None):
        scale = self.scale(image)
        boxes = self.fan.face_detector.detect_from_image(rescaled(image, scale))
        # its scores are probabilities from 0.5 to 1, which become 0 to 2, so that SURE fits both detectors
        found = [Face(tuple(float(v) / scale for v in box[:4]), 4 * float(box[4]) - 2) for box in boxes]
        return without_duplicates(found)

    def predict(self, image, box):
        points = self.fan.get_landmarks_from_image(image, detected_faces=[np.array([*box, 1.0])])
        return points[0][:, :2]

    @staticmethod
    def scale(image):
        return min(1, 640 / max(image.shape[:2]))   # its face detector needs minutes for a large photo


def download_fan_weights():
    """Download face-alignment's weights if they are missing, and check the hashes that their names contain.

    The library itself would download them without this check.
    """
    import face_alignment
    from face_alignment.detection.sfd import sfd_detector
    folder = fan_folder()
    try:
        os.makedirs(folder, exist_ok=True)
        for url in (sfd_detector.models_urls["s3fd"], face_alignment.api.models_urls["2DFAN-4"]):
            path = os.path.join(folder, os.path.basename(url))
            if not os.path.exists(path):
                print(f"Downloading {url} to {path}", file=sys.stderr)
                published = re.search(r"-([0-9a-f]{8,})\.", url)
                torch.hub.download_url_to_file(url, path, hash_prefix=published and published[1])
    except (OSError, RuntimeError) as e:    # no network, or a wrong hash
        raise no_fan_weights(e) from None


def fan_folder():
    return os.path.join(torch.hub.get_dir(), "checkpoints")


def no_fan_weights(error):
    return UserError(f"cannot download or load the weights of face-alignment ({error}): put the files into "
                     f"{fan_folder()} yourself, or use dlib's landmarks (data.py --landmarks dlib)")


def rescaled(image, scale):
    """uint8 (H, W, 3) -> uint8 (scale H, scale W, 3), as by PIL's resize(), but in half the time."""
    size = [max(1, round(side * scale)) for side in image.shape[:2]]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)    # a second one would spin for a while afterwards, on the core that dlib needs
    x = torch.tensor(image)[None].movedim(-1, 1)                            # (1, 3, H, W), uint8
    x = F.interpolate(x, size=size, mode="bilinear", antialias=True)        # (1, 3, scale H, scale W)
    torch.set_num_threads(threads)
    return x.movedim(1, -1)[0].numpy()


def five_points(points):
    """Landmarks (..., 68, 2) -> (..., 5, 2): the person's right eye, left eye, nose, corners of the mouth."""
    eyes = [points[..., 36:42, :].mean(-2), points[..., 42:48, :].mean(-2)]
    return np.stack([*eyes, points[..., 30, :], points[..., 48, :], points[..., 54, :]], axis=-2)


# ------------------------------------------------------------------------------------------ which face

def overlap(a, b):
    """Intersection over union of two boxes (left, top, right, bottom)."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def without_duplicates(faces):
    """[Face] -> each face once, even if it was found on several copies, the highest score first."""
    kept = []
    for face in sorted(faces, key=lambda f: f.score, reverse=True):
        if all(overlap(face.box, other.box) < 0.3 for other in kept):
            kept.append(face)
    return kept


def which_face(faces, image):
    """-> the Face to use: among those with nearly the best score, a large one near the middle.

    In 134 photos of LFW in which several faces are found, it is the person in the middle in all but 2.
    """
    middle = np.array(image.shape[1::-1]) / 2
    surest = max(face.score for face in faces)

    def merit(face):
        distance = np.linalg.norm((face.centre() - middle) / middle)    # 1 at the middle of a border
        return face.width() * np.exp(-distance) * face.score ** 0.5

    return max((face for face in faces if face.score >= NEARLY * surest), key=merit)


def words_on_choice(faces, chosen, path):
    """-> a line for the user if the photo shows several faces that the detector is sure of, else None."""
    sure = [face for face in faces if face is chosen or face.score >= SURE]
    if len(sure) < 2:
        return None
    other = "the other" if len(sure) == 2 else "another"
    place = where(chosen, sure)
    return f"{len(sure)} faces in {path}: used the one {place}; crop the photo to use {other}"


def where(face, faces):
    """The place of a face among these faces in words, such as "on the left" or "in the middle"."""
    centres = np.array([f.centre() for f in faces])
    axis = int(np.argmax(np.ptp(centres, axis=0)))      # the axis along which they are farthest apart
    place, places = face.centre()[axis], centres[:, axis]
    if place <= places.min():
        return ("on the left", "at the top")[axis]
    if place >= places.max():
        return ("on the right", "at the bottom")[axis]
    return "in the middle"


TURNED = {1: "lies on its side, so it was rotated to the left",       # a line for each k of upright()
          2: "is upside down, so it was rotated by 180 degrees",
          3: "lies on its side, so it was rotated to the right"}


def upright(image, detector):
    """Rotate a photo that lies on its side or is upside down, judging by the faces in it.

    image uint8 (H, W, 3) -> np.rot90(image, k), the [Face] in it, and k.
    """
    best = image, detector.faces(image), 0
    sure = best[1][0].score if best[1] else 0.0
    if sure >= SURE:
        return best
    for k in (1, 3, 2):
        turned = np.ascontiguousarray(np.rot90(image, k))
        faces = detector.faces(turned)
        if faces and faces[0].score >= sure + SURE:     # clearly surer than without rotation
            best, sure = (turned, faces, k), faces[0].score
    return best
