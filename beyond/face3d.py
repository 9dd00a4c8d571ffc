"""Ours: a linear 3-D face model of the 68 landmarks, and how it is learned from 2-D landmarks alone.

    model = load_face3d()                   # weights/face3d.npz
    fitted = fit(points, model)             # pose, coefficients z, openings and residual of every frame

    python -m beyond.face3d --data prepared --out weights/face3d.npz    # learns that file in a few minutes

The camera is far away (scaled orthography), so that the landmarks of a face in a picture are

    points = scale * (R * (mean + z * basis) + residual) + shift

with a pose (R, scale, shift), coefficients z, and a residual that the model cannot express. Lengths on a
face are in eye distances, which are measured between the outer eye corners. The axes are x to the picture's
right, y down and z towards the viewer. A pose is (yaw, pitch, roll, log scale, shift x, shift y), with angles
in radians: a face with yaw > 0 looks to the picture's right, and one with pitch > 0 looks up.
"""
import os
from typing import NamedTuple

import numpy as np

from data import PreparedVideos
from media.faces import MIRRORED
from runtime.files import UserError, atomic, check_paths, make_parser, raise_if_out_of_memory, run, warn

FACE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "weights", "face3d.npz")

# Where a face opens: 4 pairs of points on the upper and lower lids, then 3 pairs on the inner lips.
UPPER, LOWER = np.array([37, 38, 43, 44, 61, 62, 63]), np.array([41, 40, 47, 46, 67, 66, 65])
LIDS, LIPS = slice(0, 4), slice(4, 7)


class Face3D(NamedTuple):
    """The face model, with K basis shapes, as weights/face3d.npz stores it."""
    mean: np.ndarray        # (68, 3), symmetric
    basis: np.ndarray       # (K, 68, 3)
    turn: np.ndarray        # (5, K): how z depends on yaw and pitch: jaw points slide along the outline
    noise: np.ndarray       # (): variance of a coordinate of a detected landmark
    between: np.ndarray     # (K, K): covariance of the identities of people, whose mean is 0
    within: np.ndarray      # (K, K): covariance of the z of one person's photos around their identity


class Fit(NamedTuple):
    """The face model, fitted to the landmarks of n frames."""
    pose: np.ndarray        # (n, 6)
    z: np.ndarray           # (n, K), without the part that depends on yaw and pitch
    opening: np.ndarray     # (n, 7): of lids and lips, in eye distances
    residual: np.ndarray    # (n, 68, 2): in eye distances


# ------------------------------------------------------------------------------- pose, shape and points

def rotation(pose):
    """The first two rows of R, which applies yaw, then pitch, then roll: pose (n, 6) -> (n, 2, 3)."""
    (cy, cp, cr), (sy, sp, sr) = np.cos(pose[:, :3]).T, np.sin(pose[:, :3]).T
    first = [cr * cy - sr * sp * sy, -sr * cp, cr * sy + sr * sp * cy]
    second = [sr * cy + cr * sp * sy, cr * cp, sr * sy - cr * sp * cy]
    return np.stack(first + second, axis=1).reshape(-1, 2, 3)


def angles(R):
    """The inverse of rotation(): (n, 2, 3) -> yaw, pitch and roll in radians, (n, 3)."""
    third = np.cross(R[:, 0], R[:, 1])
    yaw = np.arctan2(-third[:, 0], third[:, 2])
    pitch = np.arcsin(third[:, 1].clip(-1, 1))
    roll = np.arctan2(-R[:, 0, 1], R[:, 1, 1])
    return np.stack([yaw, pitch, roll], axis=1)


def shapes(pose, z, model):
    """The 3-D shapes before rotation: pose (n, 6), z (n, K) -> (n, 68, 3)."""
    return model.mean + np.tensordot(z + rotation_terms(pose) @ model.turn, model.basis, 1)


def rotation_terms(pose):
    """The terms of first and second order in yaw and pitch: pose (n, 6) -> (n, 5)."""
    yaw, pitch = pose[:, 0], pose[:, 1]
    return np.stack([yaw, pitch, yaw * yaw, yaw * pitch, pitch * pitch], axis=1)


def project(pose, shape):
    """pose (n, 6), shape (n, 68, 3) -> points (n, 68, 2)."""
    scale = np.exp(pose[:, 3])[:, None, None]
    return scale * (shape @ rotation(pose).transpose(0, 2, 1)) + pose[:, None, 4:]


def down(pose):
    """The projection of a vector that is one eye distance long and points down in the head's axes.

    pose (n, 6) -> (n, 2).
    """
    return rotation(pose)[:, :, 1] * np.exp(pose[:, 3:4])


def openings(points, pose):
    """How far lids and lips are open, in eye distances: points (n, 68, 2), pose (n, 6) -> (n, 7)."""
    along = down(pose)
    gap = (points[:, LOWER] - points[:, UPPER]) @ along[..., None]
    return gap[..., 0] / (along ** 2).sum(1, keepdims=True)


def shape_openings(shape):
    """The openings of 3-D shapes before rotation: (..., 68, 3) -> (..., 7)."""
    return shape[..., LOWER, 1] - shape[..., UPPER, 1]


