"""A linear 3-D face of the 68 landmarks, learned from 2-D points by non-rigid structure from motion.

    face = load_face3d()                    # weights/face3d.npz
    f = fit(points, face)                   # of every frame: pose, coefficients z, openings, rest

    python -m beyond.face3d --data prepared --out weights/face3d.npz    # makes that file in a few minutes

A face that a camera sees from afar is

    points = scale * R * (mean + z * basis) + shift + rest

with a pose (R, scale, shift), coefficients z, and a rest that the model cannot say. Lengths on a face
are in eye distances (of the outer corners); x to the picture's right, y down, z to the viewer. A pose is
(yaw, pitch, roll, log scale, x, y): yaw > 0 looks to the picture's right, pitch > 0 up.
"""
import os
from typing import NamedTuple

import numpy as np

from data import PreparedVideos
from media.faces import MIRRORED
from runtime.files import UserError, atomic, check_paths, make_parser, run, warn

FACE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "weights", "face3d.npz")

# where a face opens: 4 pairs of points on upper and lower lids, 3 on the inner lips
UPPER, LOWER = np.array([37, 38, 43, 44, 61, 62, 63]), np.array([41, 40, 47, 46, 67, 66, 65])
LIDS, LIPS = slice(0, 4), slice(4, 7)


class Face3D(NamedTuple):
    """What weights/face3d.npz holds."""
    mean: np.ndarray        # (68, 3), symmetric
    basis: np.ndarray       # (K, 68, 3)
    turn: np.ndarray        # (5, K): z's mean at a yaw and pitch: a jaw's points slide along its outline
    noise: np.ndarray       # (): variance of a detected coordinate
    between: np.ndarray     # (K, K): covariance of people's identities, whose mean is 0
    within: np.ndarray      # (K, K): covariance of a person's photos around their identity


class Fit(NamedTuple):
    pose: np.ndarray        # (n, 6)
    z: np.ndarray           # (n, K), without its mean at that yaw and pitch
    opening: np.ndarray     # (n, 7): of lids and lips
    rest: np.ndarray        # (n, 68, 2)


# --------------------------------------------------------------------------------------- face and pose

def rotation(pose):
    """The first two rows of R, which turns, then nods, then tilts: pose (n, 6) -> (n, 2, 3)."""
    (cy, cp, cr), (sy, sp, sr) = np.cos(pose[:, :3]).T, np.sin(pose[:, :3]).T
    first = [cr * cy - sr * sp * sy, -sr * cp, cr * sy + sr * sp * cy]
    second = [sr * cy + cr * sp * sy, cr * cp, sr * sy - cr * sp * cy]
    return np.stack(first + second, axis=1).reshape(-1, 2, 3)


def angles(R):
    """The inverse: (n, 2, 3) -> yaw, pitch, roll (n, 3)."""
    third = np.cross(R[:, 0], R[:, 1])
    yaw = np.arctan2(-third[:, 0], third[:, 2])
    pitch = np.arcsin(third[:, 1].clip(-1, 1))
    roll = np.arctan2(-R[:, 0, 1], R[:, 1, 1])
    return np.stack([yaw, pitch, roll], axis=1)


def shapes(pose, z, face):
    """pose (n, 6), z (n, K) -> (n, 68, 3), not turned yet."""
    return face.mean + np.tensordot(z + turns(pose) @ face.turn, face.basis, 1)


def turns(pose):
    yaw, pitch = pose[:, 0], pose[:, 1]
    return np.stack([yaw, pitch, yaw * yaw, yaw * pitch, pitch * pitch], axis=1)


def project(pose, shape):
    """pose (n, 6), shape (n, 68, 3) -> points (n, 68, 2)."""
    scale = np.exp(pose[:, 3])[:, None, None]
    return scale * (shape @ rotation(pose).transpose(0, 2, 1)) + pose[:, None, 4:]


def down(pose):
    """An eye distance along the head's own downward direction, in the picture: (n, 6) -> (n, 2)."""
    return rotation(pose)[:, :, 1] * np.exp(pose[:, 3:4])


def openings(points, pose):
    """How far lids and lips are open: points (n, 68, 2), pose (n, 6) -> (n, 7)."""
    along = down(pose)
    gap = (points[:, LOWER] - points[:, UPPER]) @ along[..., None]
    return gap[..., 0] / (along ** 2).sum(1, keepdims=True)


def gaps(shape):
    """The same of unturned shapes: (..., 68, 3) -> (..., 7)."""
    return shape[..., LOWER, 1] - shape[..., UPPER, 1]


