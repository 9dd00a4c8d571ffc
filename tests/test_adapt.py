"""adapt.py and face3d.py: the linear 3-D face, who somebody is, steadiness, motion, new viewpoints.

All on points from a known face.
"""
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import infer
from beyond import adapt, face3d
from conftest import PHOTO, fail, succeed
from media.decode import read_video
from media.faces import face_box
from media.tracking import Track, save_track
from runtime.files import UserError, save_tensors

SIZE = 256


@pytest.fixture(scope="module")
def bundled():
    return face3d.load_face3d()


def eye_distance(points):
    return np.linalg.norm(points[..., 36, :] - points[..., 45, :], axis=-1).mean()


def change(a, b):
    """Mean distance of the landmarks, in per cent of the eye distance."""
    return 100 * np.linalg.norm(a - b, axis=-1).mean() / eye_distance(b)


def draw(bundled, n, seed=0, yaw=0.3, z=None, noise=0):
    """n faces with known pose and coefficients -> points (n, 68, 2), pose, z."""
    rng = np.random.default_rng(seed)
    pose = np.c_[rng.normal(0, yaw, n), rng.normal(0, 0.1, (n, 2)), np.log(90) + rng.normal(0, 0.05, n),
                 rng.normal(128, 5, (n, 2))]
    z = rng.normal(0, 1, (n, len(bundled.basis))) if z is None else z
    points = face3d.project(pose, face3d.shapes(pose, z, bundled))
    return points + rng.normal(0, noise * 90, points.shape), pose, z


def track(points, found=None, rate=25):
    n = len(points)
    return Track(points.astype(np.float32), np.ones(n, bool) if found is None else found, np.arange(n),
                 np.array([1, rate]), "dlib")


