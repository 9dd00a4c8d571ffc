"""face3d.py: the linear 3-D face model on landmarks of known faces, how it is learned, and its command."""
import time

import numpy as np
import pytest

from beyond import face3d
from conftest import fail, prepare, succeed
from runtime.files import UserError


def draw(model, n, seed=0, yaw=0.3, z=None, noise=0):
    """n faces with random poses, and with random coefficients unless z (n, K) is given.

    yaw: its standard deviation in radians.  noise: of the landmarks, in eye distances.
    -> landmarks (n, 68, 2), pose (n, 6), z (n, K).
    """
    rng = np.random.default_rng(seed)
    pose = np.c_[rng.normal(0, yaw, n), rng.normal(0, 0.1, (n, 2)), np.log(90) + rng.normal(0, 0.05, n),
                 rng.normal(128, 5, (n, 2))]
    z = rng.normal(0, 1, (n, len(model.basis))) if z is None else z
    points = face3d.project(pose, face3d.shapes(pose, z, model))
    return points + rng.normal(0, noise * 90, points.shape), pose, z


def opened(points, model):
    """The openings (n, 7) of landmarks (n, 68, 2)."""
    return face3d.openings(points, face3d.fit(points, model).pose)


# ------------------------------------------------------------------------------------------- learning

def test_a_known_model_is_learned_from_its_landmarks(model):
    """From landmarks of a model with four basis shapes. What is left is the noise, and the depth is right."""
    known = model._replace(basis=model.basis[:4], turn=np.zeros((5, 4)))
    learned = face3d.learn(draw(known, 400, noise=0.005)[0].reshape(80, 5, 68, 2), directions=4)
    points, *_ = draw(known, 200, seed=2)
    unseen = face3d.fit(points, learned)
    assert 100 * np.linalg.norm(unseen.residual, axis=-1).mean() < 0.5      # 4.3 with the mean alone
    assert np.sqrt(learned.noise) == pytest.approx(0.005, rel=0.1)
    depth, true = learned.mean[:, 2], model.mean[:, 2]
    assert np.corrcoef(depth, true)[0, 1] > 0.99
    assert np.polyfit(true, depth, 1)[0] == pytest.approx(1, abs=0.1)


def test_covariances_of_known_people():
    rng = np.random.default_rng(0)
    identities = rng.normal(0, 2, (3000, 2)) + (1, -1)
    people = [identity + rng.normal(0, (1, 0.5), (4, 2)) for identity in identities]
    between, within, mean = face3d.covariances(people)
    assert np.allclose(between, np.diag([4, 4]), atol=0.3)
    assert np.allclose(within, np.diag([1, 0.25]), atol=0.05)
    assert np.allclose(mean, (1, -1), atol=0.1)


# -------------------------------------------------------------------------------------------- fitting

def test_pose_and_coefficients_of_known_landmarks(model):
    points, pose, z = draw(model, 300)
    fitted = face3d.fit(points, model)
    error = np.abs(fitted.pose - pose)
    assert np.degrees(error[:, :3]).mean() < 0.5
    assert error[:, 3].mean() < 0.01 and error[:, 4:].mean() < 0.5
    assert np.corrcoef(fitted.z.ravel(), z.ravel())[0, 1] > 0.98
    assert np.allclose(fitted.opening, opened(points, model))


def test_angles_is_the_inverse_of_rotation(model):
    pose = draw(model, 50)[1]
    assert np.allclose(face3d.angles(face3d.rotation(pose)), pose[:, :3])
    nose = face3d.project(np.array([[0.5, 0, 0, 0, 0, 0]]), model.mean[None])[0, 30]
    assert nose[0] > 0.1        # a face with yaw > 0 looks to the picture's right


def test_a_long_driver_is_fitted_in_seconds(model):
    points = np.tile(draw(model, 300)[0].astype(np.float32), (10, 1, 1))
    start = time.process_time()
    face3d.fit(points, model)
    assert time.process_time() - start < 1      # so 20 minutes of video, 30,000 frames, take less than 10 s


# ------------------------------------------------------------------------------------------ the command

def test_command_and_refusals(tmp_path, model):
    black = np.zeros((10, 256, 256, 3), np.uint8)
    for i, points in enumerate(draw(model, 310)[0].astype(np.float32).reshape(31, 10, 68, 2)):
        prepare(tmp_path / f"prepared/{i:02}.pt", black, points)
    (tmp_path / "prepared/03.pt").write_bytes(b"damaged")
    said = succeed("beyond.face3d", "--out", "face.npz", cwd=tmp_path)
    assert "wrote face.npz: from 300 frames of 30 people" in said
    learned = face3d.load_face3d(tmp_path / "face.npz")
    assert learned.basis.shape == (16, 68, 3)
    assert (np.linalg.eigvalsh(learned.between) > 0).all()
    (tmp_path / "prepared/00.pt").unlink(), (tmp_path / "prepared/03.pt").unlink()
    assert "at least 300 frames of 30 people" in fail("beyond.face3d", "--out", "face.npz", cwd=tmp_path)
    said = fail("beyond.face3d", "--data", "nothing", "--out", "face.npz", cwd=tmp_path)
    assert "no prepared videos" in said
    (tmp_path / "text.npz").write_text("no face")
    with pytest.raises(UserError, match="is not a 3-D face"):
        face3d.load_face3d(tmp_path / "text.npz")
