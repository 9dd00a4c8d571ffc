"""Ours: adapt a driver's landmarks to the face of the person whom they drive (the source).

The paper feeds the driver's landmarks to G as they are, and names the limitation itself: "the lack of
landmark adaptation" leads to "a noticeable personality mismatch" when the driver is somebody else. This
module goes beyond the paper, with the linear 3-D face model of face3d.py. The model describes a face by
coefficients z, which are the sum of an identity (who somebody is) and an expression (what the face is
doing). The two can be separated because the model knows how z varies between people and how it varies
within one person. The source keeps its identity and takes over the driver's movements.
"""
from typing import NamedTuple

import numpy as np

from beyond.face3d import (LIDS, LIPS, LOWER, UPPER, Fit, chunks, down, fit, openings, project, rotation,
                           shape_openings, shapes)
from media.crops import face_box

CLIP_WEIGHT = 4                         # a clip of 4 or more frames counts as 4 independent photos
MAX_ROTATION = np.radians([50, 30])     # the yaw and pitch to which relative motion is limited
CLOSED = 0.005                          # the opening of closed lips, in eye distances
# Points of the outer lips. They are moved together with the inner lips.
OUTER_UPPER, OUTER_LOWER = np.array([50, 51, 52]), np.array([58, 57, 56])


class Source(NamedTuple):
    """The face of the source: identity and residual from all photos and clips, the rest from the first."""
    identity: np.ndarray    # (K,)
    residual: np.ndarray    # (68, 3): what the model cannot express of this face, in the head's own axes
    pose: np.ndarray        # (6,): of the first photo, in its crop
    z: np.ndarray           # (K,): of the first photo, identity and expression together
    opening: np.ndarray     # (7,): of the lids and lips on the first photo, in eye distances


# ------------------------------------------------------------------------------------------- identity

def identity(means, counts, model):
    """The posterior mean of a person's identity -> (K,).

    A person's identity and the deviations of their photos from it are both taken to be Gaussian.
    means (m, K): z of each photo, or its mean over a clip.
    counts (m,): the number of independent photos that each of them is worth.
    """
    mean = np.average(means, axis=0, weights=counts)
    return model.between @ np.linalg.solve(model.between + model.within / np.sum(counts), mean)


def describe(landmarks, model):
    """The landmarks of a person's photos and clips -> Source.

    landmarks: a list of arrays (m, 68, 2), one for each photo (m = 1) or clip, in pixels of their crops.
    The pose and the expression are those of the first face, which is also the picture in a person file.
    """
    fits = [fit(points, model) for points in landmarks]
    counts = [min(len(points), CLIP_WEIGHT) for points in landmarks]
    who = identity([f.z.mean(0) for f in fits], counts, model)
    # residuals in the picture, turned back into the head's axes: (68, 3) for each photo or clip
    residuals = [(f.residual @ rotation(f.pose)).mean(0) for f in fits]
    residual = np.average(residuals, axis=0, weights=counts)
    first = fits[0]
    return Source(who, residual, first.pose[0], first.z[0], first.opening[0])


# ------------------------------------------------------------------------------------- removing jitter

def steady(fitted, seconds, shot, found):
    """Remove the detector's jitter from the Fit of a track -> Fit, without the residual.

    seconds (n,): the times of the frames.
    shot (n,): the number of the shot that each frame belongs to. Nothing is averaged across a cut.
    found (n,): whether a face was found. A frame without one is interpolated between its neighbours.
    """
    values = np.concatenate([fitted.pose, fitted.z, fitted.opening], axis=1)
    noise = np.zeros(values.shape[1])
    if found.sum() > 3:
        # The third differences of a movement are small, and those of white noise have 20 times its variance.
        # The median of |x| is 0.6745 standard deviations of a Gaussian x.
        third = np.abs(np.diff(values[found], 3, axis=0))
        noise = np.median(third, axis=0) / 0.6745 / 20 ** 0.5
    pose, z, lids, lips = slice(0, 6), slice(6, -7), slice(-7, -3), slice(-3, None)
    for number in np.unique(shot):
        frames = np.flatnonzero(shot == number)
        with_face = frames[found[frames]]
        for column in values.T:
            column[frames] = np.interp(seconds[frames], seconds[with_face], column[with_face])
        # the lids share their weights, and so do the lips, because both eyes close at once
        for part, sigma, width in (pose, 0.12, 5), (z, 0.1, 4), (lids, 0.08, 2), (lips, 0.08, 2):
            values[frames, part] = smooth(values[frames, part], seconds[frames], sigma, width * noise[part],
                                          together=part in (lids, lips))
    return Fit(values[:, pose], values[:, z], values[:, -7:], None)


