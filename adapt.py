"""Someone else drives: the source's face under the driver's motion, by a linear 3-D face of the 68 points.

    python adapt.py --data prepared --out weights/face3d.npz        # makes the bundled file, two minutes on one core

The paper feeds the driver's landmarks as they are and names the limit itself (Sec. 5, "lack of landmark adaptation ...
a noticeable personality mismatch"). This goes beyond it. A face seen by a camera far away is

    points = scale * R * (mean + turn(R) + z * basis) + shift + rest

with a pose (R, scale, shift), coefficients z, and a rest that the model cannot say. z is who somebody is plus what the
face is doing; the two are told apart by how z varies between people and within one person. Then a source keeps its
identity and takes over the driver's movements.

Lengths in a face are in eye distances (between the outer corners); x goes to the picture's right, y down, z to the
viewer. A pose is (yaw, pitch, roll, log scale, x, y): yaw > 0 looks to the picture's right, pitch > 0 up.
"""
import argparse
import os
from typing import NamedTuple

import numpy as np

from data import MIRRORED, PreparedVideos, check_paths, face_box, run, steady_boxes, to_crop, warn
from model import UserError, atomic

FACE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "weights", "face3d.npz")
DIRECTIONS = 16             # of the basis
MOST = 32                   # frames of a prepared sequence that are learned from
CLIP = 4                    # so many independent photos are the frames of a clip worth
YAW, PITCH = np.radians([50, 30])   # further than that relative motion does not turn a head: nothing is known there

# openings: points of the upper and of the lower lid or lip, and the outer lips that go with the inner ones
UPPER, LOWER = np.array([37, 38, 43, 44, 61, 62, 63]), np.array([41, 40, 47, 46, 67, 66, 65])
OUTER_UPPER, OUTER_LOWER = np.array([50, 51, 52]), np.array([58, 57, 56])
LIDS, LIPS = slice(0, 4), slice(4, 7)
SHUT = 0.005                # lips that touch: inner lips must not cross


class Face(NamedTuple):
    """The linear 3-D face, weights/face3d.npz."""
    mean: np.ndarray        # (68, 3), symmetric
    basis: np.ndarray       # (K, 68, 3)
    turn: np.ndarray        # (5, K): how z changes with yaw and pitch, since the jaw's points slide along its outline
    noise: np.ndarray       # (): variance of a detected coordinate
    between: np.ndarray     # (K, K): covariance of people's identities, whose mean is 0
    within: np.ndarray      # (K, K): covariance of a person's photos around their identity


class Fit(NamedTuple):
    pose: np.ndarray        # (n, 6): yaw, pitch, roll, log scale, x, y
    z: np.ndarray           # (n, K), without the part that comes from turning
    rest: np.ndarray        # (n, 68, 2), in eye distances
    opening: np.ndarray     # (n, 7): of lids and lips


class Source(NamedTuple):
    """Whose face it is; what a person file holds."""
    identity: np.ndarray    # (K,)
    rest: np.ndarray        # (68, 3): what the model cannot say of this face, in the face's own plane
    pose: np.ndarray        # (6,) of the photo, in pixels of its crop
    z: np.ndarray           # (K,) of the photo: identity and expression
    opening: np.ndarray     # (7,) of the photo


# ------------------------------------------------------------------------------------- the face and its pose

def rotation(pose):
    """(n, 6) or (n, 3) -> R (n, 3, 3): the head turns, then nods, then tilts."""
    (cy, cp, cr), (sy, sp, sr) = np.cos(pose[:, :3]).T, np.sin(pose[:, :3]).T
    zero, one = np.zeros_like(cy), np.ones_like(cy)
    matrix = lambda *rows: np.stack([np.stack(row, -1) for row in rows], -2)
    yaw = matrix((cy, zero, sy), (zero, one, zero), (-sy, zero, cy))
    pitch = matrix((one, zero, zero), (zero, cp, -sp), (zero, sp, cp))
    roll = matrix((cr, -sr, zero), (sr, cr, zero), (zero, zero, one))
    return roll @ pitch @ yaw


