"""Someone else drives: the source's face under the driver's motion.

The paper feeds the driver's landmarks as they are, and names the limit itself: "lack of landmark
adaptation ... leads to a noticeable personality mismatch". This goes beyond it, with the linear 3-D face
of face3d.py. Its coefficients z are who somebody is plus what the face is doing; how they vary between
people and within one person tells the two apart. So a source keeps its identity and takes over the
driver's movements.
"""
from typing import NamedTuple

import numpy as np

from beyond.face3d import (LIDS, LIPS, LOWER, UPPER, Fit, chunks, down, fit, gaps, openings, project,
                           rotation, shapes)
from media.faces import face_box, shots

CLIP = 4                            # the frames of a clip are worth so many independent photos
TURN = np.radians([50, 30])         # relative motion brings no head beyond this yaw and pitch
SHUT = 0.005                        # lips that touch, in eye distances
OUTER_UPPER, OUTER_LOWER = np.array([50, 51, 52]), np.array([58, 57, 56])   # they go with the inner lips


class Source(NamedTuple):
    """Whose face it is."""
    identity: np.ndarray    # (K,)
    rest: np.ndarray        # (68, 3): what the model cannot say of this face, in the face's plane
    pose: np.ndarray        # (6,): of the photo, in its crop
    z: np.ndarray           # (K,): of the photo, identity and expression
    opening: np.ndarray     # (7,): of the photo's lids and lips


# ------------------------------------------------------------------------------------------- who it is

def identity(means, counts, face):
    """Who it is: the posterior's mean, people and a person's photos both being Gaussian -> (K,).

    means (m, K): z of each photo, or its mean over a clip.  counts (m,): how many photos each is worth.
    """
    mean = np.average(means, axis=0, weights=counts)
    return face.between @ np.linalg.solve(face.between + face.within / np.sum(counts), mean)


def describe(parts, face):
    """Landmarks (m, 68, 2) of each photo (m = 1) and each clip, in pixels of their crops -> Source.

    The first face of all gives pose and expression, as it gives the picture in a person file.
    """
    fits = [fit(points, face) for points in parts]
    counts = [min(len(points), CLIP) for points in parts]
    who = identity([f.z.mean(0) for f in fits], counts, face)
    lifted = [(f.rest @ rotation(f.pose)).mean(0) for f in fits]                        # (68, 3) each
    rest = np.average(lifted, axis=0, weights=counts)
    return Source(who, rest, fits[0].pose[0], fits[0].z[0], fits[0].opening[0])


# ----------------------------------------------------------------------------------------- steadiness

def steady(f, seconds, shot, found):
    """The Fit of a track without the detector's tremble, but for its rest.

    seconds (n,).  shot (n,): nothing is mixed across a cut.  found (n,): a frame without a face lies
    between its neighbours.
    """
    values = np.concatenate([f.pose, f.z, f.opening], axis=1)
    noise = np.zeros(values.shape[1])
    if found.sum() > 3:     # third differences: of movements small, of white noise 20 times its variance
        third = np.abs(np.diff(values[found], 3, axis=0))
        noise = np.median(third, axis=0) / 0.6745 / 20 ** 0.5
    pose, z, lids, lips = slice(0, 6), slice(6, -7), slice(-7, -3), slice(-3, None)
    for number in np.unique(shot):
        own = np.flatnonzero(shot == number)
        seen = own[found[own]]
        for column in values.T:
            column[own] = np.interp(seconds[own], seconds[seen], column[seen])
        for part, sigma, width in (pose, 0.12, 5), (z, 0.1, 4), (lids, 0.08, 2), (lips, 0.08, 2):
            values[own, part] = smooth(values[own, part], seconds[own], sigma, width * noise[part],
                                       together=part in (lids, lips))       # both lids close at once
    return Fit(values[:, pose], values[:, z], values[:, -7:], None)


def smooth(values, seconds, sigma, width, together):
    """Still what only trembles, keep what moves: values (n, d), columns together or one by one.

    A bilateral filter: a frame counts in so far as it is near in time (sigma, in seconds) and in value
    (width (d,)). So a blink keeps its depth, and nothing comes late.
    """
    n, result = len(values), values
    reach = min(n - 1, int(3 * sigma / np.median(np.diff(seconds)))) if n > 1 else 0
    for _ in range(2):      # the second time, values are compared with the first result
        total, weights = np.zeros_like(values), np.zeros_like(values)
        for k in range(-reach, reach + 1):
            here, there = slice(max(0, -k), n - max(0, k)), slice(max(0, k), n - max(0, -k))
            late = ((seconds[there] - seconds[here])[:, None] / sigma) ** 2
            far = ((values[there] - result[here]) / (width + 1e-9)) ** 2
            weight = np.exp(-0.5 * (late + (far.sum(1, keepdims=True) if together else far)))
            total[here] += weight * values[there]
            weights[here] += weight
        result = total / weights.clip(1e-30)
    return result


# --------------------------------------------------------------------------------------------- motion

