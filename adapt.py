"""Someone else drives: the source's face under the driver's motion, by a linear 3-D face of the 68 points.

    python adapt.py --data prepared --out weights/face3d.npz        # makes the bundled file, minutes on one core

The paper feeds the driver's landmarks as they are and names the limit itself: "lack of landmark adaptation ... leads to
a noticeable personality mismatch". This goes beyond it. A face that a camera sees from afar is

    points = scale * R * (mean + z * basis) + shift + rest

with a pose (R, scale, shift), coefficients z, and a rest that the model cannot say. z is who somebody is plus what the
face is doing; how z varies between people and within one person tells them apart. So a source keeps its identity and
takes over the driver's movements.

Lengths on a face are in eye distances (of the outer corners); x to the picture's right, y down, z to the viewer. A pose
is (yaw, pitch, roll, log scale, x, y): yaw > 0 looks to the picture's right, pitch > 0 up.
"""
import os
from typing import NamedTuple

import numpy as np

from data import MIRRORED, PreparedVideos
from faces import face_box
from files import UserError, atomic, check_paths, make_parser, run, warn

FACE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "weights", "face3d.npz")
CLIP = 4                                # the frames of a clip are worth so many independent photos
TURN = np.radians([50, 30])             # relative motion brings no head beyond this yaw and pitch

# where a face opens: the upper and lower lids (4 pairs) and inner lips (3 pairs), and the outer lips that go along
UPPER, LOWER = np.array([37, 38, 43, 44, 61, 62, 63]), np.array([41, 40, 47, 46, 67, 66, 65])
OUTER_UPPER, OUTER_LOWER = np.array([50, 51, 52]), np.array([58, 57, 56])
LIDS, LIPS = slice(0, 4), slice(4, 7)
SHUT = 0.005                            # lips that touch


class Face(NamedTuple):
    """The linear 3-D face, weights/face3d.npz."""
    mean: np.ndarray        # (68, 3), symmetric
    basis: np.ndarray       # (K, 68, 3)
    turn: np.ndarray        # (5, K): z's mean at a yaw and pitch, since a jaw's points slide along its outline
    noise: np.ndarray       # (): variance of a detected coordinate
    between: np.ndarray     # (K, K): covariance of people's identities, whose mean is 0
    within: np.ndarray      # (K, K): covariance of a person's photos around their identity


class Fit(NamedTuple):
    pose: np.ndarray        # (n, 6)
    z: np.ndarray           # (n, K), without its mean at that yaw and pitch
    opening: np.ndarray     # (n, 7): of lids and lips
    rest: np.ndarray        # (n, 68, 2)


class Source(NamedTuple):
    """Whose face it is; what a person file holds."""
    identity: np.ndarray    # (K,)
    rest: np.ndarray        # (68, 3): what the model cannot say of this face, in the face's plane
    pose: np.ndarray        # (6,): of the photo, in its crop
    z: np.ndarray           # (K,): of the photo, identity and expression
    opening: np.ndarray     # (7,): of the photo


# --------------------------------------------------------------------------------------- face and pose

def rotation(pose):
    """The first two rows of R, which turns, then nods, then tilts: pose (n, 6) -> (n, 2, 3)."""
    (cy, cp, cr), (sy, sp, sr) = np.cos(pose[:, :3]).T, np.sin(pose[:, :3]).T
    return np.stack([cr * cy - sr * sp * sy, -sr * cp, cr * sy + sr * sp * cy,
                     sr * cy + cr * sp * sy, cr * cp, sr * sy - cr * sp * cy], axis=1).reshape(-1, 2, 3)


def angles(R):
    """The inverse: (n, 2, 3) -> yaw, pitch, roll (n, 3)."""
    third = np.cross(R[:, 0], R[:, 1])
    return np.stack([np.arctan2(-third[:, 0], third[:, 2]), np.arcsin(third[:, 1].clip(-1, 1)),
                     np.arctan2(-R[:, 0, 1], R[:, 1, 1])], axis=1)


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


