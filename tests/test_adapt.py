"""adapt.py: identity, jitter, motion and viewpoints, on landmarks of known faces; and infer.py with it."""
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import infer
from beyond import adapt, face3d
from conftest import PHOTO
from media.crops import face_box
from media.decode import read_video
from media.tracking import Track, save_track
from test_face3d import draw, opened

SIZE = 256


def distance(a, b):
    """The mean distance between landmarks (n, 68, 2), in per cent of the eye distance of b."""
    eye_distance = np.linalg.norm(b[..., 36, :] - b[..., 45, :], axis=-1).mean()
    return 100 * np.linalg.norm(a - b, axis=-1).mean() / eye_distance


def track(points, found=None, rate=25):
    """Landmarks (n, 68, 2) -> the Track of a video with `rate` frames a second. found (n,): default all."""
    n = len(points)
    found = np.ones(n, bool) if found is None else found
    return Track(points.astype(np.float32), found, np.zeros(n, bool), np.arange(n),
                 np.array([1, rate]), "dlib")


def talk(model, n=100, seed=1, opening=0.15):
    """A driver at 25 frames a second who nods slowly, opens the mouth once a second and blinks in the middle.

    -> landmarks (n, 68, 2), openings (n, 7).
    """
    rng = np.random.default_rng(seed)
    t = np.arange(n) / 25
    z = np.tile(rng.multivariate_normal(np.zeros(len(model.basis)), model.between), (n, 1))
    pose = np.c_[0.2 * np.sin(t), 0.1 * np.sin(1.7 * t), 0.1 * np.cos(t),
                 np.full(n, np.log(80)), np.full((n, 2), 128)]
    wanted = np.tile(face3d.shape_openings(model.mean), (n, 1))
    wanted[:, face3d.LIPS] = opening * np.maximum(0, np.sin(2 * np.pi * t))[:, None]
    wanted[n // 2 - 1:n // 2 + 2, face3d.LIDS] *= np.array([[0.5], [0.2], [0.5]])
    still = adapt.Source(z[0], np.zeros((68, 3)), pose[0], z[0], wanted[0])
    return adapt.place(pose, z, wanted, still, model), wanted


# ------------------------------------------------------------------------------------------- identity

def test_identity_by_hand():
    """In one dimension, with a variance of 4 between people and of 1 within a person.

    The posterior mean of a photo at 5 is 5 * 4 / (4 + 1). All frames of a clip count as CLIP_WEIGHT photos.
    """
    line = face3d.Face3D(None, None, None, None, np.array([[4.0]]), np.array([[1.0]]))
    assert adapt.identity(np.array([[5.0]]), [1], line)[0] == pytest.approx(4.0)
    assert adapt.identity(np.array([[5.0], [5.0]]), [1, 1], line)[0] == pytest.approx(5 * 4 / 4.5)
    mixed = adapt.identity(np.array([[5.0], [2.0]]), [1, adapt.CLIP_WEIGHT], line)[0]
    n = 1 + adapt.CLIP_WEIGHT
    assert mixed == pytest.approx((5 + 2 * adapt.CLIP_WEIGHT) / n * 4 / (4 + 1 / n))


# ------------------------------------------------------------------------------------- removing jitter

def smoothed(model, points, found=None, rate=25):
    """Landmarks of a video (n, 68, 2) -> their Fit without jitter."""
    t = track(points, found, rate)
    return adapt.steady(face3d.fit(points, model), t.seconds(), t.shots(), t.found)


@pytest.mark.parametrize("rate", [25, 50])
def test_a_still_head_is_still(model, rate):
    points = draw(model, 1)[0] + np.random.default_rng(0).normal(0, 0.7, (100, 68, 2))
    before, after = face3d.fit(points, model), smoothed(model, points, rate=rate)
    for part in ("pose", "z", "opening"):
        moved = lambda f: np.abs(np.diff(getattr(f, part), axis=0)).mean()
        assert moved(after) < (0.3 if part == "opening" else 0.2) * moved(before), part


def test_blinks_and_plosives_keep_their_depth_and_are_not_delayed(model):
    clean, wanted = talk(model)
    rng = np.random.default_rng(0)
    noisy = lambda: clean + rng.normal(0, 0.5, clean.shape)
    result = np.mean([smoothed(model, noisy()).opening for _ in range(8)], axis=0)
    truth = opened(clean, model)
    lids, true_lids = result[:, face3d.LIDS].mean(1), truth[:, face3d.LIDS].mean(1)
    depth = lambda v: np.median(v) - v[50]
    assert depth(lids) == pytest.approx(depth(true_lids), rel=0.05)
    lips, true_lips = result[:, face3d.LIPS].mean(1), truth[:, face3d.LIPS].mean(1)
    assert np.polyfit(true_lips, lips, 1)[0] == pytest.approx(1, abs=0.05)
    # the delay is where a parabola through these correlations has its maximum
    before, now, after = [np.corrcoef(np.roll(true_lips, k)[5:-5], lips[5:-5])[0, 1] for k in (-1, 0, 1)]
    delay = (after - before) / 2 / (2 * now - before - after)
    assert abs(delay) < 0.1                                                 # of a frame


def test_nothing_is_smoothed_across_a_cut_and_frames_without_a_face_do_not_count(model):
    a, b = draw(model, 1, seed=0)[0], draw(model, 1, seed=5)[0] + 300
    noise = np.random.default_rng(0).normal(0, 0.5, (40, 68, 2))
    points = np.concatenate([np.repeat(a, 20, 0), np.repeat(b, 20, 0)]) + noise
    found = np.ones(40, bool)
    # wrong landmarks in frames without a face, which must have no influence
    found[30:33], points[30:33] = False, points[20] + 40
    result = smoothed(model, points, found)
    assert (track(points, found).shots() == np.repeat([0, 1], 20)).all()
    assert np.abs(result.pose[19] - result.pose[:20].mean(0))[4:].max() < 1
    assert np.abs(result.pose[20:] - result.pose[20:].mean(0))[:, 4:].max() < 1


@pytest.mark.parametrize("n", [1, 2, 5])
def test_short_drivers(model, n):
    points = talk(model)[0][:n]
    source = adapt.describe([draw(model, 1)[0]], model)
    for motion in ("relative", "absolute", "paper"):
        assert np.isfinite(adapt.adapt(track(points), source, motion, SIZE, model, 1.0)).all()


# --------------------------------------------------------------------------------------------------- motion

def laughing(model):
    """The landmarks of a photo with the mouth wide open, (1, 68, 2)."""
    points, _ = talk(model, seed=7, opening=0.3)
    return points[6:7]                                                      # the sine in talk() is 1 there


def test_a_laughing_photo_closes_its_mouth(model):
    source = adapt.describe([laughing(model)], model)
    assert source.opening[face3d.LIPS].mean() > 0.25
    points, wanted = talk(model)
    for motion in ("relative", "absolute"):
        driven = adapt.adapt(track(points), source, motion, SIZE, model, 1.0)
        lips = opened(driven, model)[:, face3d.LIPS].mean(1)
        assert lips.min() < 0.02 and lips.min() > 0
        assert np.polyfit(wanted[:, -1], lips, 1)[0] == pytest.approx(1, abs=0.05)


def test_lips_open_farther_than_the_drivers(model):
    source, (points, wanted) = adapt.describe([laughing(model)], model), talk(model)
    for motion in ("relative", "absolute"):
        driven = adapt.adapt(track(points), source, motion, SIZE, model, 1.3)
        lips = opened(driven, model)[:, face3d.LIPS].mean(1)
        assert lips.min() < 0.02 and lips.min() > 0                         # they still close
        assert np.polyfit(wanted[:, -1], lips, 1)[0] == pytest.approx(1.3, abs=0.065)


def test_lids_close_by_the_same_share_as_the_drivers(model):
    points, wanted = talk(model)
    blinking = laughing(model).copy()
    middle = (blinking[:, face3d.UPPER[:4]] + blinking[:, face3d.LOWER[:4]]) / 2
    # the eyes open even if the photo shows a blink
    blinking[:, face3d.UPPER[:4]] = blinking[:, face3d.LOWER[:4]] = middle
    for photo in (laughing(model), blinking):
        source = adapt.describe([photo], model)
        driven = adapt.adapt(track(points), source, "relative", SIZE, model, 1.0)
        lids = opened(driven, model)[:, face3d.LIDS].mean(1)
        assert np.median(lids) > 0.5 * face3d.shape_openings(model.mean)[face3d.LIDS].mean()
        assert lids[50] / np.median(lids) == pytest.approx(0.2, abs=0.05)


@pytest.mark.parametrize("motion", ["relative", "absolute"])
def test_lips_never_cross(model, motion):
    """For any photo and driver, measured in the head's own downward direction."""
    for seed in range(20):
        source = adapt.describe([draw(model, 1, seed)[0]], model)
        driver = draw(model, 30, 100 + seed)[0]
        result = adapt.adapt(track(driver), source, motion, SIZE, model, 1.0)
        along = face3d.down(face3d.fit(result, model).pose)
        gap = lambda a, b: ((result[:, b] - result[:, a]) * along[:, None]).sum(-1)
        assert (gap(face3d.UPPER[4:], face3d.LOWER[4:]) > 0).all()


def test_relative_motion_starts_from_the_photo_and_follows_the_drivers_rotation(model):
    photo = talk(model, seed=7)[0][:1]                                     # the mouth is closed
    source = adapt.describe([photo], model)
    still = np.repeat(talk(model)[0][:1], 30, axis=0)
    assert distance(adapt.adapt(track(still), source, "relative", SIZE, model, 1.0), photo) < 0.5
    points, _ = talk(model)
    result = face3d.fit(adapt.adapt(track(points), source, "relative", SIZE, model, 1.0), model).pose
    driver, pose = face3d.fit(points, model).pose, face3d.fit(photo, model).pose
    for k in range(3):
        assert np.corrcoef(result[:, k], driver[:, k])[0, 1] > 0.95
        assert np.median(result[:, k]) == pytest.approx(pose[0, k], abs=0.06)


def test_relative_motion_does_not_depend_on_the_first_frame(model):
    points, _ = talk(model)
    source = adapt.describe([draw(model, 1, seed=3)[0]], model)
    whole = adapt.adapt(track(points), source, "relative", SIZE, model, 1.0)
    later = adapt.adapt(track(points[5:]), source, "relative", SIZE, model, 1.0)
    assert distance(whole[15:], later[10:]) < 1.5


def test_absolute_motion_of_the_same_person_changes_little(model):
    points = talk(model)[0] + np.random.default_rng(0).normal(0, 0.5, (100, 68, 2))
    own = track(points).in_crops(SIZE)
    result = adapt.adapt(track(points), adapt.describe([own], model), "absolute", SIZE, model, 1.0)
    assert distance(result, own) < 1.5
    assert np.array_equal(adapt.adapt(track(points), None, "paper", SIZE, model, 1.0), own)


def test_absolute_motion_keeps_the_sources_identity(model):
    """The result's coefficients are nearer to the source's identity than the driver's are."""
    rng = np.random.default_rng(0)
    who = rng.multivariate_normal(np.zeros(len(model.basis)), model.between)
    photos = [p[None] for p in draw(model, 8, z=np.tile(who, (8, 1)))[0]]
    source = adapt.describe(photos, model)
    driver = talk(model)[0]
    result = face3d.fit(adapt.adapt(track(driver), source, "absolute", SIZE, model, 1.0), model).z.mean(0)
    of_driver = face3d.fit(driver, model).z.mean(0)
    assert np.linalg.norm(result - who) < 0.5 * np.linalg.norm(of_driver - who)


def test_random_poses_are_of_the_same_face(model):
    """They are turned both ways, with open and closed mouths and lids, and have the source's identity."""
    points, _, z = draw(model, 1, yaw=0)
    source = adapt.describe([points], model)
    some = np.stack(list(islice(adapt.random_poses(source, model), 60)))
    again = np.stack(list(islice(adapt.random_poses(source, model), 60)))
    assert np.array_equal(some, again) and some.shape == (60, 68, 2)
    fits = face3d.fit(some, model)
    yaw, lids, lips = np.degrees(fits.pose[:, 0]), fits.opening[:, 0], fits.opening[:, 5]
    assert yaw.min() < -15 and yaw.max() > 15 and np.abs(yaw).max() < 40
    assert lids.min() < 0.3 * source.opening[0] and lids.max() > source.opening[0]
    assert -0.001 < lips.min() < 0.01 and lips.max() > 0.15
    # the mean of all is nearer to the source than to the mean face
    own = source.z / np.linalg.norm(source.z)
    assert fits.z.mean(0) @ own > 0.7 * np.linalg.norm(source.z)


def test_views_turn_the_photo(model):
    photo, pose, _ = draw(model, 1, seed=3)
    source = adapt.describe([photo], model)
    yaws = np.degrees([pose[0, 0], -0.7, 0.7])
    result = adapt.views(source, model, yaws)
    assert distance(result[:1], photo) < 0.5
    assert np.allclose(np.degrees(face3d.fit(result, model).pose[:, 0]), yaws, atol=4)
    assert np.ptp(face_box(result), axis=0).max() < 0.1               # framed as the photo is


# --------------------------------------------------------------------------------------------------- infer.py

@pytest.fixture
def command(monkeypatch, tmp_path, checkpoint):
    """A function that calls infer.py's main(), with --feed-forward unless --person is given."""
    monkeypatch.chdir(tmp_path)

    def infer_main(*args):
        who = [] if "--person" in args else ["--checkpoint", checkpoint, "--feed-forward"]
        monkeypatch.setattr(sys, "argv", ["infer.py", *map(str, [*args, *who])])
        infer.main()

    return infer_main


def drivers(model):
    """Write the tracks of a talking driver, of one frame, and of a driver who looks to the side."""
    save_track("driver.npz", track(talk(model)[0][:12]))
    save_track("one.npz", track(talk(model)[0][:1]))
    pose = np.tile([0.6, 0, 0, np.log(80), 128, 128], (12, 1))
    z = np.zeros((12, len(model.basis)))
    save_track("aside.npz", track(face3d.project(pose, face3d.shapes(pose, z, model))))


def drawn(path):
    """The landmarks in a --compare video, its middle third."""
    return np.stack([frame.to_ndarray(format="rgb24")[:, 64:128] for frame in read_video(path)]).astype(int)


def test_a_photo_and_its_person_file_give_the_same_result(command, model, capsys):
    drivers(model)
    command("--photo", PHOTO, "--driver", "driver.npz", "--compare", "--out", "a.mp4",
            "--save-person", "p.pt")
    command("--person", "p.pt", "--driver", "driver.npz", "--compare", "--out", "b.mp4")
    command("--person", "p.pt", "--driver", "driver.npz", "--compare", "--out", "c.mp4", "--motion", "paper")
    assert np.abs(drawn("a.mp4") - drawn("b.mp4")).mean() < 1
    assert np.abs(drawn("a.mp4") - drawn("c.mp4")).mean() > 4
    capsys.readouterr()
    command("--person", "p.pt", "--driver", "one.npz")
    assert "a single frame" in capsys.readouterr().out
    command("--person", "p.pt", "--driver", "aside.npz")
    assert "driver's face is turned by about" in capsys.readouterr().err


def test_views_need_no_driver(command):
    Path("around.png").write_bytes(b"precious")
    command("--photo", PHOTO, "--views", "--out", "around.mp4")
    assert Path("around.png").read_bytes() == b"precious"
    assert Image.open("around.views.png").size == (9 * 64, 64)
    assert sum(1 for _ in read_video("around.mp4")) == 100


def test_a_driver_who_is_the_same_person_is_recognised(command, clip, capsys):
    """The clip shows the astronaut of the photo."""
    command("--photo", PHOTO, "--driver", clip)
    assert "the same person" in capsys.readouterr().out
