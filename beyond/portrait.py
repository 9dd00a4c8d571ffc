"""Ours: how well a user's photos suit, in words to the user; and grey photos, which make a grey person."""
import numpy as np
import torch

from beyond.recognition import STRANGERS, dlib_recognition
from media.crops import MADE_UP
from media.folders import Photo
from runtime.files import warn

SMALL_FACE = 60         # pixels; a narrower face makes a blurred result
GREY = 4                # levels of 255 between a photo's channels: colours have 14 and more, on LFW
LUMINANCE = (0.299, 0.587, 0.114)       # of red, green and blue
SHUT = 0.145            # of eye_opening(): below it lie 1.8 % of LFW's photos, nearly all shut or squinting


def eye_opening(points):
    """How far the lids are apart, in widths of the eye, of the more open one: (..., 68, 2) -> (...)."""
    distance = lambda a, b: np.linalg.norm(points[..., a, :] - points[..., b, :], axis=-1)
    lids = distance([37, 43], [41, 47]) + distance([38, 44], [40, 46])
    return (lids / 2 / distance([36, 42], [39, 45])).max(-1)


def open_eyes_first(shots):
    """[Shot] of a photo or a clip -> Photo. It begins with a frame in which the person does not blink."""
    points = np.stack([shot.points for shot in shots])
    opening = eye_opening(points)
    first = np.argmax(opening >= max(SHUT, 0.8 * np.median(opening)))      # 0 if there is none
    order = [first, *range(first), *range(first + 1, len(shots))]
    return Photo(np.stack([shots[k].image for k in order]), points[order])


def warn_of_quality(path, shots):
    """shots: of faces_in(path)."""
    made_up, width = (np.median([getattr(shot, name) for shot in shots]) for name in ("made_up", "width"))
    if made_up > MADE_UP:
        warn(f"{path} is cut tight: {made_up:.0%} of what is learned had to be made up; a photo with more "
             "around the head looks better")
    if width < SMALL_FACE:
        warn(f"the face in {path} is only {width:.0f} pixels wide, so the result will be blurred")
    if np.median(eye_opening(np.stack([shot.points for shot in shots]))) < SHUT:
        warn(f"the eyes in {path} are shut, or nearly so; a photo with open eyes looks better")


def warn_of_several_people(paths, photos):
    """Judged by dlib's network on the first frame of each Photo."""
    vector = dlib_recognition()
    first, *others = (vector(photo.frames[0], photo.points[0]) for photo in photos)
    strangers = [path for path, v in zip(paths[1:], others) if v @ first < STRANGERS]
    if strangers:
        names = ", ".join(map(str, strangers))
        warn(f"{names} may show somebody else than {paths[0]}: all are learned as one person")


def are_grey(photos):
    """Whether all of these [Photo] are black and white, but for the traces of a JPEG's compression."""
    return all(np.ptp(photo.frames, axis=3).mean() < GREY for photo in photos)


@torch.no_grad()
def make_grey(G):
    """Let a folded G draw the luminance of what it drew, with all three channels alike."""
    for part in (G.to_rgb.weight, G.to_rgb.bias):       # (3, C, 3, 3), (3,)
        part[:] = torch.tensordot(part.new_tensor(LUMINANCE), part, 1)