def talk(bundled, n=100, seed=1, opening=0.15, smile=0.0):
    """A driver who nods slowly, opens the mouth every second and blinks every other.

    -> points, opening of the lips (n,).
    """
    rng = np.random.default_rng(seed)
    t = np.arange(n) / 25
    z = np.tile(rng.multivariate_normal(np.zeros(len(bundled.basis)), bundled.between), (n, 1))
    pose = np.c_[0.2 * np.sin(t), 0.1 * np.sin(1.7 * t), 0.1 * np.cos(t),
                 np.full(n, np.log(80)), np.full((n, 2), 128)]
    wanted = np.tile(face3d.gaps(bundled.mean), (n, 1))
    wanted[:, face3d.LIPS] = opening * np.maximum(0, np.sin(2 * np.pi * t))[:, None]
    wanted[n // 2 - 1:n // 2 + 2, face3d.LIDS] *= np.array([[0.5], [0.2], [0.5]])
    still = adapt.Source(z[0], np.zeros((68, 3)), pose[0], z[0], wanted[0])
    return adapt.place(pose, z, wanted, still, bundled), wanted


def opened(points, bundled):
    return face3d.openings(points, face3d.fit(points, bundled).pose)


# ------------------------------------------------------------------------------------------- the face itself

def test_a_known_face_is_found_again(bundled):
    """Structure from motion on points of four known directions.

    What is left is the noise, and the depth is right.
    """
    known = bundled._replace(basis=bundled.basis[:4], turn=np.zeros((5, 4)))
    learned = face3d.learn(draw(known, 400, noise=0.005)[0].reshape(80, 5, 68, 2), directions=4)
    points, *_ = draw(known, 200, seed=2)
    unseen = face3d.fit(points, learned)
    assert 100 * np.linalg.norm(unseen.rest, axis=-1).mean() < 0.5          # 4.3 with the mean alone
    assert np.sqrt(learned.noise) == pytest.approx(0.005, rel=0.1)
    depth, true = learned.mean[:, 2], bundled.mean[:, 2]
    assert np.corrcoef(depth, true)[0, 1] > 0.99
    assert np.polyfit(true, depth, 1)[0] == pytest.approx(1, abs=0.1)


def test_pose_and_coefficients_of_known_points(bundled):
    points, pose, z = draw(bundled, 300)
    found = face3d.fit(points, bundled)
    assert np.degrees(np.abs(found.pose - pose)[:, :3]).mean() < 0.5
    assert np.abs(found.pose - pose)[:, 3].mean() < 0.01 and np.abs(found.pose - pose)[:, 4:].mean() < 0.5
    assert np.corrcoef(found.z.ravel(), z.ravel())[0, 1] > 0.98
    assert np.allclose(found.opening, opened(points, bundled))


def test_angles_are_of_the_rotation(bundled):
    pose = draw(bundled, 50)[1]
    assert np.allclose(face3d.angles(face3d.rotation(pose)), pose[:, :3])
    nose = face3d.project(np.array([[0.5, 0, 0, 0, 0, 0]]), bundled.mean[None])[0, 30]
    assert nose[0] > 0.1        # yaw > 0 looks to the picture's right


def test_a_long_driver_is_fitted_in_seconds(bundled):
    points = np.tile(draw(bundled, 300)[0].astype(np.float32), (10, 1, 1))
    start = time.process_time()
    face3d.fit(points, bundled)
    assert time.process_time() - start < 1      # 20 minutes, 30,000 frames: under 10 s


def test_command_and_refusals(tmp_path, bundled):
    points = draw(bundled, 310)[0].reshape(31, 10, 68, 2)
    pixel = torch.zeros(1, dtype=torch.uint8)
    for i, p in enumerate(points):
        save_tensors({"jpeg": pixel, "offsets": torch.arange(11), "landmarks": torch.from_numpy(p).float(),
                      "image_size": SIZE, "detector": "dlib"}, tmp_path / f"prepared/{i:02}.pt")
    (tmp_path / "prepared/03.pt").write_bytes(b"damaged")
    out = succeed("beyond.face3d", "--out", "face.npz", cwd=tmp_path)
    assert "wrote face.npz: from 300 frames of 30 people" in out
    made = face3d.load_face3d(tmp_path / "face.npz")
    assert made.basis.shape == (16, 68, 3)
    assert (np.linalg.eigvalsh(made.between) > 0).all()
    (tmp_path / "prepared/00.pt").unlink(), (tmp_path / "prepared/03.pt").unlink()
    assert "300 of 30 are needed" in fail("beyond.face3d", "--out", "face.npz", cwd=tmp_path)
    said = fail("beyond.face3d", "--data", "nothing", "--out", "face.npz", cwd=tmp_path)
    assert "no prepared videos" in said
    (tmp_path / "text.npz").write_text("no face")
    with pytest.raises(UserError, match="is not a 3-D face"):
        face3d.load_face3d(tmp_path / "text.npz")


# -------------------------------------------------------------------------------------------------- who it is

def test_identity_by_hand():
    """One dimension, between 4, within 1: one photo at 5 counts 4 / (4 + 1).

    The frames of a clip count less than photos.
    """
    line = face3d.Face3D(None, None, None, None, np.array([[4.0]]), np.array([[1.0]]))
    assert adapt.identity(np.array([[5.0]]), [1], line)[0] == pytest.approx(4.0)
    assert adapt.identity(np.array([[5.0], [5.0]]), [1, 1], line)[0] == pytest.approx(5 * 4 / 4.5)
    mixed = adapt.identity(np.array([[5.0], [2.0]]), [1, adapt.CLIP], line)[0]
    n = 1 + adapt.CLIP
    assert mixed == pytest.approx((5 + 2 * adapt.CLIP) / n * 4 / (4 + 1 / n))


def test_covariances_of_known_people():
    rng = np.random.default_rng(0)
    who = rng.normal(0, 2, (3000, 2)) + (1, -1)
    people = [w + rng.normal(0, (1, 0.5), (4, 2)) for w in who]
    between, within, mean = face3d.covariances(people)
    assert np.allclose(between, np.diag([4, 4]), atol=0.3)
    assert np.allclose(within, np.diag([1, 0.25]), atol=0.05)
    assert np.allclose(mean, (1, -1), atol=0.1)


# ----------------------------------------------------------------------------------------------- steadiness

def smoothed(bundled, points, found=None, rate=25):
    t = track(points, found, rate)
    return adapt.steady(face3d.fit(points, bundled), t.seconds(), adapt.shots(face_box(t.points)), t.found)


@pytest.mark.parametrize("rate", [25, 50])
def test_a_still_head_is_still(bundled, rate):
    points = draw(bundled, 1)[0] + np.random.default_rng(0).normal(0, 0.7, (100, 68, 2))
    before, after = face3d.fit(points, bundled), smoothed(bundled, points, rate=rate)
    for part in ("pose", "z", "opening"):
        moved = lambda f: np.abs(np.diff(getattr(f, part), axis=0)).mean()
        assert moved(after) < (0.3 if part == "opening" else 0.2) * moved(before), part


def test_blinks_and_plosives_keep_their_depth_and_nothing_is_late(bundled):
    clean, wanted = talk(bundled)
    rng = np.random.default_rng(0)
    noisy = lambda: clean + rng.normal(0, 0.5, clean.shape)
    result = np.mean([smoothed(bundled, noisy()).opening for _ in range(8)], axis=0)
    truth = opened(clean, bundled)
    lids, true_lids = result[:, face3d.LIDS].mean(1), truth[:, face3d.LIDS].mean(1)
    depth = lambda v: np.median(v) - v[50]
    assert depth(lids) == pytest.approx(depth(true_lids), rel=0.05)
    lips, true_lips = result[:, face3d.LIPS].mean(1), truth[:, face3d.LIPS].mean(1)
    assert np.polyfit(true_lips, lips, 1)[0] == pytest.approx(1, abs=0.05)
    likeness = [np.corrcoef(np.roll(true_lips, k)[5:-5], lips[5:-5])[0, 1] for k in (-1, 0, 1)]
    late = (likeness[2] - likeness[0]) / 2 / (2 * likeness[1] - likeness[0] - likeness[2])
    assert abs(late) < 0.1                                                  # of a frame


def test_nothing_is_smoothed_across_a_cut_and_no_face_has_no_vote(bundled):
    a, b = draw(bundled, 1, seed=0)[0], draw(bundled, 1, seed=5)[0] + 300
    noise = np.random.default_rng(0).normal(0, 0.5, (40, 68, 2))
    points = np.concatenate([np.repeat(a, 20, 0), np.repeat(b, 20, 0)]) + noise
    found = np.ones(40, bool)
    # a wrong face, which nobody may see
    found[30:33], points[30:33] = False, points[20] + 40
    result = smoothed(bundled, points, found)
    assert (adapt.shots(face_box(points)) == np.repeat([0, 1], 20)).all()
    assert np.abs(result.pose[19] - result.pose[:20].mean(0))[4:].max() < 1
    assert np.abs(result.pose[20:] - result.pose[20:].mean(0))[:, 4:].max() < 1


@pytest.mark.parametrize("n", [1, 2, 5])
def test_short_drivers(bundled, n):
    points = talk(bundled)[0][:n]
    source = adapt.describe([draw(bundled, 1)[0]], bundled)
    for motion in ("relative", "absolute", "paper"):
        assert np.isfinite(adapt.adapt(track(points), source, motion, SIZE, bundled, 1.0)).all()


# --------------------------------------------------------------------------------------------------- motion

def laughing(bundled):
    """A photo with the mouth wide open."""
    points, wanted = talk(bundled, seed=7, opening=0.3)
    return points[6:7]                                                      # sin is 1 there


def test_a_laughing_photo_shuts_its_mouth(bundled):
    source = adapt.describe([laughing(bundled)], bundled)
    assert source.opening[face3d.LIPS].mean() > 0.25
    points, wanted = talk(bundled)
    for motion in ("relative", "absolute"):
        driven = adapt.adapt(track(points), source, motion, SIZE, bundled, 1.0)
        lips = opened(driven, bundled)[:, face3d.LIPS].mean(1)
        assert lips.min() < 0.02 and lips.min() > 0
        assert np.polyfit(wanted[:, -1], lips, 1)[0] == pytest.approx(1, abs=0.05)


def test_lips_farther_apart_for_a_shy_generator(bundled):
    source, (points, wanted) = adapt.describe([laughing(bundled)], bundled), talk(bundled)
    for motion in ("relative", "absolute"):
        driven = adapt.adapt(track(points), source, motion, SIZE, bundled, 1.3)
        lips = opened(driven, bundled)[:, face3d.LIPS].mean(1)
        assert lips.min() < 0.02 and lips.min() > 0                         # and still they shut
        assert np.polyfit(wanted[:, -1], lips, 1)[0] == pytest.approx(1.3, abs=0.065)


def test_lids_close_by_the_drivers_share(bundled):
    points, wanted = talk(bundled)
    blinking = laughing(bundled).copy()
    middle = (blinking[:, face3d.UPPER[:4]] + blinking[:, face3d.LOWER[:4]]) / 2
    # a photo in a blink opens its eyes, too
    blinking[:, face3d.UPPER[:4]] = blinking[:, face3d.LOWER[:4]] = middle
    for photo in (laughing(bundled), blinking):
        source = adapt.describe([photo], bundled)
        driven = adapt.adapt(track(points), source, "relative", SIZE, bundled, 1.0)
        lids = opened(driven, bundled)[:, face3d.LIDS].mean(1)
        assert np.median(lids) > 0.5 * face3d.gaps(bundled.mean)[face3d.LIDS].mean()
        assert lids[50] / np.median(lids) == pytest.approx(0.2, abs=0.05)


@pytest.mark.parametrize("motion", ["relative", "absolute"])
def test_lips_never_cross(bundled, motion):
    """Whatever the photo and the driver; along the head's own direction, inner and outer lips."""
    for seed in range(20):
        source = adapt.describe([draw(bundled, 1, seed)[0]], bundled)
        driver = draw(bundled, 30, 100 + seed)[0]
        result = adapt.adapt(track(driver), source, motion, SIZE, bundled, 1.0)
        along = face3d.down(face3d.fit(result, bundled).pose)
        gap = lambda a, b: ((result[:, b] - result[:, a]) * along[:, None]).sum(-1)
        assert (gap(face3d.UPPER[4:], face3d.LOWER[4:]) > 0).all()


def test_relative_starts_from_the_photo_and_takes_the_drivers_turns(bundled):
    photo = talk(bundled, seed=7)[0][:1]                                     # the mouth shut
    source = adapt.describe([photo], bundled)
    still = np.repeat(talk(bundled)[0][:1], 30, axis=0)
    assert change(adapt.adapt(track(still), source, "relative", SIZE, bundled, 1.0), photo) < 0.5
    points, _ = talk(bundled)
    result = face3d.fit(adapt.adapt(track(points), source, "relative", SIZE, bundled, 1.0), bundled).pose
    driver, pose = face3d.fit(points, bundled).pose, face3d.fit(photo, bundled).pose
    for k in range(3):
        assert np.corrcoef(result[:, k], driver[:, k])[0, 1] > 0.95
        assert np.median(result[:, k]) == pytest.approx(pose[0, k], abs=0.06)


def test_the_first_frame_is_not_the_drivers_neutral(bundled):
    points, _ = talk(bundled)
    source = adapt.describe([draw(bundled, 1, seed=3)[0]], bundled)
    whole = adapt.adapt(track(points), source, "relative", SIZE, bundled, 1.0)
    later = adapt.adapt(track(points[5:]), source, "relative", SIZE, bundled, 1.0)
    assert change(whole[15:], later[10:]) < 1.5


def test_absolute_on_oneself_changes_little(bundled):
    points = talk(bundled)[0] + np.random.default_rng(0).normal(0, 0.5, (100, 68, 2))
    own = track(points).in_crops(SIZE)
    result = adapt.adapt(track(points), adapt.describe([own], bundled), "absolute", SIZE, bundled, 1.0)
    assert change(result, own) < 1.5
    assert np.array_equal(adapt.adapt(track(points), None, "paper", SIZE, bundled, 1.0), own)


def test_absolute_brings_the_sources_shape(bundled):
    """The result's identity is the source's, not the driver's."""
    rng = np.random.default_rng(0)
    who = rng.multivariate_normal(np.zeros(len(bundled.basis)), bundled.between)
    photos = [p[None] for p in draw(bundled, 8, z=np.tile(who, (8, 1)))[0]]
    source = adapt.describe(photos, bundled)
    driver = talk(bundled)[0]
    result = face3d.fit(adapt.adapt(track(driver), source, "absolute", SIZE, bundled, 1.0), bundled).z.mean(0)
    there, here = np.linalg.norm(result - who), np.linalg.norm(face3d.fit(driver, bundled).z.mean(0) - who)
    assert there < 0.5 * here


def test_random_poses_are_of_the_same_face(bundled):
    """Turned both ways, with open and closed mouths and lids, and of the source's shape."""
    points, _, z = draw(bundled, 1, yaw=0)
    source = adapt.describe([points], bundled)
    some = np.stack(list(islice(adapt.random_poses(source, bundled), 60)))
    again = np.stack(list(islice(adapt.random_poses(source, bundled), 60)))
    assert np.array_equal(some, again) and some.shape == (60, 68, 2)
    fits = face3d.fit(some, bundled)
    yaw, lids, lips = np.degrees(fits.pose[:, 0]), fits.opening[:, 0], fits.opening[:, 5]
    assert yaw.min() < -15 and yaw.max() > 15 and np.abs(yaw).max() < 40
    assert lids.min() < 0.3 * source.opening[0] and lids.max() > source.opening[0]
    assert -0.001 < lips.min() < 0.01 and lips.max() > 0.15
    own = source.z / np.linalg.norm(source.z)       # the mean of all is nearer to it than to the mean face
    assert fits.z.mean(0) @ own > 0.7 * np.linalg.norm(source.z)


def test_views_turn_the_photo(bundled):
    photo, pose, _ = draw(bundled, 1, seed=3)
    source = adapt.describe([photo], bundled)
    yaws = np.degrees([pose[0, 0], -0.7, 0.7])
    result = adapt.views(source, bundled, yaws)
    assert change(result[:1], photo) < 0.5
    assert np.allclose(np.degrees(face3d.fit(result, bundled).pose[:, 0]), yaws, atol=4)
    assert np.ptp(face_box(result), axis=0).max() < 0.1               # framed as the photo is


# --------------------------------------------------------------------------------------------------- infer.py

@pytest.fixture
def command(monkeypatch, tmp_path, checkpoint):
    """infer.py in this process, feed-forward unless a person is given; a wrong result raises."""
    monkeypatch.chdir(tmp_path)

    def infer_main(*args):
        who = [] if "--person" in args else ["--checkpoint", checkpoint, "--feed-forward"]
        monkeypatch.setattr(sys, "argv", ["infer.py", *map(str, [*args, *who])])
        infer.main()

    return infer_main


def drivers(bundled):
    save_track("driver.npz", track(talk(bundled)[0][:12]))
    save_track("one.npz", track(talk(bundled)[0][:1]))
    pose = np.tile([0.6, 0, 0, np.log(80), 128, 128], (12, 1))
    z = np.zeros((12, len(bundled.basis)))
    save_track("aside.npz", track(face3d.project(pose, face3d.shapes(pose, z, bundled))))


def drawn(path):
    """The landmarks' third of a --compare video."""
    return np.stack([frame.to_ndarray(format="rgb24")[:, 64:128] for frame in read_video(path)]).astype(int)


def test_a_photo_and_its_person_file_give_the_same(command, bundled, capsys):
    drivers(bundled)
    command("--photo", PHOTO, "--driver", "driver.npz", "--compare", "--out", "a.mp4",
            "--save-person", "p.pt")
    command("--person", "p.pt", "--driver", "driver.npz", "--compare", "--out", "b.mp4")
    command("--person", "p.pt", "--driver", "driver.npz", "--compare", "--out", "c.mp4", "--motion", "paper")
    assert np.abs(drawn("a.mp4") - drawn("b.mp4")).mean() < 1
    assert np.abs(drawn("a.mp4") - drawn("c.mp4")).mean() > 5
    capsys.readouterr()
    command("--person", "p.pt", "--driver", "one.npz")
    assert "one frame" in capsys.readouterr().out
    command("--person", "p.pt", "--driver", "aside.npz")
    assert "looks aside by about" in capsys.readouterr().err


def test_a_person_file_from_before(command, bundled, capsys):
    drivers(bundled)
    command("--photo", PHOTO, "--driver", "driver.npz", "--save-person", "p.pt")
    old = {k: v for k, v in torch.load("p.pt", weights_only=True).items() if k not in ("landmarks", "counts")}
    torch.save(old, "old.pt")
    command("--person", "old.pt", "--driver", "driver.npz")
    assert "landmarks are taken as they are" in capsys.readouterr().out
    with pytest.raises(UserError, match="before --motion"):
        command("--person", "old.pt", "--driver", "driver.npz", "--motion", "relative")
    with pytest.raises(UserError, match="before --motion"):
        command("--person", "old.pt", "--views")
    with pytest.raises(UserError, match="name a --driver"):
        command("--person", "old.pt")


def test_views_need_no_driver(command):
    Path("around.png").write_bytes(b"precious")
    command("--photo", PHOTO, "--views", "--out", "around.mp4")
    assert Path("around.png").read_bytes() == b"precious"
    assert Image.open("around.views.png").size == (9 * 64, 64)
    assert sum(1 for _ in read_video("around.mp4")) == 100


def test_the_same_person_drives_itself(command, clip, capsys):
    """The clip shows the astronaut of the photo."""
    command("--photo", PHOTO, "--driver", clip)
    assert "the same person" in capsys.readouterr().out
