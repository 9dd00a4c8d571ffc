"""Faces in pictures: the detectors of the 68 landmarks, and which of several faces is meant.

    detect = landmark_detector("dlib")
    points = detect(read_photo("x.jpg"))        # (68, 2), or None
"""
import os
import re
import sys
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from runtime.files import UserError

SURE = 0.5      # a face of this score is hardly ever a false one (dlib's scale: most faces have 1 to 3)
NEARLY = 0.4    # of the surest one's score: faces that the detector is nearly as sure of
CUT_WIDTH = 400     # pixels of a face's box in the enlarged copy that its landmarks are predicted on

MIRRORED = np.r_[                                   # which point a mirrored face has in each place
    16:-1:-1, 26:16:-1,                             # jaw, brows
    27:31, 35:30:-1,                                # nose
    45:41:-1, 47, 46, 39:35:-1, 41, 40,             # eyes
    54:47:-1, 59:54:-1, 64:59:-1, 67:64:-1]         # outer lips, inner lips


# ------------------------------------------------------------------------------------------- detectors

class Face(NamedTuple):
    box: tuple          # left, top, right, bottom in pixels of the picture
    score: float        # how sure the detector is: above 0; SURE or more is good
    side: int = 0       # the longer side of the shrunken copy that it was found on

    def width(self):
        return self.box[2] - self.box[0]

    def centre(self):
        left, top, right, bottom = self.box
        return np.array([(left + right) / 2, (top + bottom) / 2])


class Detector:
    """detect(image uint8 (H, W, 3)) -> points (68, 2) float32 of the face that is meant, or None.

    Build it once: that takes a second or more.
    """

    kind: str           # fan | dlib: landmarks of one kind are not those of the other
    sides = (0,)        # of the copies that faces() looks at; one that has no choice gives a 0
    margin: float       # how much around a face's box predict() looks at, in widths of the box

    def __call__(self, image):
        faces = self.faces(image)
        return self.landmarks(image, which_face(faces, image)) if faces else None

    def faces(self, image, sides=None):
        """image uint8 (H, W, 3) -> [Face], the surest first.

        sides: of the shrunken copies to look at one by one, until a face is sure; None: all of self.sides.
        """
        raise NotImplementedError

    def landmarks(self, image, face):
        """-> points (68, 2) float32 of one of the faces, with sub-pixel positions.

        Both predictors return whole pixels of the picture they are given, and dlib's reads pixels without
        interpolation. So they are given an enlarged copy of the face, and the points are mapped back.
        """
        left, top, right, bottom = face.box
        width, margin = right - left, self.margin * (right - left)
        x0, y0 = max(0, int(left - margin)), max(0, int(top - margin))
        cut = image[y0:int(bottom + margin) + 1, x0:int(right + margin) + 1]
        large = np.asarray(rescaled(cut, max(1, CUT_WIDTH / width)))
        scale = np.array(large.shape[1::-1]) / cut.shape[1::-1]         # of x and y: sizes are rounded
        corners = (np.array([[left, top], [right, bottom]]) + 0.5 - (x0, y0)) * scale - 0.5
        points = self.predict(large, corners.ravel())
        return ((points + 0.5) / scale - 0.5 + (x0, y0)).astype(np.float32)

    def predict(self, image, box):
        """-> points (68, 2) of the face in this box (left, top, right, bottom), in whole pixels."""
        raise NotImplementedError


def landmark_detector(kind):
    """-> a Detector.

    kind "fan": face-alignment, the paper's detector [7].
    kind "dlib": the same 68 points, offline and fast on a CPU.
    """
    return {"fan": FanDetector, "dlib": DlibDetector}[kind]()


def dlib_model(name):
    """The path of a file in face_recognition_models, which cannot be imported under current setuptools."""
    return os.path.join(find_spec("face_recognition_models").submodule_search_locations[0], "models", name)