def angles(R):
    """The first two rows of R (n, 2, 3) -> yaw, pitch, roll (n, 3)."""
    third = np.cross(R[:, 0], R[:, 1])
    return np.stack([np.arctan2(-third[:, 0], third[:, 2]), np.arcsin(third[:, 1].clip(-1, 1)),
                     np.arctan2(-R[:, 0, 1], R[:, 1, 1])], axis=1)


def turned(pose, face):
    """What z is on average at a yaw and pitch: pose (n, 6) or (n, 3) -> (n, K)."""
    yaw, pitch = pose[:, 0], pose[:, 1]
    return np.stack([yaw, pitch, yaw * yaw, yaw * pitch, pitch * pitch], axis=1) @ face.turn


def shapes(z, face):
    """(n, K) -> (n, 68, 3)."""
    return face.mean + np.tensordot(z, face.basis, 1)


def project(pose, shape):
    """pose (n, 6), shape (n, 68, 3) -> points (n, 68, 2)."""
    R = rotation(pose)[:, :2]
    return np.exp(pose[:, 3])[:, None, None] * (shape @ R.transpose(0, 2, 1)) + pose[:, None, 4:]


def find_pose(points, shape):
    """Scaled orthography in closed form: points (n, 68, 2), shape (n, 68, 3) -> pose (n, 6).

    The least squares' affine map, and the rotation next to it."""
    p0, x0 = points.mean(1), shape.mean(1)
    p, x = points - p0[:, None], shape - x0[:, None]
    affine = (p.transpose(0, 2, 1) @ x) @ np.linalg.inv(x.transpose(0, 2, 1) @ x)       # (n, 2, 3)
    u, s, vt = np.linalg.svd(affine, full_matrices=False)
    R, scale = u @ vt, s.mean(1, keepdims=True)
    return np.concatenate([angles(R), np.log(scale), p0 - scale * (R @ x0[..., None])[..., 0]], axis=1)


def back(points, pose):
    """Points (n, 68, 2) without shift and scale: in eye distances, still turned."""
    return (points - pose[:, None, 4:]) / np.exp(pose[:, 3])[:, None, None]


def find_z(points, pose, face):
    """Ridge, with the noise's variance against a variance of 1: points (n, 68, 2), pose (n, 6) -> z (n, K)."""
    R, K = rotation(pose)[:, :2], len(face.basis)
    rest = back(points, pose) - shapes(turned(pose, face), face) @ R.transpose(0, 2, 1)
    gram = np.tensordot(face.basis, face.basis, ((1,), (1,))).transpose(1, 3, 0, 2)     # (3, 3, K, K)
    normal = (R.transpose(0, 2, 1) @ R).reshape(-1, 9) @ gram.reshape(9, -1)
    normal = normal.reshape(len(points), K, K) + face.noise * np.eye(K)
    wanted = (rest @ R).reshape(-1, 204) @ face.basis.reshape(K, 204).T
    return np.linalg.solve(normal, wanted[..., None])[..., 0]


def fit(points, face, rounds=3, chunk=512):
    """points (n, 68, 2) in pixels -> Fit. Pose and coefficients by turns; 3 rounds bring z within 0.001 of the end."""
    parts = []
    for start in range(0, len(points), chunk):              # in chunks: a long driver has many
        p = np.asarray(points[start:start + chunk], np.float64)
        z = shift = np.zeros((len(p), len(face.basis)))
        for _ in range(rounds):
            pose = find_pose(p, shapes(z + shift, face))
            shift = turned(pose, face)
            z = find_z(p, pose, face)
        rest = back(p, pose) - shapes(z + shift, face) @ rotation(pose)[:, :2].transpose(0, 2, 1)
        parts.append((pose, z, rest.astype(np.float32), openings(p, pose)))
    return Fit(*map(np.concatenate, zip(*parts)))