# ---------------------------------------------------------------------------------------------- fitting

def fit(points, face, rounds=3):
    """points (n, 68, 2) in pixels -> Fit. Pose and z by turns: 3 rounds bring z to 0.001 of the end."""
    parts = []
    for rows in chunks(len(points)):
        p = np.asarray(points[rows], np.float64)
        shape = np.broadcast_to(face.mean, (len(p), 68, 3))
        for _ in range(rounds):
            pose = find_pose(p, shape)
            z = find_z(p, pose, face)
            shape = shapes(pose, z, face)
        rest = remainder(p, pose, shape).astype(np.float32)
        parts.append(Fit(pose, z, openings(p, pose), rest))
    return Fit(*map(np.concatenate, zip(*parts)))


def chunks(n, size=512):
    """Slices of at most `size` rows: a long driver's frames would need much memory all at once."""
    return [slice(start, start + size) for start in range(0, n, size)]


def find_pose(points, shape):
    """Scaled orthography in closed form: an affine map, and the rotation next to it.

    points (n, 68, 2), shape (n, 68, 3) -> pose (n, 6).
    """
    p0, x0 = points.mean(1), shape.mean(1)
    p, x = points - p0[:, None], shape - x0[:, None]
    affine = (p.transpose(0, 2, 1) @ x) @ np.linalg.inv(x.transpose(0, 2, 1) @ x)       # (n, 2, 3)
    u, s, vt = np.linalg.svd(affine, full_matrices=False)
    R, scale = u @ vt, s.mean(1, keepdims=True)
    shift = p0 - scale * (R @ x0[..., None])[..., 0]
    return np.concatenate([angles(R), np.log(scale), shift], axis=1)


def find_z(points, pose, face):
    """Ridge regression, the noise's variance against z's, which is 1: (n, 68, 2), (n, 6) -> (n, K)."""
    n, K, R = len(points), len(face.basis), rotation(pose)
    rest = remainder(points, pose, shapes(pose, np.zeros((n, K)), face))
    # J = R * basis; J^T J and J^T rest without J itself, which is large
    gram = np.tensordot(face.basis, face.basis, ((1,), (1,))).transpose(1, 3, 0, 2)     # (3, 3, K, K)
    JJ = ((R.transpose(0, 2, 1) @ R).reshape(n, 9) @ gram.reshape(9, -1)).reshape(n, K, K)
    J_rest = (rest @ R).reshape(n, 204) @ face.basis.reshape(K, 204).T                  # (n, K)
    return np.linalg.solve(JJ + face.noise * np.eye(K), J_rest[..., None])[..., 0]


def remainder(points, pose, shape):
    """What a shape leaves of the points, in eye distances: (n, 68, 2)."""
    return (points - project(pose, shape)) / np.exp(pose[:, 3])[:, None, None]


# ------------------------------------------------------------------------------------- learning the face

def learn(people, directions=16, rounds=(24, 6), say=lambda message: None):
    """Landmarks (n_i, 68, 2) of each person -> Face3D. Mirrored copies are added."""
    points = np.concatenate(people)
    points = points - points.mean(1, keepdims=True)
    points = points / (points ** 2).mean((1, 2), keepdims=True) ** 0.5
    points = np.concatenate([points, points[:, MIRRORED] * (-1, 1)])
    face = learn_shapes(points, directions, rounds, say)
    between, within, mean = covariances([fit(part, face).z for part in people])
    mean = face.mean + np.tensordot(mean, face.basis, 1)
    return face._replace(mean=mean, between=between, within=within)