def find_pose(points, shape):
    """Scaled orthography in closed form, an affine map and the rotation next to it: (n, 68, 2), (n, 68, 3) -> (n, 6)."""
    p0, x0 = points.mean(1), shape.mean(1)
    p, x = points - p0[:, None], shape - x0[:, None]
    affine = (p.transpose(0, 2, 1) @ x) @ np.linalg.inv(x.transpose(0, 2, 1) @ x)       # (n, 2, 3)
    u, s, vt = np.linalg.svd(affine, full_matrices=False)
    R, scale = u @ vt, s.mean(1, keepdims=True)
    return np.concatenate([angles(R), np.log(scale), p0 - scale * (R @ x0[..., None])[..., 0]], axis=1)


def find_z(points, pose, face):
    """Ridge regression, the noise's variance against z's, which is 1: points (n, 68, 2), pose (n, 6) -> (n, K)."""
    R, K = rotation(pose), len(face.basis)
    rest = remainder(points, pose, shapes(pose, np.zeros((len(points), K)), face))
    gram = np.tensordot(face.basis, face.basis, ((1,), (1,))).transpose(1, 3, 0, 2)     # (3, 3, K, K)
    normal = (R.transpose(0, 2, 1) @ R).reshape(-1, 9) @ gram.reshape(9, -1)            # of J^T J, J = R basis
    normal = normal.reshape(len(points), K, K) + face.noise * np.eye(K)
    wanted = (rest @ R).reshape(-1, 204) @ face.basis.reshape(K, 204).T
    return np.linalg.solve(normal, wanted[..., None])[..., 0]


def remainder(points, pose, shape):
    """What a shape leaves of the points, in eye distances: (n, 68, 2)."""
    return (points - project(pose, shape)) / np.exp(pose[:, 3])[:, None, None]


def fit(points, face, rounds=3, chunk=512):
    """points (n, 68, 2) in pixels -> Fit. Pose and z by turns: after 3 rounds z is within 0.001 of the end."""
    parts = []
    for start in range(0, len(points), chunk):              # a long driver has many
        p = np.asarray(points[start:start + chunk], np.float64)
        shape = face.mean + np.zeros((len(p), 1, 1))
        for _ in range(rounds):
            pose = find_pose(p, shape)
            z = find_z(p, pose, face)
            shape = shapes(pose, z, face)
        parts.append(Fit(pose, z, openings(p, pose), remainder(p, pose, shape).astype(np.float32)))
    return Fit(*map(np.concatenate, zip(*parts)))


def down(pose):
    """One eye distance along the head's own downward direction, in the picture: (n, 6) -> (n, 2)."""
    return rotation(pose)[:, :, 1] * np.exp(pose[:, 3:4])


def openings(points, pose):
    """How far lids and lips are open: points (n, 68, 2), pose (n, 6) -> (n, 7)."""
    along = down(pose)
    gap = (points[:, LOWER] - points[:, UPPER]) @ along[..., None]
    return gap[..., 0] / (along ** 2).sum(1, keepdims=True)


def gaps(shape):
    """The same of unturned shapes: (..., 68, 3) -> (..., 7)."""
    return shape[..., LOWER, 1] - shape[..., UPPER, 1]


# ------------------------------------------------------------------------------------------- who it is