class DlibDetector(Detector):
    kind = "dlib"
    sides = (256, 512, 1024)    # it sees faces of 80 pixels and more; small copies are quick: first
    margin = 0.4

    def __init__(self):
        import dlib
        self.rectangle = dlib.rectangle
        self.detector = dlib.get_frontal_face_detector()
        self.predictor = dlib.shape_predictor(dlib_model("shape_predictor_68_face_landmarks.dat"))

    def faces(self, image, sides=None):
        found = []
        for side in sides or self.sides:
            found = without_doubles(found + self.faces_at(image, side))
            a_choice = len(found) > 1 and side < 512        # worth a second look
            if found and found[0].score >= SURE and not a_choice:
                break
        return found

    def faces_at(self, image, side):
        scale = side / max(image.shape[:2])
        boxes, scores, _ = self.detector.run(np.asarray(rescaled(image, scale)), 0, 0.0)
        edges = [(b.left(), b.top(), b.right(), b.bottom()) for b in boxes]
        return [Face(tuple(v / scale for v in box), score, side) for box, score in zip(edges, scores)]

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
        try:    # compile=False: the default spends minutes compiling on a CPU
            kind = face_alignment.LandmarksType.TWO_D
            self.fan = face_alignment.FaceAlignment(kind, device=device, compile=False)
        except (OSError, RuntimeError) as e:
            raise no_fan_weights(e) from None

    def faces(self, image, sides=None):
        scale = self.scale(image)
        boxes = self.fan.face_detector.detect_from_image(np.asarray(rescaled(image, scale)))
        # its scores are probabilities from 0.5 to 1; 0 to 2 here: SURE then means as much as with dlib
        found = [Face(tuple(float(v) / scale for v in box[:4]), 4 * float(box[4]) - 2) for box in boxes]
        return without_doubles(found)

    def predict(self, image, box):
        points = self.fan.get_landmarks_from_image(image, detected_faces=[np.array([*box, 1.0])])
        return points[0][:, :2]

    @staticmethod
    def scale(image):
        return min(1, 640 / max(image.shape[:2]))   # its face detector takes minutes over a whole photo


def download_fan_weights():
    """Once; the library would not check the hash that the names carry."""
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
    except (OSError, RuntimeError) as e:  # no network, a wrong hash
        raise no_fan_weights(e) from None


def fan_folder():
    return os.path.join(torch.hub.get_dir(), "checkpoints")


def no_fan_weights(error):
    return UserError(f"cannot get the weights of face-alignment ({error}): "
                     f"put them into {fan_folder()} yourself, or prepare with data.py --landmarks dlib")


def rescaled(image, scale):
    """uint8 (H, W, 3) -> a PIL picture, `scale` times as large."""
    height, width = image.shape[:2]
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return Image.fromarray(image).resize(size, Image.BILINEAR)


def five_points(points):
    """Landmarks (..., 68, 2) -> (..., 5, 2): the person's right eye, left eye, nose, mouth's corners."""
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


def without_doubles(faces):
    """[Face], the surest first, each face once: on copies of several sizes it is found several times."""
    kept = []
    for face in sorted(faces, key=lambda f: f.score, reverse=True):
        if all(overlap(face.box, other.box) < 0.3 for other in kept):
            kept.append(face)
    return kept


def which_face(faces, image):
    """The face that is meant: the one the detector is surest of.

    Size and place decide among those it is nearly as sure of. Of 134 photos of LFW with several boxes, 2 then
    show another than the central person.
    """
    middle = np.array(image.shape[1::-1]) / 2
    surest = max(face.score for face in faces)

    def merit(face):
        distance = np.linalg.norm((face.centre() - middle) / middle)     # 0 to 1 along an axis
        return face.width() * np.exp(-distance) * face.score ** 0.5

    return max((face for face in faces if face.score >= NEARLY * surest), key=merit)


def words_on_choice(faces, chosen, path):
    """One line where there was a real choice, else None."""
    sure = [face for face in faces if face is chosen or face.score >= SURE]
    if len(sure) < 2:
        return None
    other = "the other" if len(sure) == 2 else "another"
    place = where(chosen, sure)
    return f"{len(sure)} faces in {path}: took the one {place}; crop the photo to choose {other}"


def where(face, faces):
    """"on the left", "in the middle" and so on: the place of one of the faces among them."""
    centres = np.array([f.centre() for f in faces])
    axis = int(np.argmax(np.ptp(centres, axis=0)))      # the one along which they lie apart
    place, places = face.centre()[axis], centres[:, axis]
    if place <= places.min():
        return ("on the left", "at the top")[axis]
    if place >= places.max():
        return ("on the right", "at the bottom")[axis]
    return "in the middle"


TURNED = {1: "lies on its side: turned it to the left", 2: "is upside down: turned it round",
          3: "lies on its side: turned it to the right"}


def upright(image, detector):
    """-> (image, [Face], k): one that lies on its side or head is turned by k times 90 degrees (np.rot90)."""
    best = image, detector.faces(image), 0
    sure = best[1][0].score if best[1] else 0.0
    if sure >= SURE:
        return best
    for k in (1, 3, 2):
        turned = np.ascontiguousarray(np.rot90(image, k))
        faces = detector.faces(turned)
        if faces and faces[0].score >= sure + SURE:     # clearly surer than as it lies
            best, sure = (turned, faces, k), faces[0].score
    return best