def smooth(values, seconds, sigma, width, together):
    """A bilateral filter over time: values (n, d) -> (n, d).

    The weight of a neighbouring frame falls with its distance in time (sigma, in seconds) and with the
    difference of its value (width (d,)). So noise is averaged away while a blink keeps its depth, and nothing
    is delayed. together: all columns of a frame share one weight, which depends on all their differences.
    """
    n, result = len(values), values
    reach = min(n - 1, int(3 * sigma / np.median(np.diff(seconds)))) if n > 1 else 0
    for _ in range(2):      # the second pass compares with the result of the first, which is less noisy
        total, weights = np.zeros_like(values), np.zeros_like(values)
        for k in range(-reach, reach + 1):
            here, there = slice(max(0, -k), n - max(0, k)), slice(max(0, k), n - max(0, -k))
            in_time = ((seconds[there] - seconds[here])[:, None] / sigma) ** 2
            in_value = ((values[there] - result[here]) / (width + 1e-9)) ** 2
            if together:
                in_value = in_value.sum(1, keepdims=True)
            weight = np.exp(-0.5 * (in_time + in_value))
            total[here] += weight * values[there]
            weights[here] += weight
        result = total / weights.clip(1e-30)
    return result


# --------------------------------------------------------------------------------------------- motion

def adapt(track, source, motion, size, model, lips):
    """The landmarks that drive `source`: a Track of n frames -> (n, 68, 2), in pixels of a size x size crop.

    motion "relative": the pose and expression of the source's photo, plus how far the driver departs from
    their own neutral, the median over the track. The crop is that of the photo.
    motion "absolute": the driver's pose and expression on the source's shape. The crop is that of the driver.
    motion "paper": the driver's landmarks as they are.
    In the first two, the lips open `lips` times as far as the driver's, and the source's lids close by the
    same share of their opening as the driver's.
    """
    points, found = track.in_crops(size), track.found
    if motion == "paper":
        return points
    driver = steady(fit(points, model), track.seconds(), track.shots(), found)
    neutral_pose, neutral_z, neutral_opening = (np.median(values[found], axis=0) for values in driver[:3])
    opening = transfer_openings(driver.opening, neutral_opening, source, model, lips)

    if motion == "relative":
        change = driver.pose - neutral_pose
        change[:, 4:] *= np.exp(source.pose[3] - neutral_pose[3])   # shifts grow with the head on the photo
        pose = limit_rotation(source.pose + change, source)
        return place(pose, source.z + driver.z - neutral_z, opening, source, model)

    driver_identity = identity([driver.z[found].mean(0)], [min(found.sum(), CLIP_WEIGHT)], model)
    result = place(driver.pose, source.identity + driver.z - driver_identity, opening, source, model)
    # the crop depends on the shape of the face, so it is taken anew: a longer face needs a wider one
    box, wanted = np.median(face_box(result), axis=0), np.median(face_box(points), axis=0)
    return (result - box[:2]) * (wanted[2] / box[2]) + wanted[:2]


def limit_rotation(pose, source):
    """Poses (n, 6) with yaw and pitch limited to MAX_ROTATION, or to the photo's own where that is larger."""
    limit = np.maximum(MAX_ROTATION, np.abs(source.pose[:2]))
    return np.concatenate([pose[:, :2].clip(-limit, limit), pose[:, 2:]], axis=1)