def learn_shapes(points, directions, rounds, say):
    """Non-rigid structure from motion by alternating least squares: (n, 68, 2) -> Face3D, no covariances.

    rounds: so many with the mean alone; then two directions more in each; then so many with all.
    """
    flat = points.mean(0)
    flat = (flat + flat[MIRRORED] * (-1, 1)) / 2 / np.linalg.norm(flat[36] - flat[45])
    cylinder = np.concatenate([flat, (1 - flat[:, :1] ** 2).clip(0) ** 0.5], axis=1)    # where to start
    face = Face3D(cylinder, np.zeros((0, 68, 3)), np.zeros((5, 0)), 1e-3, None, None)
    for step in range(sum(rounds) + (directions + 1) // 2):
        f, K = fit(points, face), len(face.basis)
        face = face._replace(noise=np.mean(f.rest ** 2, dtype=np.float64) * 136 / (136 - 6 - K))
        left = 100 * np.linalg.norm(f.rest, axis=2).mean()
        say(f"round {step + 1}: {K} directions leave {left:.2f} % of the eye distance")
        if step >= rounds[0] and K < directions:
            face = grow(f, face, min(2, directions - K))
            f = fit(points, face)
        mean, basis = solve_shapes(points, f)
        face = face._replace(mean=mean, basis=basis)

    # what of z comes from turning
    f = fit(points, face)
    known = np.concatenate([np.ones((len(points), 1)), turns(f.pose)], axis=1)
    turn = np.linalg.lstsq(known, f.z, rcond=None)[0]
    return face._replace(mean=face.mean + np.tensordot(turn[0], face.basis, 1), turn=turn[1:])


def grow(f, face, count):
    """More directions: the largest of what the face cannot say yet, lifted into its plane."""
    lifted = (f.rest @ rotation(f.pose)).reshape(len(f.rest), -1)
    w, v = np.linalg.eigh(lifted.T @ lifted / len(lifted))
    new = (v[:, -count:] * w[-count:] ** 0.5).T.reshape(-1, 68, 3)
    basis = np.concatenate([face.basis, new])
    return face._replace(basis=basis, turn=np.zeros((5, len(basis))))


def solve_shapes(points, f):
    """Least squares over all frames, given poses and z, made white -> mean (68, 3), basis (K, 68, 3)."""
    n, K = f.z.shape
    w, v = np.linalg.eigh(f.z.T @ f.z / n)
    white = f.z @ (v[:, ::-1] / w[::-1] ** 0.5)
    factors = np.concatenate([np.ones((n, 1)), white], axis=1)                          # (n, 1 + K)
    A = (factors[:, None, :, None] * rotation(f.pose)[:, :, None, :]).reshape(2 * n, -1)
    b = (points - f.pose[:, None, 4:]) / np.exp(f.pose[:, 3])[:, None, None]
    b = b.transpose(0, 2, 1).reshape(2 * n, 68)
    ridge = np.repeat([0.0] + K * [30.0], 3) + 1e-3                 # for depths that few frames show
    solved = np.linalg.solve(A.T @ A + np.diag(ridge), A.T @ b)
    solved = solved.reshape(1 + K, 3, 68).transpose(0, 2, 1)
    mean = (solved[0] + solved[0][MIRRORED] * (-1, 1, 1)) / 2
    unit = np.linalg.norm(mean[36] - mean[45])
    return (mean - mean.mean(0)) / unit, solved[1:] / unit


def covariances(z):
    """z (n_i, K) of each person -> covariances between people and within one (K, K), the mean (K,)."""
    counts, means = np.array([len(part) for part in z]), np.stack([part.mean(0) for part in z])
    own = np.concatenate([part - mean for part, mean in zip(z, means)])
    within = own.T @ own / (counts - 1).sum()
    between = np.cov(means.T) - within * np.mean(1 / counts)        # a mean of few is noisy itself
    w, v = np.linalg.eigh(between)
    return (v * w.clip(1e-4)) @ v.T, within, means.mean(0)


def load_face3d(path=FACE):
    """-> Face3D. UserError if the file is none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            face = Face3D(*(file[name].astype(np.float64) for name in Face3D._fields))
        K = len(face.basis)
        if [part.shape for part in face] != [(68, 3), (K, 68, 3), (5, K), (), (K, K), (K, K)]:
            raise ValueError("its arrays are not those of a face")
        return face
    except Exception as e:  # numpy and zipfile raise many types on foreign or damaged files
        raise UserError(f"{path} is not a 3-D face of beyond.face3d ({e})") from None


# --------------------------------------------------------------------------------------------- command

def read_people(folder, most=32):
    """The landmarks of a prepared folder's sequences, at most so many frames of each, evenly spread."""
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
    add("--data", default="prepared", metavar="DIR", help="a prepared folder (default: prepared)")
    add("--out", default=FACE, metavar="FILE", help="(default: the bundled weights/face3d.npz)")
    args = parser.parse_args()
    check_paths([], [args.out])
    people = read_people(args.data)
    frames = sum(map(len, people))
    if len(people) < 30 or frames < 300:
        raise UserError(f"{args.data} has {frames} frames of {len(people)} people: 300 of 30 are needed")
    face = learn(people, say=print)
    with atomic(args.out) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **{name: np.float32(part) for name, part in face._asdict().items()})
    print(f"wrote {args.out}: from {frames} frames of {len(people)} people")


if __name__ == "__main__":
    run(main)
