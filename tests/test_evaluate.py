"""evaluate.py: its methods, and the command as a user runs it. test_protocol.py has its protocol."""
import base64
import contextlib
import csv
import io
import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import infer
from beyond.recognition import FaceTerm
from beyond.toy import ToyHeads
from conftest import ROOT, networks, prepare, succeed
from data import PreparedVideos
from evaluation import metrics, report
from finetune import learn_person
from media.folders import Photo
from runtime.checkpoint import save_checkpoint
from runtime.files import UserError, save_tensors


# -------------------------------------------------------------------------------------- the methods

def test_the_controls_are_frames_of_the_source():
    """With T = 1 both copy the only frame. With T = 2 one copies the frame with the nearest landmarks."""
    frames = np.arange(2, dtype=np.uint8)[:, None, None, None] * np.ones((2, 64, 64, 3), np.uint8)
    points = np.zeros((2, 68, 2), np.float32)
    points[1] += 10
    holdout = (frames, points[::-1] + 1)
    for T, nearest in ((1, [0, 0]), (2, [1, 0])):
        controls = evaluate.methods(None, T, (frames, points), holdout)
        assert [next(controls)[1][:, 0, 0, 0].tolist() for _ in range(2)] == [[0, 0], nearest]


def test_what_is_scored_is_what_users_get(checkpoint, monkeypatch):
    """The frames are those that infer.py renders, with folded weights and in its dtype (here bfloat16)."""
    monkeypatch.setattr(infer, "fast_dtype", lambda device: torch.bfloat16)
    state = evaluate.load_checkpoint(checkpoint)
    data = ToyHeads(1)
    learning, holdout = data.load(0, [0, 1]), data.load(0, range(2, 12))
    setup = evaluate.Setup(state=state, ff_state=None, content=None, ablation=False, detect=None,
                           recognise=None, device="cpu")

    def scored(T, wanted):
        return next(frames for method, frames, _ in evaluate.methods(setup, T, learning, holdout)
                    if method == wanted)

    # before fine-tuning, on two photos
    G, psi, _ = learn_person(state, [Photo(*learning)], content=None, epochs=0, device="cpu")
    rendered = np.stack(list(infer.render(G, psi, holdout[1], 64)))
    assert np.array_equal(scored(2, report.BEFORE), rendered)

    # after fine-tuning, on one photo
    monkeypatch.setattr(evaluate, "EPOCHS", 2)
    content = evaluate.ContentLoss("l1", extra=FaceTerm())
    photo = Photo(*(values[:1] for values in learning))
    setup = setup._replace(content=content)
    G, psi, _ = learn_person(state, [photo], content, epochs=2, device="cpu")
    rendered = np.stack(list(infer.render(G, psi, holdout[1], 64)))
    assert np.array_equal(scored(1, report.AFTER), rendered)

    # the dtype makes a difference
    monkeypatch.setattr(infer, "fast_dtype", lambda device: torch.float32)
    in_float32 = np.stack(list(infer.render(G.float(), psi, holdout[1], 64)))
    assert not np.array_equal(in_float32, rendered)


# -------------------------------------------------------------------------------------- the command

