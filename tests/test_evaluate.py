"""evaluate.py: its metrics against known values, its protocol, and the command as a user runs it."""
import base64
import csv
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from conftest import PHOTO, ROOT, fail, networks, succeed
from faces import crop, face_box, to_crop
from files import save_tensors
from media import read_photo
from model import save_checkpoint
from toy import ToyHeads

LFW = ROOT.parent / "shared/data/lfw"


def cropped(path, detect, size=128):
    image = read_photo(path)
    points = detect(image)
    box = face_box(points)
    return crop(image, box, size), to_crop(points, box, size)


@pytest.fixture(scope="module")
def astronaut(detect):
    return cropped(PHOTO, detect)


@pytest.fixture(scope="module")
def recognise():
    return evaluate.dlib_recognition()


# -------------------------------------------------------------------------------------------- the metrics

def test_equal_images_score_one(astronaut, recognise):
    frame, points = astronaut
    assert evaluate.ssim(frame, frame) == pytest.approx(1)
    v = recognise(frame, points)
    assert v.shape == (128,) and v @ v == pytest.approx(1)


def test_ssim_is_that_of_its_paper(astronaut):
    """Against the formula of [41] at one place: 11 x 11 Gaussian of 1.5 pixels, C1 = (0.01 * 255)^2, C2 = (0.03 * 255)^2."""
    a = astronaut[0][:11, :11]
    b = np.roll(a, 2, axis=1)
    g = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    w = np.outer(g, g)[..., None] / g.sum() ** 2
    x, y = a.astype(float), b.astype(float)
    mx, my = (w * x).sum((0, 1)), (w * y).sum((0, 1))
    vx, vy, c = (w * x * x).sum((0, 1)) - mx ** 2, (w * y * y).sum((0, 1)) - my ** 2, (w * x * y).sum((0, 1)) - mx * my
    C1, C2 = (.01 * 255) ** 2, (.03 * 255) ** 2
    expected = ((2 * mx * my + C1) * (2 * c + C2) / ((mx ** 2 + my ** 2 + C1) * (vx + vy + C2))).mean()
    assert evaluate.ssim(a, b) == pytest.approx(expected, abs=1e-6)


def test_landmark_error_in_per_cent_of_the_eye_distance(astronaut, detect):
    frame, points = astronaut
    right = evaluate.landmark_error(frame, points, detect)
    assert 0 < right < 4                                                        # found again, on a smaller copy
    eyes = np.linalg.norm(points[36] - points[45])
    assert evaluate.landmark_error(frame, points + (0.1 * eyes, 0), detect) == pytest.approx(10, abs=right + .1)
    assert evaluate.landmark_error(np.zeros_like(frame), points, detect) is None


def test_fid_against_hand_computed_values():
    rng = np.random.default_rng(0)
    frames = list(rng.integers(0, 255, (40, 8, 8, 3), dtype=np.uint8))
    network = lambda images: images.float().mean((2, 3))                       # (B, 3)
    real = evaluate.fid_statistics(frames, network)
    assert evaluate.fid(real, evaluate.fid_statistics(frames, network)) == pytest.approx(0, abs=1e-6)
    shifted = evaluate.fid_statistics(frames, lambda images: network(images) + torch.tensor([3.0, 0, 4]))
    assert evaluate.fid(real, shifted) == pytest.approx(25, abs=1e-3)           # |(3, 0, 4)|^2


def test_an_arcface_like_network_gets_an_aligned_face(astronaut, tmp_path):
    """A network that returns its input: the eyes of the aligned face are where ArcFace wants them, however the head is turned."""
    class Echo(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1)
    torch.jit.save(torch.jit.script(Echo()), str(tmp_path / "echo.pt"))
    recognise = evaluate.torchscript_recognition(str(tmp_path / "echo.pt"), "cpu")
    frame, points = astronaut
    a = recognise(frame, points)
    assert a.shape == (3 * 112 * 112,)
    turned = np.ascontiguousarray(np.rot90(frame))
    b = recognise(turned, np.stack([points[:, 1], len(frame) - 1 - points[:, 0]], axis=1))
    assert a @ b > 0.995


@pytest.mark.skipif(not LFW.exists(), reason="needs ../shared")
def test_the_right_identity_scores_higher_than_a_shuffled_one(detect, recognise):
    people = [sorted((LFW / name).glob("*.jpg"))[:2] for name in ("Colin_Powell", "Halle_Berry", "Tim_Henman", "Kofi_Annan", "Jennifer_Garner")]
    a, b = (np.array([recognise(*cropped(pair[k], detect)) for pair in people]) for k in (0, 1))
    assert (np.diag(a @ b.T) > np.diag(a @ np.roll(b, 1, axis=0).T)).all()