def down(pose):
    """The head's own downward direction in the picture, foreshortened and in pixels: (n, 6) -> (n, 2)."""
    return rotation(pose)[:, :2, 1] * np.exp(pose[:, 3:4])


def openings(points, pose):
    """How far lids and lips are open, in eye distances: points (n, 68, 2), pose (n, 6) -> (n, 7)."""
    along = down(pose)
    gap = points[:, LOWER] - points[:, UPPER]
    return (gap @ along[..., None])[..., 0] / (along ** 2).sum(1, keepdims=True)


# --------------------------------------------------------------------------------------------- who it is

def identity(means, counts, face):
    """The posterior mean of who it is: Gaussian between people, Gaussian within one.

    means (m, K): z of each photo, or its mean over a clip's frames; counts (m,): how many photos each is worth."""
    n, mean = np.sum(counts), np.average(means, axis=0, weights=counts)
    return face.between @ np.linalg.solve(face.between + face.within / n, mean)


def describe(parts, face):
    """Source of a person's landmarks. parts: an array (m, 68, 2) for each photo (m = 1) and each clip, in crop pixels."""
    fits = [fit(points, face) for points in parts]
    counts = np.array([min(len(points), CLIP) for points in parts])
    who = identity(np.stack([f.z.mean(0) for f in fits]), counts, face)
    lifted = [np.mean(f.rest @ rotation(f.pose)[:, :2], axis=0) for f in fits]          # (68, 3) each
    every = Fit(*map(np.concatenate, zip(*fits)))
    off = (every.pose - np.median(every.pose, 0)) / (every.pose.std(0) + 1e-9)
    typical = np.linalg.norm(off[:, :3], axis=1).argmin()                               # of one photo: that one
    return Source(who, np.average(lifted, axis=0, weights=counts), every.pose[typical], every.z[typical],
                  every.opening[typical])


# --------------------------------------------------------------------------------------------- steadiness

def shots(points):
    """Number of the shot that each frame (n, 68, 2) belongs to, by the rule of steady_boxes: the face has jumped."""
    boxes = face_box(points)
    jump = np.linalg.norm(np.diff(boxes[:, :2], axis=0, prepend=boxes[:1, :2]), axis=1)
    return np.cumsum(jump > boxes[:, 2])


def noise(values):
    """Standard deviation of each column's noise: (n, d) -> (d,). A movement has hardly any third difference, noise has."""
    if len(values) < 4:
        return np.zeros(values.shape[1])
    return np.median(np.abs(np.diff(values, 3, axis=0)), axis=0) / 0.6745 / 20 ** 0.5


def smooth(values, seconds, sigma, width, together=False):
    """Still what only trembles, keep what moves: values (n, d), columns one by one or together -> (n, d).

    A bilateral filter: a frame counts in so far as it is near in time (sigma, in seconds) and in value (width (d,)).
    So a blink or a plosive keeps its depth, and nothing comes late.
    """
    n, result = len(values), values
    reach = min(n - 1, int(3 * sigma / np.median(np.diff(seconds)))) if n > 1 else 0
    for _ in range(2):                                      # the second time, values are compared with the first result
        total, weights = np.zeros_like(values), np.zeros_like(values)
        for k in range(-reach, reach + 1):
            here, there = slice(max(0, -k), n - max(0, k)), slice(max(0, k), n - max(0, -k))
            late = ((seconds[there] - seconds[here])[:, None] / sigma) ** 2
            far = ((values[there] - result[here]) / (width + 1e-9)) ** 2
            weight = np.exp(-0.5 * (late + (far.sum(1, keepdims=True) if together else far)))
            total[here] += weight * values[there]
            weights[here] += weight
        result = total / np.maximum(weights, 1e-30)
    return result