def identity(means, counts, face):
    """Who it is: the posterior's mean, with people and a person's photos both Gaussian -> (K,).

    means (m, K): z of each photo, or its mean over a clip's frames.  counts (m,): how many photos each is worth.
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
    first = fits[0]
    return Source(who, np.average(lifted, axis=0, weights=counts), first.pose[0], first.z[0], first.opening[0])


# ----------------------------------------------------------------------------------------- steadiness

def steady(f, seconds, shot, found):
    """The Fit of a track without the detector's tremble.

    seconds (n,); shot (n,): its number, nothing is mixed across a cut; found (n,): a frame without a face lies
    between its neighbours.
    """
    values = np.concatenate([f.pose, f.z, f.opening], axis=1).astype(np.float64)
    third = np.abs(np.diff(values[found], 3, axis=0))       # movements hardly have any, white noise 20 of its variance
    noise = np.median(third, axis=0) / 0.6745 / 20 ** 0.5 if len(third) else np.zeros(values.shape[1])
    for number in np.unique(shot):
        own = np.flatnonzero(shot == number)
        seen = own[found[own]]
        for column in values.T:
            column[own] = np.interp(seconds[own], seconds[seen], column[seen])
        # sigma in seconds, width in deviations of the noise; both lids, and the lips, move together
        for part, sigma, width, together in [(slice(0, 6), 0.12, 5, False), (slice(6, -7), 0.1, 4, False),
                                             (slice(-7, -3), 0.08, 2, True), (slice(-3, None), 0.08, 2, True)]:
            values[own, part] = smooth(values[own, part], seconds[own], sigma, width * noise[part], together)
    return f._replace(pose=values[:, :6], z=values[:, 6:-7], opening=values[:, -7:])


def smooth(values, seconds, sigma, width, together):
    """Still what only trembles, keep what moves: values (n, d), columns together or one by one -> (n, d).

    A bilateral filter: a frame counts in so far as it is near in time (sigma, in seconds) and in value (width (d,)).
    So a blink keeps its depth, and nothing comes late.
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
        result = total / weights.clip(1e-30)
    return result


def shots(points):
    """The number of the shot that each frame (n, 68, 2) belongs to: the face jumps, as in steady_boxes."""
    boxes = face_box(points)
    jump = np.linalg.norm(np.diff(boxes[:, :2], axis=0, prepend=boxes[:1, :2]), axis=1)
    return np.cumsum(jump > boxes[:, 2])


# --------------------------------------------------------------------------------------------- motion

def adapt(track, source, motion, size, face):
    """The landmarks that drive `source`: a Track of n frames -> (n, 68, 2) in pixels of a size x size crop.

    motion "relative": the photo's pose and expression plus the driver's change from its own neutral, framed as the
    photo.  "absolute": the driver's pose and expression on the source's shape, framed as the driver.  In both, lips
    are as far open as the driver's, and lids by the driver's share.  "paper": the driver's landmarks as they are.
    """
    points, found = track.in_crops(size), track.found
    if motion == "paper":
        return points
    driver = steady(fit(points, face), track.seconds(), shots(track.points), found)
    neutral = Fit(*(np.median(part[found], axis=0) for part in driver))
    opening = take_over(driver.opening, neutral.opening, source, face)
    if motion == "relative":
        change = driver.pose - neutral.pose
        change[:, 4:] *= np.exp(source.pose[3] - neutral.pose[3])
        pose, limit = source.pose + change, np.maximum(TURN, np.abs(source.pose[:2]))
        pose[:, :2] = pose[:, :2].clip(-limit, limit)
        return place(pose, source.z + driver.z - neutral.z, opening, source, face)
    who = identity(driver.z[found].mean(0)[None], [min(found.sum(), CLIP)], face)
    result = place(driver.pose, source.identity + driver.z - who, opening, source, face)
    box, wanted = np.median(face_box(result), axis=0), np.median(face_box(points), axis=0)
    return (result - box[:2]) * (wanted[2] / box[2]) + wanted[:2]       # a longer face needs a wider crop


def take_over(driver, neutral, source, face):
    """Openings of the driver (n, 7) and of its neutral (7,) -> of the source (n, 7)."""
    expected = gaps(face.mean + np.tensordot(source.identity, face.basis, 1))
    opened = np.maximum(source.opening, 0.7 * expected)[LIDS]           # the photo may have been taken in a blink ...
    share = driver[:, LIDS] / np.maximum(neutral, 0.4 * gaps(face.mean))[LIDS]          # ... the driver may be asleep
    return np.concatenate([opened * share.clip(0, 1.6), driver[:, LIPS].clip(SHUT)], axis=1)