# ------------------------------------------------------------------------------------------- the protocol

class Folder:
    """Stands for PreparedVideos: names and numbers of frames."""
    folder = "."

    def __init__(self, **counts):
        self.files, self.counts = [f"./{name}.pt" for name in counts], list(counts.values())

    def count(self, i):
        return self.counts[i]


def test_learning_and_holdout_frames_never_overlap():
    data = ToyHeads(6, 64, first=1000)
    protocol = evaluate.draw_protocol(data, [1, 8, 32], 32, 5, seed=0)
    assert len(protocol) == 5 and protocol == evaluate.draw_protocol(data, [1, 8, 32], 32, 5, seed=0) != evaluate.draw_protocol(data, [1, 8, 32], 32, 5, seed=1)
    for frames in protocol.values():
        assert (len(set(frames["learn"])), len(set(frames["holdout"]))) == (32, 32) and not set(frames["learn"]) & set(frames["holdout"])


def test_short_videos_are_named_and_left_out(capsys):
    from files import UserError
    protocol = evaluate.draw_protocol(Folder(long=40, short=39), [8], 32, 50, 0)
    assert list(protocol) == ["long"] and "short" in capsys.readouterr().err
    with pytest.raises(UserError, match="--holdout"):
        evaluate.draw_protocol(Folder(short=39), [8], 32, 50, 0)


def test_a_given_split_is_kept():
    data = Folder(**{"train/a": 9, "test/a": 40, "train/b": 9, "test/b": 31, "other": 99})
    assert evaluate.find_videos(data) == {"a": (0, 1), "b": (2, 3)}
    protocol = evaluate.draw_protocol(data, [8], 32, 50, 0)
    assert list(protocol) == ["a"] and max(protocol["a"]["learn"]) < 9 and len(protocol["a"]["holdout"]) == 32


def test_who_is_the_same_person():
    names = ["clips/id00061/abc", "id00061/def", "photos/Tom_Hanks", "photos/Halle_Berry"]
    assert [evaluate.person(n) for n in names] == ["id00061", "id00061", "photos/Tom_Hanks", "photos/Halle_Berry"]


# -------------------------------------------------------------------------------------------- the command

def test_the_controls_are_frames_of_the_source():
    """With one source frame both are this one; with two, the nearer one by its landmarks is found."""
    frames, points = np.arange(2, dtype=np.uint8)[:, None, None, None] * np.ones((2, 64, 64, 3), np.uint8), np.zeros((2, 68, 2), np.float32)
    points[1] += 10
    truth = (frames, points[::-1] + 1)
    for T, nearest in ((1, [0, 0]), (2, [1, 0])):
        controls = evaluate.methods(None, T, (frames, points), truth)
        assert [next(controls)[1][:, 0, 0, 0].tolist() for _ in range(2)] == [[0, 0], nearest]


FLAGS = ["--toy", "--videos", "2", "--shots", "2", "--holdout", "3", "--out", "out"]


@pytest.fixture(scope="module")
def ff_checkpoint(tmp_path_factory):
    cfg, E, G, D = networks(match=False)
    path = tmp_path_factory.mktemp("ff") / "ff.pt"
    save_checkpoint(path, "meta", cfg, E=E, G=G, V=D.V, w0=D.w0, b=D.b)
    return path


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, checkpoint, ff_checkpoint):
    folder = tmp_path_factory.mktemp("evaluated")
    said = succeed("evaluate.py", *FLAGS, "--checkpoint", checkpoint, "--ff-checkpoint", ff_checkpoint, "--ablation", "--user-study", "study", cwd=folder)
    return folder, said


def test_table_scores_and_figure(evaluated):
    folder, said = evaluated
    rows = list(csv.DictReader(open(folder / "out/scores.csv")))
    methods = ["copy of the source", "nearest source frame", "Ours-FF", "Ours-FT before fine-tuning", "Ours-FT", "without L'_ADV",
               "random w'", "random psi'", "random e_NEW", "without L_MCH, random w'"]
    assert len(rows) == 2 * 3 * (1 + len(methods))
    assert [r["ssim"] for r in rows if r["method"] == "real frame"] == pytest.approx(["1.0"] * 6)
    table = (folder / "out/table.md").read_text()
    assert table.strip() in said and "FID: n/a" in said and "--inception" in said
    lines = re.findall(r"^\| ([^|]+?) \(\d+\) \|", table, re.M)
    assert lines == methods
    # a number of the table, computed again from the scores
    told = re.search(r"^\| Ours-FT \(2\) \| n/a \| ([\d.]+) ± ([\d.]+)", table, re.M)
    means = [np.mean([float(r["ssim"]) for r in rows if (r["method"], r["T"], r["video"]) == ("Ours-FT", "2", v)]) for v in ("head 1000", "head 1001")]
    assert float(told[1]) == pytest.approx(np.mean(means), abs=6e-4) and float(told[2]) == pytest.approx(abs(means[0] - means[1]) / 2, abs=6e-4)
    width, height = Image.open(folder / "out/figure.png").size
    assert (width, height) == (40 + 128 * (2 + len(methods)), 30 + 128 * 2)
    # the switches change the result
    pick = lambda method, T: [r["ssim"] for r in rows if (r["method"], r["T"]) == (method, T)]
    assert len({tuple(pick(m, "2")) for m in methods[3:-1]}) == 6
    assert pick(methods[-1], "2") == pick("random w'", "2")                     # the two checkpoints of this test are the same