def steady(f, seconds, shot, found):
    """The Fit of a track without the detector's tremble. Frames without a face lie between their neighbours."""
    values = np.concatenate([f.pose, f.z, f.opening], axis=1).astype(np.float64)
    deviation = noise(values[found])
    # columns, sigma in seconds, width in deviations: heads move slowly; lips and lids move fast, and together
    settings = [(slice(0, 6), 0.12, 4, False), (slice(6, -7), 0.08, 3, False),
                (slice(-7, -3), 0.06, 2.5, True), (slice(-3, None), 0.06, 2.5, True)]
    for number in np.unique(shot):
        own = np.flatnonzero(shot == number)
        seen = own[found[own]]
        for column in values.T:
            column[own] = np.interp(seconds[own], seconds[seen], column[seen])
        for part, sigma, width, together in settings:
            values[own, part] = smooth(values[own, part], seconds[own], sigma, width * deviation[part], together)
    return f._replace(pose=values[:, :6], z=values[:, 6:-7], opening=values[:, -7:])


# ---------------------------------------------------------------------------------------------- adaptation

def adapt(track, source, motion, size, face):
    """The landmarks that drive `source`: Track of n frames -> (n, 68, 2) in pixels of a size x size crop.

    motion "relative": the photo's pose and expression plus the driver's change from its own neutral, framed as the
    photo is.  "absolute": the driver's pose and expression on the source's shape, framed as the driver is.
    "paper": the driver's landmarks as they are.  In the first two the mouth is open as far as the driver's, and the
    lids close as far as the driver's do.
    """
    points = track.in_crops(size)
    if motion == "paper":
        return points
    driver = steady(fit(points, face), track.seconds(), shots(track.points), track.found)
    neutral = Fit(*(np.median(part[track.found], axis=0) for part in driver))
    if motion == "relative":
        pose = source.pose + driver.pose - neutral.pose
        pose[:, 4:] = source.pose[4:] + (driver.pose - neutral.pose)[:, 4:] * np.exp(source.pose[3] - neutral.pose[3])
        limit = np.maximum([YAW, PITCH], np.abs(source.pose[:2]))
        pose[:, :2] = pose[:, :2].clip(-limit, limit)
        z = source.z + driver.z - neutral.z
    else:
        who = identity(driver.z[track.found].mean(0)[None], [min(track.found.sum(), CLIP)], face)
        pose, z = driver.pose, source.identity + driver.z - who
    opening = target_openings(driver.opening, neutral.opening, source, face)
    result = draw_face(pose, z, opening, source, face)
    if motion == "absolute":                                # the source's face fills the crop as training's did
        now, wanted = np.median(face_box(result), axis=0), np.median(face_box(points[track.found]), axis=0)
        result = (result - now[:2]) * (wanted[2] / now[2]) + wanted[:2]
    return result.astype(np.float32)


def target_openings(driver, neutral, source, face):
    """driver (n, 7), neutral (7,) -> (n, 7): the lips as far as the driver's, the lids by the driver's share of open."""
    mean = gaps(face.mean)[LIDS]
    own = gaps(shapes(source.identity, face))[LIDS]
    opened = np.maximum(source.opening[LIDS], 0.7 * own)    # the photo may have been taken in a blink
    share = (driver[:, LIDS] / np.maximum(neutral[LIDS], 0.4 * mean)).clip(0, 1.6)
    return np.concatenate([opened * share, driver[:, LIPS].clip(SHUT)], axis=1)


def gaps(shape):
    """Openings of an unturned shape (..., 68, 3) -> (..., 7)."""
    return shape[..., LOWER, 1] - shape[..., UPPER, 1]


