"""metrics.py and report.py, compared with values that are computed by hand."""
import numpy as np
import pytest
import torch

from conftest import PHOTO, ROOT
from evaluation import metrics, report
from media.crops import crop, face_box, to_crop
from media.photos import read_photo
from media.recognition import dlib_recognition

LFW = ROOT.parent / "shared/data/lfw"


def cropped(path, detect, size=128):
    """A photo -> its crop uint8 (size, size, 3), and the landmarks in it (68, 2)."""
    image = read_photo(path)
    points = detect(image)
    box = face_box(points)
    return crop(image, box, size), to_crop(points, box, size)


@pytest.fixture(scope="module")
def astronaut(detect):
    return cropped(PHOTO, detect)


@pytest.fixture(scope="module")
def recognise():
    return dlib_recognition()


# -------------------------------------------------------------------------------------- the metrics

def test_equal_images_score_one(astronaut, recognise):
    frame, points = astronaut
    assert metrics.ssim(frame, frame) == pytest.approx(1)
    v = recognise(frame, points)
    assert v.shape == (128,) and v @ v == pytest.approx(1)


def test_ssim_follows_the_formula_of_its_paper(astronaut):
    """At one place, with an 11 x 11 Gaussian of 1.5 pixels, C1 = (0.01 * 255)^2, C2 = (0.03 * 255)^2."""
    a = astronaut[0][:11, :11]
    b = np.roll(a, 2, axis=1)
    g = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    w = np.outer(g, g)[..., None] / g.sum() ** 2
    average = lambda values: (w * values).sum((0, 1))
    x, y = a.astype(float), b.astype(float)
    mx, my = average(x), average(y)
    vx, vy, c = average(x * x) - mx ** 2, average(y * y) - my ** 2, average(x * y) - mx * my
    C1, C2 = (.01 * 255) ** 2, (.03 * 255) ** 2
    expected = (2 * mx * my + C1) * (2 * c + C2) / ((mx ** 2 + my ** 2 + C1) * (vx + vy + C2))
    assert metrics.ssim(a, b) == pytest.approx(expected.mean(), abs=1e-6)


def test_landmark_error_in_per_cent_of_the_eye_distance(astronaut, detect):
    frame, points = astronaut
    right = metrics.landmark_error(frame, points, detect)
    assert 0 < right < 4                                            # it is detected on an enlarged copy
    eyes = np.linalg.norm(points[36] - points[45])
    shifted = metrics.landmark_error(frame, points + (0.1 * eyes, 0), detect)
    assert shifted == pytest.approx(10, abs=right + .1)
    assert metrics.landmark_error(np.zeros_like(frame), points, detect) is None


def test_fid_against_hand_computed_values():
    rng = np.random.default_rng(0)
    frames = list(rng.integers(0, 255, (40, 8, 8, 3), dtype=np.uint8))
    network = lambda images: images.float().mean((2, 3))                        # (B, 3)
    moved = lambda images: network(images) + torch.tensor([3.0, 0, 4])
    real = metrics.fid_statistics(frames, network)
    assert metrics.fid(real, metrics.fid_statistics(frames, network)) == pytest.approx(0, abs=1e-6)
    assert metrics.fid(real, metrics.fid_statistics(frames, moved)) == pytest.approx(25, abs=1e-3)


def gaussian(deviations, turn=np.eye(2), mean=(0, 0)):
    """Four vectors (4, 2) with exactly this mean and covariance (normalised by n - 1)."""
    corners = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]]) * (3 / 4) ** .5
    return (corners * deviations) @ turn.T + mean


def test_frechet_distance_of_two_known_gaussians():
    """With the same axes it is |mean - mean'|^2 + sum (s - s')^2, for standard deviations s and s'.

    With axes that are turned by 45 degrees, the trace has a closed form for 2 x 2 matrices:
    tr (C C')^1/2 = (tr C C' + 2 (det C C')^1/2)^1/2.
    """
    a = gaussian((1, 2))
    assert np.allclose(np.cov(a.T), np.diag([1, 4]))
    assert metrics.frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet(a, gaussian((3, 5), mean=(3, 4))) == pytest.approx(25 + 4 + 9)
    turn = np.array([[1, -1], [1, 1]]) * .5 ** .5
    C, C_turned = np.diag([1, 4]), turn @ np.diag([9, 25]) @ turn.T
    root = (np.trace(C @ C_turned) + 2 * (4 * 9 * 25) ** .5) ** .5
    assert metrics.frechet(a, gaussian((3, 5), turn)) == pytest.approx(5 + 34 - 2 * root)
    assert metrics.frechet(a, gaussian((3, 0))) == pytest.approx(4 + 4)         # singular, as with few frames


def test_frechet_distance_agrees_with_torch_fidelity():
    from torch_fidelity.metric_fid import fid_features_to_statistics
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(50, 6)), rng.normal(size=(70, 6)) @ rng.normal(size=(6, 6)) + 1
    expected = metrics.fid(*(fid_features_to_statistics(torch.tensor(x)) for x in (a, b)))
    assert metrics.frechet(a, b) == pytest.approx(expected, rel=1e-6)


def test_an_arcface_like_network_gets_an_aligned_face(astronaut, tmp_path):
    """With a network that returns its input: the aligned face is the same if the picture is turned."""
    class Echo(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1)
    torch.jit.save(torch.jit.script(Echo()), str(tmp_path / "echo.pt"))
    recognise = metrics.torchscript_recognition(str(tmp_path / "echo.pt"), "cpu")
    frame, points = astronaut
    a = recognise(frame, points)
    assert a.shape == (3 * 112 * 112,)
    turned = np.ascontiguousarray(np.rot90(frame))
    b = recognise(turned, np.stack([points[:, 1], len(frame) - 1 - points[:, 0]], axis=1))
    assert a @ b > 0.995