def test_a_stopped_evaluation_goes_on(evaluated, checkpoint, ff_checkpoint):
    folder, _ = evaluated
    before = (folder / "out/scores.csv").read_text()
    kept, lost = (folder / f"out/head {n}/scores.csv" for n in (1000, 1001))
    lost.unlink()
    stamp = kept.stat().st_mtime_ns
    flags = ["--checkpoint", checkpoint, "--ff-checkpoint", ff_checkpoint, "--ablation"]
    succeed("evaluate.py", *FLAGS, *flags, cwd=folder)
    assert kept.stat().st_mtime_ns == stamp and (folder / "out/scores.csv").read_text() == before
    assert "another --out" in fail("evaluate.py", *FLAGS, *flags, "--seed", "1", cwd=folder)


def test_the_user_study_knows_its_fakes(evaluated):
    folder, _ = evaluated
    page = (folder / "study/index.html").read_text()
    triplets = json.loads(re.search(r"const triplets = (.*);  ", page)[1])
    assert len(triplets) == 2 * 3 and {t["method"] for t in triplets} == {f"{m} (2)" for m in ("Ours-FF", "Ours-FT before fine-tuning", "Ours-FT")}
    assert len({t["fake"] for t in triplets}) > 1
    for t in triplets:
        pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))) for url in t["pictures"]]
        method, T = re.fullmatch(r"(.*) \((\d)\)", t["method"]).groups()
        strip = lambda name: [f.tobytes() for f in evaluate.read_strip(folder / "out" / t["video"] / f"{name}.png")]
        real = strip("T0 real frame") + strip("T0 source")
        assert [p.tobytes() in real for p in pictures] == [k != t["fake"] for k in range(3)]
        assert pictures[t["fake"]].tobytes() in strip(f"T{T} {method}")
    assert "http" not in page and len((ROOT / "assets/user_study.html").read_text().splitlines()) <= 80


def test_timing_prints_table_2(tmp_path, checkpoint):
    said = succeed("evaluate.py", "--toy", "--videos", "1", "--shots", "1", "--timing", "--checkpoint", checkpoint, cwd=tmp_path)
    seconds = [float(s) for s in re.findall(r"\| ([\d.]+) s \| [\d.]+ s \|", said)]
    assert len(seconds) == 3 and 0 < seconds[0] < seconds[1] and "CPU" in said and "43.84 s" in said


def test_what_a_user_can_get_wrong(tmp_path, checkpoint, ff_checkpoint):
    flags = ["evaluate.py", "--checkpoint", checkpoint]
    assert "no prepared videos" in fail(*flags, "--data", "nowhere", cwd=tmp_path)
    assert "no file nothing.pth" in fail(*flags, "--toy", "--inception", "nothing.pth", cwd=tmp_path)
    assert "without the match loss" in fail(flags[0], "--checkpoint", ff_checkpoint, "--toy", cwd=tmp_path)
    assert "--no-match" in fail(*flags, "--ff-checkpoint", checkpoint, "--toy", cwd=tmp_path)
    assert "--shots" in fail(*flags, "--toy", "--shots", "0", cwd=tmp_path)
    (tmp_path / "junk").write_bytes(b"junk")
    assert "FID" in fail(*flags, "--toy", "--inception", "junk", cwd=tmp_path)
    assert "TorchScript" in fail(*flags, "--toy", "--recognition", "junk", cwd=tmp_path)
    state = torch.load(checkpoint, weights_only=True)
    save_tensors({k: v for k, v in state.items() if not k.startswith("E.")}, tmp_path / "no-E.pt")
    assert "does not fit its own config" in fail(flags[0], "--checkpoint", "no-E.pt", "--toy", "--videos", "1", "--shots", "1", "--holdout", "1", cwd=tmp_path)