def adapt(track, source, motion, size, face, lips):
    """The landmarks that drive `source`: Track of n frames -> (n, 68, 2), pixels of a size x size crop.

    motion "relative": the photo's pose and expression plus the driver's change from its own neutral,
    framed as the photo.  "absolute": the driver's pose and expression on the source's shape, framed as the
    driver.  In both, lips open `lips` times as far as the driver's, and lids by the driver's share.
    "paper": the driver's landmarks as they are.
    """
    points, found = track.in_crops(size), track.found
    if motion == "paper":
        return points
    driver = steady(fit(points, face), track.seconds(), shots(face_box(track.points)), found)
    neutral_pose, neutral_z, neutral_opening = (np.median(part[found], axis=0) for part in driver[:3])
    opening = take_over(driver.opening, neutral_opening, source, face, lips)

    if motion == "relative":
        change = driver.pose - neutral_pose
        change[:, 4:] *= np.exp(source.pose[3] - neutral_pose[3])   # the photo's head may be larger
        pose = limited(source.pose + change, source)
        return place(pose, source.z + driver.z - neutral_z, opening, source, face)

    who = identity([driver.z[found].mean(0)], [min(found.sum(), CLIP)], face)
    result = place(driver.pose, source.identity + driver.z - who, opening, source, face)
    box, wanted = np.median(face_box(result), axis=0), np.median(face_box(points), axis=0)
    return (result - box[:2]) * (wanted[2] / box[2]) + wanted[:2]   # a longer face needs a wider crop


def limited(pose, source):
    """pose (n, 6), turned and nodded no farther than TURN, or than the photo is."""
    limit = np.maximum(TURN, np.abs(source.pose[:2]))
    return np.concatenate([pose[:, :2].clip(-limit, limit), pose[:, 2:]], axis=1)


def awake(source, face):
    """The source's opening (7,): the photo may be of a blink."""
    expected = gaps(face.mean + np.tensordot(source.identity, face.basis, 1))
    return np.maximum(source.opening, 0.7 * expected)


def take_over(driver, neutral, source, face, lips):
    """Openings of the driver (n, 7) and of its neutral (7,) -> of the source (n, 7)."""
    share = driver / np.maximum(neutral, 0.4 * gaps(face.mean))     # the driver may be asleep
    lids = (awake(source, face) * share.clip(0, 1.6))[:, LIDS]
    apart = (driver[:, LIPS] - SHUT).clip(0)
    return np.concatenate([lids, SHUT + lips * apart], axis=1)


def place(pose, z, opening, source, face):
    """pose (n, 6), z (n, K), opening (n, 7) -> landmarks (n, 68, 2) of the source, with this opening."""
    return np.concatenate([_place(pose[rows], z[rows], opening[rows], source, face)
                           for rows in chunks(len(pose))])


def _place(pose, z, opening, source, face):
    shape = shapes(pose, z, face) + source.rest

    # the likeliest expression with these lips: the jaw goes along
    of_z = gaps(face.basis).T[LIPS]                                                     # (3, K)
    spread = of_z @ face.within @ of_z.T + 2 * face.noise * np.eye(3)
    gain = face.within @ of_z.T @ np.linalg.inv(spread)                                 # (K, 3)
    shape += np.tensordot((opening - gaps(shape))[:, LIPS] @ gain.T, face.basis, 1)
    points = project(pose, shape)

    # what is missing yet, half from the upper lid or lip and half from the lower: never crossed
    move = 0.5 * (opening - openings(points, pose))[..., None] * down(pose)[:, None]    # (n, 7, 2)
    points[:, UPPER] -= move
    points[:, LOWER] += move
    points[:, OUTER_UPPER] -= move[:, LIPS]
    points[:, OUTER_LOWER] += move[:, LIPS]
    return points.astype(np.float32)


def random_poses(source, face, seed=0):
    """Yield landmarks (68, 2) without end: the source in other poses and with other expressions.

    In pixels of its photo's crop. The same seed gives the same ones.
    """
    rng, spread = np.random.default_rng(seed), np.linalg.cholesky(face.within)
    while True:
        turned = rng.uniform(-1, 1, 3) * np.radians([30, 15, 12])       # yaw, pitch, roll
        pose = limited(source.pose[None] + np.append(turned, [0, 0, 0]), source)
        z = source.z + 0.7 * spread @ rng.standard_normal(len(source.z))
        lids = awake(source, face)[LIDS] * rng.uniform(0.1, 1.2)
        lips = np.full(3, SHUT) if rng.random() < 0.4 else rng.uniform(SHUT, 0.25, 3)
        yield place(pose, z[None], np.concatenate([lids, lips])[None], source, face)[0]


def views(source, face, yaws):
    """The photo's own expression from new viewpoints (Fig. 6): yaws (n,) in degrees -> (n, 68, 2)."""
    repeat = lambda part: np.tile(part, (len(yaws) + 1, 1))
    pose = repeat(source.pose)
    pose[1:, 0] = np.radians(yaws)
    points = place(pose, repeat(source.z), repeat(source.opening), source, face)
    box = face_box(points)[:, None]
    frame = box[:1]                                         # of the photo as it is
    return ((points - box[..., :2]) * (frame[..., 2:] / box[..., 2:]) + frame[..., :2])[1:]