@pytest.mark.skipif(not LFW.exists(), reason="needs ../shared")
def test_the_right_identity_scores_higher_than_a_shuffled_one(detect, recognise):
    names = ("Colin_Powell", "Halle_Berry", "Tim_Henman", "Kofi_Annan", "Jennifer_Garner")
    pairs = [sorted((LFW / name).glob("*.jpg"))[:2] for name in names]
    a, b = (np.array([recognise(*cropped(pair[k], detect)) for pair in pairs]) for k in (0, 1))
    assert (np.diag(a @ b.T) > np.diag(a @ np.roll(b, 1, axis=0).T)).all()


# ------------------------------------------------------------------------------------------- identity

def at(*degrees):
    """Vectors of norm 1 in the plane, at these angles."""
    a = np.radians(degrees)
    return np.stack([np.cos(a), np.sin(a)], axis=1)                             # (n, 2), of norm 1


def test_rank_by_hand():
    people = at(0, 40, 90)
    assert metrics.rank(at(5, 25, 70), people, 0).tolist() == [1, 2, 3]
    assert metrics.rank(at(5, 25, 70), people, 1).tolist() == [2, 1, 2]
    assert metrics.mean_vector(at(10, 70)) == pytest.approx(at(40)[0])


def test_identity_by_hand():
    """Three videos of two people, whose vectors are on a circle.

    Person a has hold-out frames at 0 and 20 degrees in one video and at 40 and 60 in the other, so that the
    mean is at 30. Person b has a mean at 90.
    """
    people = {"a1": "a", "b": "b", "a2": "a"}
    vectors = {"a1": {"T0 real frame": at(0, 20), "T1 Ours-FT": at(10, 70)},
               "b": {"T0 real frame": at(80, 100), "T1 Ours-FT": at(50, 95)},
               "a2": {"T0 real frame": at(40, 60), "T1 Ours-FT": at(0, 40)}}
    rows = {name: [{"video": name, "T": str(T), "method": method, "frame": str(k)}
                   for T, method in ((0, "real frame"), (1, "Ours-FT")) for k in (0, 1)] for name in people}
    report.add_identity(rows, vectors, people, training=at(-8, 82, 200))
    cosine = lambda *degrees: pytest.approx(np.cos(np.radians(degrees)))
    pick = lambda name, column: [row[column] for row in rows[name] if row["method"] == "Ours-FT"]
    assert pick("a1", "csim") == cosine(10, 50)
    assert pick("a1", "csim_stranger") == cosine(70, 30)            # b has the next video of another person
    assert pick("a2", "csim_stranger") == cosine(80, 60)            # b again, because a1 is the same person
    assert pick("b", "csim_stranger") == cosine(10, 35)
    assert pick("a1", "rank") == [1, 2]                             # 10 is nearest to 30, 70 to 90
    assert pick("b", "rank") == [2, 1]
    # the frame at 10 is 20 from a and 18 from -8; the one at 70 is 40 from a and 12 from 82
    assert pick("a1", "nearer_training") == [1, 1]
    assert pick("a2", "nearer_training") == [1, 0]
    assert pick("b", "nearer_training") == [1, 0]
    assert [row["rank"] for row in rows["a1"][:2]] == [1, 1]


def test_identity_score():
    assert report.identity_score(.1, .1, .6) == 0 and report.identity_score(.6, .1, .6) == pytest.approx(100)
    assert report.identity_score(.35, .1, .6) == pytest.approx(50)
    assert np.isnan(report.identity_score(.35, .6, .6)) and np.isnan(report.identity_score(.35, np.nan, .6))


def test_the_table():
    """Three of four frames are nearest to their person, and one is nearer to the training data."""
    common = {"landmark_error": np.nan, "found": np.nan, "ssim": .5}
    row = lambda video, T, method, csim, stranger, rank, nearer: common | {
        "video": video, "T": T, "method": method, "csim": csim, "csim_stranger": stranger, "rank": rank,
        "nearer_training": nearer}
    rows = [row(video, 0.0, report.REAL, 1.0, .1, 1.0, 0.0) for video in "ab"]
    rows += [row(video, 1.0, report.COPY, .6, .1, 1.0, 0.0) for video in "ab"]
    rows += [row("a", 1.0, report.AFTER, .2, .1, 1.0, 0.0), row("a", 1.0, report.AFTER, .3, .1, 1.0, 1.0),
             row("b", 1.0, report.AFTER, .4, .5, 2.0, 0.0), row("b", 1.0, report.AFTER, .5, .1, 1.0, 0.0)]
    distances = {"T0 real frame": {}, "T1 copy of the source": {}, "T1 Ours-FT": {"frechet": .25}}
    text, strangers, same = report.table(rows, distances, judge="dlib", held_out=7, trained_on=True)
    assert (strangers, same) == (pytest.approx(.1), pytest.approx(.6))
    head, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines())
    ours = dict(zip(head, lines[2]))
    assert ours == {
        "method (T)": "Ours-FT (1)", "FID ↓": "n/a", "Fréchet (dlib) ↓": "0.250", "SSIM ↑": "0.500 ± 0.000",
        "CSIM (dlib, trained on) ↑": "0.350 ± 0.100", "identity score ↑": "50",
        "nearest of 7": "75 %", "nearer to training ↓": "25 %", "landmarks ↓": "n/a", "face found": "n/a"}
    rows = [r | {"nearer_training": np.nan} for r in rows]
    plain, *_ = report.table(rows, distances, judge="x.ts", held_out=7)
    assert "training" not in plain and "trained on" not in plain and "CSIM (x.ts) ↑" in plain