def draw_face(pose, z, opening, source, face):
    """pose (n, 6), z (n, K), opening (n, 7) -> points (n, 68, 2). The openings hold exactly."""
    # the likeliest expression with these lips: the jaw goes along
    shape = shapes(z + turned(pose, face), face) + source.rest
    of_z = gaps(face.basis).T[LIPS]                                                     # (3, K)
    gain = face.within @ of_z.T @ np.linalg.inv(of_z @ face.within @ of_z.T + 2 * face.noise * np.eye(3))
    shape = shape + np.tensordot((opening - gaps(shape))[:, LIPS] @ gain.T, face.basis, 1)
    points = project(pose, shape)
    # what the model's few directions leave of it, half by the upper and half by the lower lid or lip
    move = 0.5 * (opening - openings(points, pose))[..., None] * down(pose)[:, None]    # (n, 7, 2)
    points[:, UPPER] -= move
    points[:, LOWER] += move
    points[:, OUTER_UPPER] -= move[:, LIPS]
    points[:, OUTER_LOWER] += move[:, LIPS]
    return points


def views(source, face, yaws=np.linspace(-40, 40, 33)):
    """The photo's own expression from new viewpoints, framed as the photo is: yaws (n,) in degrees -> (n, 68, 2)."""
    pose = np.tile(source.pose, (len(yaws), 1))
    photo = draw_face(pose[:1], source.z[None], source.opening[None], source, face)
    pose[:, 0] = np.radians(yaws)
    points = draw_face(pose, np.tile(source.z, (len(yaws), 1)), np.tile(source.opening, (len(yaws), 1)), source, face)
    box, wanted = face_box(points)[:, None], face_box(photo)
    return ((points - box[..., :2]) * (wanted[..., 2:] / box[..., 2:]) + wanted[..., :2]).astype(np.float32)


# ------------------------------------------------------------------------------------------ fitting the face

def cylinder(points):
    """Where to start: the mean picture, bent around a cylinder, (n, 68, 2) -> (68, 3)."""
    flat = points.mean(0)
    flat = (flat + flat[MIRRORED] * (-1, 1)) / 2 / np.linalg.norm(flat[36] - flat[45])
    return np.concatenate([flat, np.sqrt(np.maximum(1 - flat[:, :1] ** 2, 0))], axis=1)


def more_directions(f, face):
    """Two more: the largest ones of what the face cannot say yet, lifted into its plane. -> basis (K + 2, 68, 3)."""
    lifted = (f.rest @ rotation(f.pose)[:, :2]).reshape(len(f.rest), -1)
    w, v = np.linalg.eigh(lifted.T @ lifted / len(lifted))
    return np.concatenate([face.basis, (v[:, -2:] * w[-2:] ** 0.5).T.reshape(2, 68, 3)])


def solve_shapes(points, f):
    """Mean and basis by linear least squares over all frames, given poses and coefficients; basis for z of variance 1."""
    n, K = f.z.shape
    w, v = np.linalg.eigh(f.z.T @ f.z / n)
    z = f.z @ (v[:, ::-1] / w[::-1] ** 0.5)                                              # white
    factors = np.concatenate([np.ones((n, 1)), z], axis=1)[:, None, :, None]            # (n, 1, 1 + K, 1)
    A = (factors * rotation(f.pose)[:, :2, None, :]).reshape(2 * n, -1)
    b = back(points, f.pose).transpose(0, 2, 1).reshape(2 * n, 68)
    ridge = np.repeat(np.r_[0, np.full(K, 30.0)], 3) + 1e-3                             # depths that no frame shows
    solved = np.linalg.solve(A.T @ A + np.diag(ridge), A.T @ b).reshape(1 + K, 3, 68).transpose(0, 2, 1)
    mean = (solved[0] + solved[0][MIRRORED] * (-1, 1, 1)) / 2
    unit = np.linalg.norm(mean[36] - mean[45])
    return (mean - mean.mean(0)) / unit, solved[1:] / unit