def place(pose, z, opening, source, face):
    """pose (n, 6), z (n, K), opening (n, 7) -> landmarks (n, 68, 2) of the source, with exactly these openings."""
    shape = shapes(pose, z, face) + source.rest
    # the likeliest expression with these lips: the jaw goes along
    of_z = gaps(face.basis).T[LIPS]                                                     # (3, K)
    gain = face.within @ of_z.T @ np.linalg.inv(of_z @ face.within @ of_z.T + 2 * face.noise * np.eye(3))
    shape += np.tensordot((opening - gaps(shape))[:, LIPS] @ gain.T, face.basis, 1)
    points = project(pose, shape)
    # what is missing yet, half from the upper lid or lip and half from the lower
    move = 0.5 * (opening - openings(points, pose))[..., None] * down(pose)[:, None]    # (n, 7, 2)
    points[:, UPPER] -= move
    points[:, LOWER] += move
    points[:, OUTER_UPPER] -= move[:, LIPS]
    points[:, OUTER_LOWER] += move[:, LIPS]
    return points.astype(np.float32)


def views(source, face, yaws):
    """The photo's own expression from new viewpoints (the paper's Fig. 6): yaws (n,) in degrees -> (n, 68, 2)."""
    pose, z, opening = (np.tile(part, (len(yaws) + 1, 1)) for part in (source.pose, source.z, source.opening))
    pose[1:, 0] = np.radians(yaws)
    points = place(pose, z, opening, source, face)          # the first as the photo is, which gives the frame
    box = face_box(points)[:, None]
    return ((points - box[..., :2]) * (box[0, :, 2:] / box[..., 2:]) + box[0, :, :2])[1:]


# ------------------------------------------------------------------------------------- learning the face

def learn(people, directions=16, rounds=(24, 6), say=lambda message: None):
    """Landmarks (n_i, 68, 2) of each person, n_i > 1 for some -> Face. Mirrored copies are added."""
    points = np.concatenate(people)
    points = points - points.mean(1, keepdims=True)
    points = points / (points ** 2).mean((1, 2), keepdims=True) ** 0.5
    face = learn_shapes(np.concatenate([points, points[:, MIRRORED] * (-1, 1)]), directions, rounds, say)
    between, within, mean = covariances([fit(part, face).z for part in people])
    mean = face.mean + np.tensordot(mean, face.basis, 1)
    return face._replace(mean=mean, between=between, within=within)


