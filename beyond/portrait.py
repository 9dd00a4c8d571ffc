"""Ours: warnings about photos that will not look good, and grey results from grey photos."""
import numpy as np
import torch

from media.crops import MADE_UP
from media.folders import Photo
from media.recognition import STRANGERS, dlib_recognition
from runtime.files import warn

SMALL_FACE = 60         # the width of a face in pixels below which the result is blurred
GREY = 4                # of 255 levels between the channels of a photo; LFW's colour photos have 14 or more
LUMINANCE = (0.299, 0.587, 0.114)       # the weights of red, green and blue
SHUT = 0.145            # a smaller eye_opening(), as in 1.8 % of LFW's photos, counts as shut eyes


def eye_opening(points):
    """The distance of the lids in widths of the eye, for the more open eye: points (..., 68, 2) -> (...)."""
    distance = lambda a, b: np.linalg.norm(points[..., a, :] - points[..., b, :], axis=-1)
    lids = distance([37, 43], [41, 47]) + distance([38, 44], [40, 46])
    return (lids / 2 / distance([36, 42], [39, 45])).max(-1)


def open_eyes_first(faces):
    """The [FaceCrop] of a photo or a clip -> Photo, which begins with a frame in which the eyes are open."""
    points = np.stack([face.points for face in faces])
    opening = eye_opening(points)
    first = np.argmax(opening >= max(SHUT, 0.8 * np.median(opening)))      # 0 if there are none
    order = [first, *range(first), *range(first + 1, len(faces))]
    return Photo(np.stack([faces[k].image for k in order]), points[order])


def warn_of_quality(path, faces):
    """Warn if the photo or clip will not make a good result. faces: what faces_in(path) yields."""
    made_up, width = (np.median([getattr(face, name) for face in faces]) for name in ("made_up", "width"))
    if made_up > MADE_UP:
        warn(f"{path} is cut tight: {made_up:.0%} of the crop lies outside the picture and had to be made "
             "up; a photo with more space around the head looks better")
    if width < SMALL_FACE:
        warn(f"the face in {path} is only {width:.0f} pixels wide, so the result will be blurred: a "
             "larger photo looks better")
    if np.median(eye_opening(np.stack([face.points for face in faces]))) < SHUT:
        warn(f"the eyes in {path} are shut, or nearly so; a photo with open eyes looks better")


def warn_of_several_people(paths, photos):
    """Compare the first frames of these [Photo] by dlib's recognition network, and warn of strangers."""
    vector = dlib_recognition()
    first, *others = (vector(photo.frames[0], photo.points[0]) for photo in photos)
    strangers = [path for path, v in zip(paths[1:], others) if v @ first < STRANGERS]
    if strangers:
        names = ", ".join(map(str, strangers))
        warn(f"{names} may not show the same person as {paths[0]}, but all are learned as one: leave out "
             "photos of others")


def are_grey(photos):
    """Whether all of these [Photo] are black and white, up to the artefacts of JPEG compression."""
    return all(np.ptp(photo.frames, axis=3).mean() < GREY for photo in photos)


@torch.no_grad()
def make_grey(G):
    """Change a folded G so that it draws the luminance of its pictures in all three channels."""
    for part in (G.to_rgb.weight, G.to_rgb.bias):       # (3, C, 3, 3), (3,)
        part[:] = torch.tensordot(part.new_tensor(LUMINANCE), part, 1)