def learn_shapes(points, directions=DIRECTIONS, rounds=(24, 6), say=lambda message: None):
    """Non-rigid structure from motion by alternating least squares: points (n, 68, 2) -> Face without covariances.

    rounds: with the mean alone, then directions come two by two, then with all of them.
    """
    points = points - points.mean(1, keepdims=True)
    points = points / (points ** 2).mean((1, 2), keepdims=True) ** 0.5
    points = np.concatenate([points, points[:, MIRRORED] * (-1, 1)])
    face = Face(cylinder(points), np.zeros((0, 68, 3)), np.zeros((5, 0)), 1e-3, None, None)
    for step in range(rounds[0] + directions // 2 + rounds[1]):
        f = fit(points, face)
        K = len(face.basis)
        face = face._replace(noise=np.mean(f.rest ** 2, dtype=np.float64) * 136 / (136 - 6 - K))
        error = np.linalg.norm(f.rest, axis=2).mean()
        say(f"round {step + 1}: {K} directions, {100 * error:.2f} % of the eye distance are left")
        if step >= rounds[0] and K < directions:
            face = face._replace(basis=more_directions(f, face), turn=np.zeros((5, K + 2)))
            f = fit(points, face)
        mean, basis = solve_shapes(points, f)
        face = face._replace(mean=mean, basis=basis)
    # the coefficients' part that comes from turning, and the rest's mean, which belongs to the mean
    f = fit(points, face)
    features = turned(f.pose, face._replace(turn=np.eye(5)))
    fitted = np.linalg.lstsq(np.concatenate([np.ones((len(points), 1)), features], axis=1), f.z, rcond=None)[0]
    return face._replace(mean=shapes(fitted[0], face), turn=fitted[1:])


def covariances(z):
    """z: an array (n_i, K) for each person -> between, within (K, K), and the mean identity (K,)."""
    means, counts = np.stack([part.mean(0) for part in z]), np.array([len(part) for part in z])
    own = np.concatenate([part - mean for part, mean in zip(z, means)])
    within = own.T @ own / (counts - 1).sum()
    spread = np.cov(means.T) - within * np.mean(1 / counts)                             # a mean of few is noisy itself
    w, v = np.linalg.eigh(spread)
    return (v * w.clip(1e-4)) @ v.T, within, means.mean(0)


def learn(people, say=lambda message: None):
    """people: landmarks (n_i, 68, 2) of each, n_i >= 2 -> Face."""
    face = learn_shapes(np.concatenate(people), say=say)
    between, within, mean = covariances([fit(points, face).z for points in people])
    face = face._replace(mean=shapes(mean, face), between=between, within=within)       # now identities have mean 0
    return Face(*(np.asarray(part, np.float32) for part in face))


def save_face(path, face):
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **face._asdict())


def load_face(path=FACE):
    """-> Face. UserError if the file is none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            face = Face(*(file[name].astype(np.float64) for name in Face._fields))
        K = len(face.basis)
        if [part.shape for part in face] != [(68, 3), (K, 68, 3), (5, K), (), (K, K), (K, K)]:
            raise ValueError("its arrays are not those of a face")
        return face
    except Exception as e:  # numpy and zipfile raise many types on foreign or damaged files
        raise UserError(f"{path} is not a 3-D face of adapt.py ({e})") from None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="prepared", metavar="DIR", help="a prepared folder (default: prepared)")
    parser.add_argument("--out", default=FACE, metavar="FILE", help="(default: the bundled weights/face3d.npz)")
    args = parser.parse_args()
    check_paths([], [args.out])
    videos, people = PreparedVideos(args.data), []
    for i in range(len(videos)):
        try:
            points = videos._open(i)["landmarks"].numpy()
            people.append(points[np.linspace(0, len(points) - 1, min(len(points), MOST)).round().astype(int)])
        except UserError as e:
            warn(e)
    frames = sum(map(len, people))
    if frames < 20 * DIRECTIONS or len(people) < 2 * DIRECTIONS:
        raise UserError(f"{frames} frames of {len(people)} people in {args.data} are too few for a face of {DIRECTIONS} directions")
    save_face(args.out, learn(people, say=print))
    print(f"wrote {args.out}: from {frames} frames of {len(people)} people")


if __name__ == "__main__":
    run(main)