# ---------------------------------------------------------------------------------------------- fitting

def fit(points, model, rounds=3):
    """Fit the model to landmarks (n, 68, 2) in pixels -> Fit.

    Pose and z are found alternately. After 3 rounds z is within 0.001 of its limit.
    """
    fits = []
    for rows in chunks(len(points)):
        p = np.asarray(points[rows], np.float64)
        shape = np.broadcast_to(model.mean, (len(p), 68, 3))
        for _ in range(rounds):
            pose = find_pose(p, shape)
            z = find_z(p, pose, model)
            shape = shapes(pose, z, model)
        residual = residuals(p, pose, shape).astype(np.float32)
        fits.append(Fit(pose, z, openings(p, pose), residual))
    return Fit(*map(np.concatenate, zip(*fits)))


def chunks(n, size=512):
    """Slices of at most `size` rows, because all frames of a long driver at once would need much memory."""
    return [slice(start, start + size) for start in range(0, n, size)]


def find_pose(points, shape):
    """Scaled orthography in closed form: the best affine map, then the rotation that is nearest to it.

    points (n, 68, 2), shape (n, 68, 3) -> pose (n, 6).
    """
    p0, x0 = points.mean(1), shape.mean(1)
    p, x = points - p0[:, None], shape - x0[:, None]
    affine = (p.transpose(0, 2, 1) @ x) @ np.linalg.inv(x.transpose(0, 2, 1) @ x)       # (n, 2, 3)
    u, s, vt = np.linalg.svd(affine, full_matrices=False)
    R, scale = u @ vt, s.mean(1, keepdims=True)
    shift = p0 - scale * (R @ x0[..., None])[..., 0]
    return np.concatenate([angles(R), np.log(scale), shift], axis=1)


def find_z(points, pose, model):
    """Ridge regression of z, whose prior variance is 1: points (n, 68, 2), pose (n, 6) -> (n, K)."""
    n, K, R = len(points), len(model.basis), rotation(pose)
    residual = residuals(points, pose, shapes(pose, np.zeros((n, K)), model))
    # J = R * basis. J^T J and J^T residual are computed without J itself, which is large.
    gram = np.tensordot(model.basis, model.basis, ((1,), (1,))).transpose(1, 3, 0, 2)   # (3, 3, K, K)
    JJ = ((R.transpose(0, 2, 1) @ R).reshape(n, 9) @ gram.reshape(9, -1)).reshape(n, K, K)
    J_residual = (residual @ R).reshape(n, 204) @ model.basis.reshape(K, 204).T         # (n, K)
    return np.linalg.solve(JJ + model.noise * np.eye(K), J_residual[..., None])[..., 0]


def residuals(points, pose, shape):
    """The differences between landmarks and a projected shape, in eye distances: (n, 68, 2)."""
    return (points - project(pose, shape)) / np.exp(pose[:, 3])[:, None, None]


# ------------------------------------------------------------------------------------ learning the model

def learn(people, directions=16, rounds=(24, 6), say=lambda message: None):
    """Landmarks (n_i, 68, 2) of each person i -> Face3D. The shapes are learned from mirrored copies too.

    directions, rounds: as in learn_shapes().  say: is called with a line about each round.
    """
    points = np.concatenate(people)
    points = points - points.mean(1, keepdims=True)
    points = points / (points ** 2).mean((1, 2), keepdims=True) ** 0.5
    points = np.concatenate([points, points[:, MIRRORED] * (-1, 1)])
    model = learn_shapes(points, directions, rounds, say)
    between, within, mean = covariances([fit(own, model).z for own in people])
    mean = model.mean + np.tensordot(mean, model.basis, 1)
    return model._replace(mean=mean, between=between, within=within)