def learn_shapes(points, directions, rounds, say):
    """Non-rigid structure from motion by alternating least squares: points (n, 68, 2) -> Face without covariances.

    rounds: so many with the mean alone, then two directions more in each, then so many with all.
    """
    flat = points.mean(0)
    flat = (flat + flat[MIRRORED] * (-1, 1)) / 2 / np.linalg.norm(flat[36] - flat[45])
    cylinder = np.concatenate([flat, (1 - flat[:, :1] ** 2).clip(0) ** 0.5], axis=1)    # where to start
    face = Face(cylinder, np.zeros((0, 68, 3)), np.zeros((5, 0)), 1e-3, None, None)
    for step in range(sum(rounds) + (directions + 1) // 2):
        f, K = fit(points, face), len(face.basis)
        face = face._replace(noise=np.mean(f.rest ** 2, dtype=np.float64) * 136 / (136 - 6 - K))
        error = np.linalg.norm(f.rest, axis=2).mean()
        say(f"round {step + 1}: {K} directions leave {100 * error:.2f} % of the eye distance")
        if step >= rounds[0] and K < directions:
            face = grow(f, face, min(2, directions - K))
            f = fit(points, face)
        mean, basis = solve_shapes(points, f)
        face = face._replace(mean=mean, basis=basis)
    z = fit(points, face).z
    known = np.concatenate([np.ones((len(z), 1)), turns(f.pose)], axis=1)
    turn = np.linalg.lstsq(known, z, rcond=None)[0]         # what of z comes from turning
    return face._replace(mean=face.mean + np.tensordot(turn[0], face.basis, 1), turn=turn[1:])


def grow(f, face, count):
    """More directions: the largest of what the face cannot say yet, lifted into its plane."""
    lifted = (f.rest @ rotation(f.pose)).reshape(len(f.rest), -1)
    w, v = np.linalg.eigh(lifted.T @ lifted / len(lifted))
    new = (v[:, -count:] * w[-count:] ** 0.5).T.reshape(-1, 68, 3)
    basis = np.concatenate([face.basis, new])
    return face._replace(basis=basis, turn=np.zeros((5, len(basis))))


def solve_shapes(points, f):
    """Mean (68, 3) and basis (K, 68, 3), one least squares over all frames: poses and z are given, z made white."""
    n, K = f.z.shape
    w, v = np.linalg.eigh(f.z.T @ f.z / n)
    factors = np.concatenate([np.ones((n, 1)), f.z @ (v[:, ::-1] / w[::-1] ** 0.5)], axis=1)
    A = (factors[:, None, :, None] * rotation(f.pose)[:, :, None, :]).reshape(2 * n, -1)
    b = (points - f.pose[:, None, 4:]) / np.exp(f.pose[:, 3])[:, None, None]
    ridge = np.repeat([0.0] + K * [30.0], 3) + 1e-3         # for depths that few frames show
    solved = np.linalg.solve(A.T @ A + np.diag(ridge), A.T @ b.transpose(0, 2, 1).reshape(2 * n, 68))
    solved = solved.reshape(1 + K, 3, 68).transpose(0, 2, 1)
    mean = (solved[0] + solved[0][MIRRORED] * (-1, 1, 1)) / 2
    unit = np.linalg.norm(mean[36] - mean[45])
    return (mean - mean.mean(0)) / unit, solved[1:] / unit


def covariances(z):
    """z (n_i, K) of each person -> covariances between people and within a person (K, K), people's mean (K,)."""
    means, counts = np.stack([part.mean(0) for part in z]), np.array([len(part) for part in z])
    own = np.concatenate([part - mean for part, mean in zip(z, means)])
    within = own.T @ own / (counts - 1).sum()
    w, v = np.linalg.eigh(np.cov(means.T) - within * np.mean(1 / counts))               # a mean of few is noisy itself
    return (v * w.clip(1e-4)) @ v.T, within, means.mean(0)


# --------------------------------------------------------------------------------------- the bundled file

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


def read_people(folder, most=32):
    """The landmarks of a prepared folder's sequences, at most so many frames of each, evenly spread."""
    videos, people = PreparedVideos(folder), []
    for i in range(len(videos)):
        try:
            points = videos._open(i)["landmarks"].numpy()
            people.append(points[np.linspace(0, len(points) - 1, min(len(points), most)).round().astype(int)])
        except UserError as e:
            warn(e)
    return people


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--data", default="prepared", metavar="DIR", help="a prepared folder (default: prepared)")
    parser.add_argument("--out", default=FACE, metavar="FILE", help="(default: the bundled weights/face3d.npz)")
    args = parser.parse_args()
    check_paths([], [args.out])
    people = read_people(args.data)
    frames = sum(map(len, people))
    if len(people) < 30 or frames < 300:
        raise UserError(f"{frames} frames of {len(people)} people in {args.data} are too few: 300 of 30 are needed")
    face = learn(people, say=print)
    with atomic(args.out) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **{name: np.float32(part) for name, part in face._asdict().items()})
    print(f"wrote {args.out}: from {frames} frames of {len(people)} people")


if __name__ == "__main__":
    run(main)
