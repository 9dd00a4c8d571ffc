"""Ours: episodes are changed at random, so that little data goes further. The paper does without."""
import numpy as np
from PIL import Image

from media.crops import fill_unknown
from media.faces import MIRRORED


def augment(rng, frames, points, still):
    """Frames uint8 (k, S, S, 3) of an episode and their landmarks (k, 68, 2) -> the same, changed.

    still: all k frames are the same photo, which is turned into a short video.
    """
    if still:
        frames, points = warp(rng, frames, points)
    return recolour_and_mirror(rng, frames, points)


def warp(rng, frames, points):
    """Turn, scale, shear and shift each frame by itself: a photo becomes a short video."""
    S, warped, moved = frames.shape[1], [], []
    whole = Image.new("L", (S, S), 255)
    for frame, p in zip(frames, points):
        # result -> source, about the middle
        A = np.eye(2) + rng.uniform(-.15, .15, (2, 2))
        shift = (np.eye(2) - A) @ (S / 2, S / 2) + rng.uniform(-.06, .06, 2) * S
        (a, b), (c, d) = A
        coefficients = (a, b, shift[0], c, d, shift[1])
        image = Image.fromarray(frame).transform((S, S), Image.AFFINE, coefficients, Image.BICUBIC)
        known = np.asarray(whole.transform((S, S), Image.AFFINE, coefficients)) > 0
        warped.append(fill_unknown(np.asarray(image), known))
        moved.append((p + 0.5 - shift) @ np.linalg.inv(A).T - 0.5)
    return np.stack(warped), np.stack(moved)


def recolour_and_mirror(rng, frames, points):
    """Gamma and tint, the same for all frames; half of the episodes mirrored."""
    gamma = 2 ** (rng.uniform(-.5, .5) + rng.uniform(-.15, .15, 3))
    levels = np.linspace(0, 1, 256)[:, None]
    table = (255 * levels ** gamma).round().astype(np.uint8)    # (256, 3)
    frames = table[frames, np.arange(3)]
    if rng.random() < .5:
        frames, points = frames[:, :, ::-1], points[:, MIRRORED]
        x = frames.shape[2] - 1 - points[..., 0]
        points = np.stack([x, points[..., 1]], axis=-1)
    return frames, points