def opening_when_awake(source, model):
    """The openings (7,) on the photo, but at least 0.7 of the expected ones: the photo may show a blink."""
    expected = shape_openings(model.mean + np.tensordot(source.identity, model.basis, 1))
    return np.maximum(source.opening, 0.7 * expected)


def transfer_openings(driver, neutral, source, model, lips):
    """The driver's openings (n, 7), and their neutral values (7,) -> the source's openings (n, 7)."""
    # the driver's eyes may be closed most of the time, so the neutral values have a lower bound
    share = driver / np.maximum(neutral, 0.4 * shape_openings(model.mean))
    lids = (opening_when_awake(source, model) * share.clip(0, 1.6))[:, LIDS]
    apart = (driver[:, LIPS] - CLOSED).clip(0)
    return np.concatenate([lids, CLOSED + lips * apart], axis=1)


def place(pose, z, opening, source, model):
    """The source's landmarks (n, 68, 2) with these poses (n, 6), coefficients (n, K) and openings (n, 7)."""
    return np.concatenate([_place(pose[rows], z[rows], opening[rows], source, model)
                           for rows in chunks(len(pose))])


def _place(pose, z, opening, source, model):
    shape = shapes(pose, z, model) + source.residual

    # (1) The most likely expression, given the openings of the lips, so that the jaw moves with them.
    lips_of_z = shape_openings(model.basis).T[LIPS]                                     # (3, K)
    covariance = lips_of_z @ model.within @ lips_of_z.T + 2 * model.noise * np.eye(3)   # (3, 3)
    gain = model.within @ lips_of_z.T @ np.linalg.inv(covariance)                       # (K, 3)
    shape += np.tensordot((opening - shape_openings(shape))[:, LIPS] @ gain.T, model.basis, 1)
    points = project(pose, shape)

    # (2) Correct what is still missing, half of it at the upper and half at the lower lid or lip. After this
    # the openings are exact, so lips never cross.
    move = 0.5 * (opening - openings(points, pose))[..., None] * down(pose)[:, None]    # (n, 7, 2)
    points[:, UPPER] -= move
    points[:, LOWER] += move
    points[:, OUTER_UPPER] -= move[:, LIPS]
    points[:, OUTER_LOWER] += move[:, LIPS]
    return points.astype(np.float32)


# --------------------------------------------------------------------------- other poses of the source

def random_poses(source, model, seed=0):
    """Yield landmarks (68, 2) without end: the source in random poses and with random expressions.

    They are in pixels of the photo's crop. The same seed yields the same landmarks.
    """
    rng, spread = np.random.default_rng(seed), np.linalg.cholesky(model.within)
    while True:
        rotated = rng.uniform(-1, 1, 3) * np.radians([30, 15, 12])      # yaw, pitch, roll
        pose = limit_rotation(source.pose[None] + np.append(rotated, [0, 0, 0]), source)
        z = source.z + 0.7 * spread @ rng.standard_normal(len(source.z))
        lids = opening_when_awake(source, model)[LIDS] * rng.uniform(0.1, 1.2)
        lips = np.full(3, CLOSED) if rng.random() < 0.4 else rng.uniform(CLOSED, 0.25, 3)
        yield place(pose, z[None], np.concatenate([lids, lips])[None], source, model)[0]


def views(source, model, yaws):
    """The photo's own expression from new viewpoints (Fig. 6): yaws (n,) in degrees -> (n, 68, 2).

    All are framed as the photo is, in pixels of its crop.
    """
    repeat = lambda value: np.tile(value, (len(yaws) + 1, 1))       # the photo as it is comes first
    pose = repeat(source.pose)
    pose[1:, 0] = np.radians(yaws)
    points = place(pose, repeat(source.z), repeat(source.opening), source, model)
    box = face_box(points)[:, None]
    wanted = box[:1]
    return ((points - box[..., :2]) * (wanted[..., 2:] / box[..., 2:]) + wanted[..., :2])[1:]