def learn_shapes(points, directions, rounds, say):
    """Non-rigid structure from motion by alternating least squares: (n, 68, 2) -> Face3D without covariances.

    rounds: the number of rounds that learn the mean alone, and of those at the end with all basis shapes.
    In between, each round adds two basis shapes ("directions").
    """
    flat = points.mean(0)
    flat = (flat + flat[MIRRORED] * (-1, 1)) / 2 / np.linalg.norm(flat[36] - flat[45])
    cylinder = np.concatenate([flat, (1 - flat[:, :1] ** 2).clip(0) ** 0.5], axis=1)    # the initial mean
    model = Face3D(cylinder, np.zeros((0, 68, 3)), np.zeros((5, 0)), 1e-3, None, None)
    for step in range(sum(rounds) + (directions + 1) // 2):
        fitted, K = fit(points, model), len(model.basis)
        # 136 coordinates, less the numbers that were fitted to them
        noise = np.mean(fitted.residual ** 2, dtype=np.float64) * 136 / (136 - 6 - K)
        model = model._replace(noise=noise)
        error = 100 * np.linalg.norm(fitted.residual, axis=2).mean()
        say(f"round {step + 1}: {K} basis shapes, mean error {error:.2f} % of the eye distance")
        if step >= rounds[0] and K < directions:
            model = add_directions(fitted, model, min(2, directions - K))
            fitted = fit(points, model)
        mean, basis = solve_shapes(points, fitted)
        model = model._replace(mean=mean, basis=basis)

    # the part of z that yaw and pitch explain
    fitted = fit(points, model)
    terms = np.concatenate([np.ones((len(points), 1)), rotation_terms(fitted.pose)], axis=1)
    turn = np.linalg.lstsq(terms, fitted.z, rcond=None)[0]
    return model._replace(mean=model.mean + np.tensordot(turn[0], model.basis, 1), turn=turn[1:])


def add_directions(fitted, model, count):
    """Add the `count` largest principal components of the residuals to the basis.

    Residuals say nothing about the depth along the line of sight. solve_shapes() finds that afterwards.
    """
    in_head = (fitted.residual @ rotation(fitted.pose)).reshape(len(fitted.residual), -1)       # (n, 204)
    w, v = np.linalg.eigh(in_head.T @ in_head / len(in_head))
    new = (v[:, -count:] * w[-count:] ** 0.5).T.reshape(-1, 68, 3)
    basis = np.concatenate([model.basis, new])
    return model._replace(basis=basis, turn=np.zeros((5, len(basis))))


def solve_shapes(points, fitted):
    """Least squares over all frames, given poses and whitened z -> mean (68, 3), basis (K, 68, 3)."""
    pose, (n, K) = fitted.pose, fitted.z.shape
    w, v = np.linalg.eigh(fitted.z.T @ fitted.z / n)
    white = fitted.z @ (v[:, ::-1] / w[::-1] ** 0.5)                    # so that the prior variance of z is 1
    factors = np.concatenate([np.ones((n, 1)), white], axis=1)                          # (n, 1 + K)
    A = (factors[:, None, :, None] * rotation(pose)[:, :, None, :]).reshape(2 * n, -1)
    b = (points - pose[:, None, 4:]) / np.exp(pose[:, 3])[:, None, None]
    b = b.transpose(0, 2, 1).reshape(2 * n, 68)
    ridge = np.repeat([0.0] + K * [30.0], 3) + 1e-3                     # for depths that few frames show
    solved = np.linalg.solve(A.T @ A + np.diag(ridge), A.T @ b)
    solved = solved.reshape(1 + K, 3, 68).transpose(0, 2, 1)
    mean = (solved[0] + solved[0][MIRRORED] * (-1, 1, 1)) / 2
    unit = np.linalg.norm(mean[36] - mean[45])
    return (mean - mean.mean(0)) / unit, solved[1:] / unit


def covariances(z):
    """z (n_i, K) of each person i -> the covariance between people, that within a person, and the mean (K,).

    Both covariances are (K, K).
    """
    counts, means = np.array([len(own) for own in z]), np.stack([own.mean(0) for own in z])
    deviations = np.concatenate([own - mean for own, mean in zip(z, means)])
    within = deviations.T @ deviations / (counts - 1).sum()
    between = np.cov(means.T) - within * np.mean(1 / counts)        # less the noise of means over few photos
    w, v = np.linalg.eigh(between)
    return (v * w.clip(1e-4)) @ v.T, within, means.mean(0)


def load_face3d(path=FACE):
    """Read a file that this module's command wrote -> Face3D. Raises UserError if it is something else."""
    try:
        with np.load(path, allow_pickle=False) as file:
            model = Face3D(*(file[name].astype(np.float64) for name in Face3D._fields))
        K = len(model.basis)
        if [array.shape for array in model] != [(68, 3), (K, 68, 3), (5, K), (), (K, K), (K, K)]:
            raise ValueError("its arrays do not have the shapes of a face model")
        return model
    except Exception as e:  # numpy and zipfile raise many types on foreign or damaged files
        raise_if_out_of_memory(e)
        raise UserError(f"{path} is not a 3-D face model ({e}): restore weights/face3d.npz, or make it "
                        "with python -m beyond.face3d") from None


# --------------------------------------------------------------------------------------------- command

def read_people(folder, most=32):
    """-> [(n_i, 68, 2)]: landmarks of at most `most` evenly spaced frames of each sequence in a folder."""
    videos, people = PreparedVideos(folder), []
    for i in range(len(videos)):
        try:
            points = videos.landmarks(i)
        except UserError as e:
            warn(e)
            continue
        chosen = np.linspace(0, len(points) - 1, min(len(points), most)).round().astype(int)
        people.append(points[chosen])
    return people


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--data", default="prepared", metavar="DIR", help="folder that data.py prepared (default: prepared)")
    add("--out", default=FACE, metavar="FILE",
        help="where to write the model (default: weights/face3d.npz, which replaces the bundled one)")
    args = parser.parse_args()
    check_paths([], [args.out])
    people = read_people(args.data)
    frames = sum(map(len, people))
    if len(people) < 30 or frames < 300:
        raise UserError(f"{args.data} has {frames} frames of {len(people)} people: at least 300 frames of 30 "
                        "people are needed")
    model = learn(people, say=print)
    with atomic(args.out) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **{name: np.float32(array) for name, array in model._asdict().items()})
    print(f"wrote {args.out}: from {frames} frames of {len(people)} people")


if __name__ == "__main__":
    run(main)