def command(*args, cwd, epochs=2):
    """Run `python evaluate.py ARGS` in this process, with few epochs of fine-tuning -> what it prints."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["evaluate.py", *map(str, args)])
        patch.setattr(evaluate, "EPOCHS", epochs)
        patch.setattr(evaluate, "default_device", lambda: "cpu")
        evaluate.main()
    return said.getvalue()


FLAGS = ["--toy", "--videos", "2", "--shots", "2", "--holdout", "3", "--out", "out"]
METHODS = ["copy of the source", "nearest source frame", "Ours-FF", "Ours-FT before fine-tuning", "Ours-FT",
           "Ours-FT, as in the paper",
           "without L'_ADV", "random w'", "random psi'", "random e_NEW", "without L_MCH, random w'"]


@pytest.fixture(scope="module")
def ff_checkpoint(tmp_path_factory):
    """A tiny, untrained checkpoint of the FF variant."""
    cfg, E, G, D = networks(match=False)
    path = tmp_path_factory.mktemp("ff") / "ff.pt"
    save_checkpoint(path, "meta", cfg, E=E, G=G, V=D.V, w0=D.w0, b=D.b)
    return path


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, checkpoint, ff_checkpoint):
    """The folder of an evaluation with all methods and the user study, and what it printed."""
    folder = tmp_path_factory.mktemp("evaluated")
    said = command(*FLAGS, "--checkpoint", checkpoint, "--ff-checkpoint", ff_checkpoint, "--ablation",
                   "--user-study", "study", cwd=folder)
    return folder, said


def test_table_scores_and_figure(evaluated):
    folder, said = evaluated
    rows = list(csv.DictReader(open(folder / "out/scores.csv")))
    assert len(rows) == 2 * 3 * (1 + len(METHODS))
    assert [r["ssim"] for r in rows if r["method"] == "real frame"] == ["1.0"] * 6
    table = (folder / "out/table.md").read_text()
    assert table.strip() in said and "FID: n/a" in said and "--inception" in said
    assert re.findall(r"^\| ([^|]+?) \(2\) \|", table, re.M) == METHODS
    # a cell of the table, computed again from the scores
    cell = re.search(r"^\| Ours-FT \(2\) \| n/a \| n/a \| ([\d.]+) ± ([\d.]+)", table, re.M)
    of = lambda method, video: [r for r in rows if (r["method"], r["video"]) == (method, video)]
    pick = lambda method, video: [float(r["ssim"]) for r in of(method, video)]
    means = [np.mean(pick("Ours-FT", video)) for video in ("head 1000", "head 1001")]
    assert float(cell[1]) == pytest.approx(np.mean(means), abs=6e-4)
    assert float(cell[2]) == pytest.approx(abs(means[0] - means[1]) / 2, abs=6e-4)
    width, height = Image.open(folder / "out/figure.png").size
    assert (width, height) == (40 + 128 * (2 + len(METHODS)), 30 + 128 * 2)
    # every switch of fine-tuning changes the result
    assert len({tuple(pick(method, "head 1000")) for method in METHODS[3:-1]}) == 7
    # the two checkpoints of this test have the same weights
    assert pick(METHODS[-1], "head 1000") == pick("random w'", "head 1000")


def test_a_stopped_evaluation_can_be_resumed(evaluated, checkpoint, ff_checkpoint):
    folder, _ = evaluated
    before = (folder / "out/scores.csv").read_text()
    finished, missing = (folder / f"out/head {n}/scores.csv" for n in (1000, 1001))
    missing.unlink()
    stamp = finished.stat().st_mtime_ns
    flags = [*FLAGS, "--checkpoint", checkpoint, "--ff-checkpoint", ff_checkpoint, "--ablation"]
    command(*flags, cwd=folder)
    assert finished.stat().st_mtime_ns == stamp and (folder / "out/scores.csv").read_text() == before
    with pytest.raises(UserError, match="another --out"):
        command(*flags, "--seed", "1", cwd=folder)


def test_the_user_study_has_one_fake_in_each_triplet(evaluated):
    folder, _ = evaluated
    page = (folder / "study/index.html").read_text()
    triplets = json.loads(re.search(r"const triplets = (.*);  ", page)[1])
    methods = {f"{method} (2)" for method in (report.FF, report.BEFORE, report.AFTER)}
    assert len(triplets) == 2 * 3 and {t["method"] for t in triplets} == methods
    assert len({t["fake"] for t in triplets}) > 1
    for t in triplets:
        files = [io.BytesIO(base64.b64decode(url.split(",")[1])) for url in t["pictures"]]
        pictures = [np.asarray(Image.open(file)).tobytes() for file in files]
        method, T = re.fullmatch(r"(.*) \((\d)\)", t["method"]).groups()
        frames = lambda name: report.read_strip(folder / "out" / t["video"] / f"{name}.png")
        strip = lambda name: [frame.tobytes() for frame in frames(name)]
        real = strip("T0 real frame") + strip("T0 source")
        assert [picture in real for picture in pictures] == [k != t["fake"] for k in range(3)]
        assert pictures[t["fake"]] in strip(f"T{T} {method}")
    assert "http" not in page and len((ROOT / "assets/user_study.html").read_text().splitlines()) <= 80


class Colours(torch.nn.Module):
    """Stands in for a recognition network: its vector holds the mean colours of 7 x 7 regions."""

    def forward(self, x):
        return torch.nn.functional.adaptive_avg_pool2d(x, 7).flatten(1)


def test_videos_with_times_and_training_data(tmp_path, checkpoint):
    """Two drawn heads are held out. The training data has two other heads, one of them in two clips."""
    heads = lambda i, frames: ToyHeads(9, 64).load(i, frames)
    times = {"file": [0] * 40, "seconds": np.arange(40) / 10}
    for i in (0, 1):
        prepare(tmp_path / f"held/head{i}.pt", *heads(i, range(40)), **times)
    for i, name in ((2, "id2/a"), (2, "id2/b"), (3, "id3/a")):
        prepare(tmp_path / f"train/{name}.pt", *heads(i, range(6)))
    torch.jit.save(torch.jit.script(Colours()), str(tmp_path / "colours.ts"))
    flags = ["--data", "held", "--train-data", "train", "--recognition", "colours.ts", "--shots", "1",
             "--holdout", "4", "--checkpoint", checkpoint, "--out", "out"]
    said = command(*flags, cwd=tmp_path)
    head = said.splitlines()[0]
    assert "| Fréchet (colours.ts) ↓ |" in head and "| nearest of 2 | nearer to training ↓ |" in head

    # frames to learn from are in the first part, hold-out frames in the last
    for frames in json.loads((tmp_path / "out/protocol.json").read_text())["videos"].values():
        assert max(frames["learn"]) / 10 + 1 <= min(frames["holdout"]) / 10

    # whom the frames show is computed again from the vectors
    vectors = {i: dict(np.load(tmp_path / f"out/head{i}/vectors.npz")) for i in (0, 1)}
    recognise = metrics.torchscript_recognition(str(tmp_path / "colours.ts"), "cpu")
    data, training = PreparedVideos(str(tmp_path / "train")), []
    for sequences in ((0, 1), (2,)):        # id2 and id3
        pairs = [pair for i in sequences for pair in zip(*data.load(i, [0, 2, 3, 5]))]
        mean = np.mean([recognise(*pair) for pair in pairs], axis=0)
        training.append(mean / np.linalg.norm(mean))
    assert np.allclose(np.load(tmp_path / "out/training.npz")["vectors"], training)
    persons = [vectors[i]["T0 real frame"].mean(0) for i in (0, 1)]
    persons = [person / np.linalg.norm(person) for person in persons]
    rows = list(csv.DictReader(open(tmp_path / "out/scores.csv")))
    seen = set()
    for i in (0, 1):
        for method in ("copy of the source", "Ours-FT"):
            generated = vectors[i][f"T1 {method}"]
            own = [row for row in rows if (row["video"], row["method"]) == (f"head{i}", method)]
            nearer = [max(v @ t for t in training) > v @ persons[i] for v in generated]
            assert [row["nearer_training"] for row in own] == [str(int(yes)) for yes in nearer]
            ranks = [1 + (v @ persons[1 - i] > v @ persons[i]) for v in generated]
            assert [row["rank"] for row in own] == list(map(str, ranks))
            seen |= {(row["rank"], row["nearer_training"]) for row in own}
    assert len(seen) > 1
    both = lambda name: np.concatenate([vectors[0][name], vectors[1][name]])
    real, copy = both("T0 real frame"), both("T1 copy of the source")
    assert f"| copy of the source (1) | n/a | {metrics.frechet(real, copy):.3f} |" in said

    # the vectors of the training data are computed once
    stamp = (tmp_path / "out/training.npz").stat().st_mtime_ns
    assert command(*flags, cwd=tmp_path) == said
    assert (tmp_path / "out/training.npz").stat().st_mtime_ns == stamp


def test_as_a_user_runs_it(tmp_path, checkpoint):
    """In a process of its own, with all epochs of fine-tuning. Only the amount of data is reduced."""
    said = succeed("evaluate.py", "--toy", "--videos", "1", "--shots", "1", "--holdout", "1",
                   "--checkpoint", checkpoint, cwd=tmp_path)
    assert "| Ours-FT (1) |" in said and "wrote runs/eval/table.md" in said
    assert (tmp_path / "runs/eval/figure.png").exists()


def test_timing_prints_table_2(tmp_path, checkpoint):
    flags = ["--toy", "--videos", "1", "--shots", "1", "--checkpoint", checkpoint]
    said = command(*flags, "--timing", cwd=tmp_path)
    seconds = [float(s) for s in re.findall(r"\| ([\d.]+) s \| [\d.]+ s \|", said)]
    assert len(seconds) == 3 and 0 < seconds[0] < seconds[1] and "CPU" in said and "43.84 s" in said


def test_what_a_user_can_get_wrong(tmp_path, checkpoint, ff_checkpoint):
    def refused(*args):
        with pytest.raises(UserError) as caught:
            command(*args, cwd=tmp_path)
        return str(caught.value)

    flags = ["--checkpoint", checkpoint]
    assert "no prepared videos in nowhere" in refused(*flags, "--data", "nowhere")
    assert "no prepared videos in nobody" in refused(*flags, "--toy", "--train-data", "nobody",
                                                     "--recognition", checkpoint)
    assert "--recognition" in refused(*flags, "--toy", "--train-data", "nobody")
    assert "no file nothing.pth" in refused(*flags, "--toy", "--inception", "nothing.pth")
    assert "without the match loss" in refused("--checkpoint", ff_checkpoint, "--toy")
    assert "--no-match" in refused(*flags, "--ff-checkpoint", checkpoint, "--toy")
    assert "--shots" in refused(*flags, "--toy", "--shots", "0")
    (tmp_path / "junk").write_bytes(b"junk")
    assert "FID" in refused(*flags, "--toy", "--inception", "junk")
    assert "TorchScript" in refused(*flags, "--toy", "--recognition", "junk")
    state = torch.load(checkpoint, weights_only=True)
    save_tensors({k: v for k, v in state.items() if not k.startswith("E.")}, tmp_path / "no-E.pt")
    assert "does not fit its own config" in refused("--checkpoint", "no-E.pt", "--toy", "--videos", "1")
    assert not (tmp_path / "runs").exists()     # all errors come before anything is written
