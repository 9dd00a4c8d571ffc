"""evaluate.py: its protocol, its methods, and the command as a user runs it."""
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
from beyond.toy import ToyHeads
from conftest import ROOT, networks, succeed
from data import PreparedVideos
from evaluation import metrics, protocol, report
from finetune import learn_person
from model import save_checkpoint
from runtime.files import UserError, save_tensors


def prepare(path, frames, points, **times):
    """A file as data.py makes it. times: "file" and "seconds" of the frames."""
    jpegs = []
    for frame in frames:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG", quality=95)
        jpegs.append(torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8))
    offsets = torch.tensor([0] + [len(jpeg) for jpeg in jpegs]).cumsum(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors({"jpeg": torch.cat(jpegs), "offsets": offsets, "landmarks": torch.tensor(points),
                  "image_size": len(frames[0]), "detector": "dlib"}
                 | {name: torch.tensor(values) for name, values in times.items()}, path)


def timed(folder, **videos):
    """A prepared folder of black frames. name -> (file, seconds) of them, or just their number."""
    for name, times in videos.items():
        count = times if isinstance(times, int) else len(times[0])
        times = {} if isinstance(times, int) else {"file": times[0], "seconds": times[1]}
        prepare(folder / f"{name}.pt", np.zeros((count, 64, 64, 3), np.uint8),
                np.zeros((count, 68, 2), np.float32), **times)
    return PreparedVideos(str(folder))


# ------------------------------------------------------------------------------------- the protocol

class Folder:
    """Stands for PreparedVideos: names and numbers of frames."""
    folder = "."

    def __init__(self, **counts):
        self.files, self.counts = [f"./{name}.pt" for name in counts], list(counts.values())

    def count(self, i):
        return self.counts[i]


def test_parts_are_contiguous_with_a_second_between_them():
    seconds = np.arange(100) / 10                                   # ten frames a second
    first, last = protocol.parts(seconds, 8, 32)
    assert (first.tolist(), last.tolist()) == (list(range(45)), list(range(54, 99 + 1)))
    assert seconds[last[0]] - seconds[first[-1]] == pytest.approx(1)
    first, last = protocol.parts(seconds, 8, 80)                    # the hold-out part needs more than half
    assert (len(first), len(last)) == (11, 80) and last[-1] == 99
    first, last = protocol.parts(seconds, 80, 8)
    assert (len(first), len(last)) == (80, 11)
    assert [len(part) for part in protocol.parts(seconds, 60, 32)] == [0, 0]    # 60 + 9 + 32 are 101


def test_a_video_learns_from_its_first_part_and_holds_out_its_last(tmp_path):
    """Frames at an uneven rate, of two clips: the time between clips is unknown, so it doesn't count."""
    file = [0] * 30 + [1] * 30
    seconds = [*np.cumsum(np.tile([.02, .06], 15)), *(500 + np.arange(30) * .04)]
    data = timed(tmp_path, video=(file, seconds))
    clock = protocol.clock(data, 0)
    assert clock[[0, 29, 30, 59]] == pytest.approx([0, 1.18, 1.18, 2.34])
    drawn = protocol.draw_protocol(data, [1, 8], 8, 50, seed=0)["video"]
    learn, held = drawn["learn"], drawn["holdout"]
    assert len(set(learn)) == len(set(held)) == 8 and held == sorted(held)
    assert clock[min(held)] - clock[max(learn)] >= protocol.GAP
    assert learn != sorted(learn)                                   # T = 1 is any frame of the first part
    assert protocol.draw_protocol(data, [1, 8], 8, 50, seed=0)["video"] == drawn
    assert protocol.draw_protocol(data, [1, 8], 8, 50, seed=1)["video"] != drawn


def test_a_video_too_short_for_the_gap_is_left_out(tmp_path, capsys):
    times = lambda count: ([0] * count, np.arange(count) / 25)
    data = timed(tmp_path, long=times(60), brief=times(39))
    assert list(protocol.draw_protocol(data, [8], 8, 50, 0)) == ["long"]
    assert "a second apart: brief" in capsys.readouterr().err       # 8 + 24 + 8 frames are 40


def test_photos_have_no_time(tmp_path, capsys):
    """Drawn from one shuffle, as folders without times are; only of these a word is said."""
    photos = timed(tmp_path / "photos", person=(list(range(20)), [0.0] * 20))
    older = timed(tmp_path / "older", person=20)
    drawn = protocol.draw_protocol(photos, [8], 8, 50, 0)
    assert not capsys.readouterr().err
    assert drawn == protocol.draw_protocol(older, [8], 8, 50, 0)
    assert "1 of 1 sequences were prepared without times" in capsys.readouterr().err
    learn, held = drawn["person"]["learn"], drawn["person"]["holdout"]
    assert not set(learn) & set(held) and min(held) < max(learn)


def test_learning_and_holdout_frames_never_overlap():
    draw = lambda seed: protocol.draw_protocol(ToyHeads(6, 64, first=1000), [1, 8, 32], 32, 5, seed)
    assert len(draw(0)) == 5 and draw(0) == draw(0) != draw(1)
    for frames in draw(0).values():
        learn, held = set(frames["learn"]), set(frames["holdout"])
        assert len(learn) == len(held) == 32 and not learn & held


def test_short_videos_are_named_and_left_out(capsys):
    drawn = protocol.draw_protocol(Folder(long=40, short=39), [8], 32, 50, 0)
    assert list(drawn) == ["long"] and "short" in capsys.readouterr().err
    with pytest.raises(UserError, match="--holdout"):
        protocol.draw_protocol(Folder(short=39), [8], 32, 50, 0)


def test_a_damaged_video_is_left_out_with_one_warning(tmp_path, capsys):
    timed(tmp_path, broken=([0] * 80, np.arange(80) / 25), whole=([0] * 80, np.arange(80) / 25))
    (tmp_path / "broken.pt").write_bytes(b"junk")
    assert list(protocol.draw_protocol(PreparedVideos(str(tmp_path)), [8], 8, 50, 0)) == ["whole"]
    said = capsys.readouterr().err
    assert said.count("is damaged") == 1 and "a second apart: broken" in said


def test_a_given_split_is_kept():
    data = Folder(**{"train/a": 9, "test/a": 40, "train/b": 9, "test/b": 31, "other": 99})
    assert protocol.find_videos(data) == {"a": (0, 1), "b": (2, 3)}
    drawn = protocol.draw_protocol(data, [8], 32, 50, 0)
    assert list(drawn) == ["a"] and max(drawn["a"]["learn"]) < 9 and len(drawn["a"]["holdout"]) == 32


def test_who_is_the_same_person():
    names = ["clips/id00061/abc", "id00061/def", "photos/Tom_Hanks", "photos/Halle_Berry"]
    who = [protocol.person(name) for name in names]
    assert who == ["id00061", "id00061", "photos/Tom_Hanks", "photos/Halle_Berry"]


# -------------------------------------------------------------------------------------- the methods

def test_the_controls_are_frames_of_the_source():
    """With one source frame both are this one; with two, the nearer one by its landmarks is found."""
    frames = np.arange(2, dtype=np.uint8)[:, None, None, None] * np.ones((2, 64, 64, 3), np.uint8)
    points = np.zeros((2, 68, 2), np.float32)
    points[1] += 10
    truth = (frames, points[::-1] + 1)
    for T, nearest in ((1, [0, 0]), (2, [1, 0])):
        controls = evaluate.methods(None, T, (frames, points), truth)
        assert [next(controls)[1][:, 0, 0, 0].tolist() for _ in range(2)] == [[0, 0], nearest]


def test_what_is_scored_is_what_users_get(checkpoint, monkeypatch):
    """Frame by frame what infer.py renders: folded, in its number format (here bfloat16)."""
    monkeypatch.setattr(infer, "fast_dtype", lambda device: torch.bfloat16)
    state = evaluate.load_checkpoint(checkpoint)
    data = ToyHeads(1)
    source, truth = data.load(0, lambda count: [0, 1]), data.load(0, lambda count: range(2, 12))
    setup = evaluate.Setup(state=state, ff_state=None, content=None, ablation=False, detect=None,
                           recognise=None, device="cpu")
    frames = next(frames for method, frames, _ in evaluate.methods(setup, 2, source, truth)
                  if method == report.BEFORE)
    G, psi, _ = learn_person(state, [source], content=None, epochs=0, device="cpu")
    users = np.stack(list(infer.render(G, psi, truth[1], 64)))
    assert np.array_equal(frames, users)
    # and after fine-tuning, on one photo
    monkeypatch.setattr(evaluate, "EPOCHS", 2)
    content, photo = evaluate.ContentLoss("l1", face=10.0), tuple(part[:1] for part in source)
    setup = setup._replace(content=content)
    frames = next(frames for method, frames, _ in evaluate.methods(setup, 1, source, truth)
                  if method == report.AFTER)
    G, psi, _ = learn_person(state, [photo], content, epochs=2, device="cpu")
    users = np.stack(list(infer.render(G, psi, truth[1], 64)))
    assert np.array_equal(frames, users)
    monkeypatch.setattr(infer, "fast_dtype", lambda device: torch.float32)
    other = np.stack(list(infer.render(G.float(), psi, truth[1], 64)))
    assert not np.array_equal(other, users)                         # the number format shows


# -------------------------------------------------------------------------------------- the command

def command(*args, cwd, epochs=2):
    """What `python evaluate.py ARGS` prints in a folder, in this process; fine-tuning is cut short."""
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
           "without L'_ADV", "random w'", "random psi'", "random e_NEW", "without L_MCH, random w'"]


@pytest.fixture(scope="module")
def ff_checkpoint(tmp_path_factory):
    cfg, E, G, D = networks(match=False)
    path = tmp_path_factory.mktemp("ff") / "ff.pt"
    save_checkpoint(path, "meta", cfg, E=E, G=G, V=D.V, w0=D.w0, b=D.b)
    return path


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, checkpoint, ff_checkpoint):
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
    # a number of the table, computed again from the scores
    told = re.search(r"^\| Ours-FT \(2\) \| n/a \| n/a \| ([\d.]+) ± ([\d.]+)", table, re.M)
    of = lambda method, video: [r for r in rows if (r["method"], r["video"]) == (method, video)]
    pick = lambda method, video: [float(r["ssim"]) for r in of(method, video)]
    means = [np.mean(pick("Ours-FT", video)) for video in ("head 1000", "head 1001")]
    assert float(told[1]) == pytest.approx(np.mean(means), abs=6e-4)
    assert float(told[2]) == pytest.approx(abs(means[0] - means[1]) / 2, abs=6e-4)
    width, height = Image.open(folder / "out/figure.png").size
    assert (width, height) == (40 + 128 * (2 + len(METHODS)), 30 + 128 * 2)
    # the switches change the result
    assert len({tuple(pick(method, "head 1000")) for method in METHODS[3:-1]}) == 6
    # the two checkpoints of this test are the same
    assert pick(METHODS[-1], "head 1000") == pick("random w'", "head 1000")


def test_a_stopped_evaluation_goes_on(evaluated, checkpoint, ff_checkpoint):
    folder, _ = evaluated
    before = (folder / "out/scores.csv").read_text()
    kept, lost = (folder / f"out/head {n}/scores.csv" for n in (1000, 1001))
    lost.unlink()
    stamp = kept.stat().st_mtime_ns
    flags = [*FLAGS, "--checkpoint", checkpoint, "--ff-checkpoint", ff_checkpoint, "--ablation"]
    command(*flags, cwd=folder)
    assert kept.stat().st_mtime_ns == stamp and (folder / "out/scores.csv").read_text() == before
    with pytest.raises(UserError, match="another --out"):
        command(*flags, "--seed", "1", cwd=folder)


def test_the_user_study_knows_its_fakes(evaluated):
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
    """Stands for a recognition network: the mean colours of 7 x 7 places, minus grey."""

    def forward(self, x):
        return torch.nn.functional.adaptive_avg_pool2d(x, 7).flatten(1)


def test_videos_with_times_and_people_of_the_training(tmp_path, checkpoint):
    """Two clips of drawn heads are held out; the training has two other heads, one of them in two clips."""
    heads = lambda i, frames: ToyHeads(9, 64).load(i, lambda count: frames)
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

    # the first part learns, the last is held out
    for frames in json.loads((tmp_path / "out/protocol.json").read_text())["videos"].values():
        assert max(frames["learn"]) / 10 + 1 <= min(frames["holdout"]) / 10

    # whom the frames show, computed again from the vectors
    vectors = {i: dict(np.load(tmp_path / f"out/head{i}/vectors.npz")) for i in (0, 1)}
    recognise = metrics.torchscript_recognition(str(tmp_path / "colours.ts"), "cpu")
    data, training = PreparedVideos(str(tmp_path / "train")), []
    for sequences in ((0, 1), (2,)):        # id2 and id3
        faces = [face for i in sequences for face in zip(*data.load(i, lambda count: [0, 2, 3, 5]))]
        mean = np.mean([recognise(*face) for face in faces], axis=0)
        training.append(mean / np.linalg.norm(mean))
    assert np.allclose(np.load(tmp_path / "out/training.npz")["vectors"], training)
    persons = [vectors[i]["T0 real frame"].mean(0) for i in (0, 1)]
    persons = [person / np.linalg.norm(person) for person in persons]
    rows = list(csv.DictReader(open(tmp_path / "out/scores.csv")))
    seen = set()
    for i in (0, 1):
        for method in ("copy of the source", "Ours-FT"):
            found = vectors[i][f"T1 {method}"]
            mine = [row for row in rows if (row["video"], row["method"]) == (f"head{i}", method)]
            nearer = [max(f @ t for t in training) > f @ persons[i] for f in found]
            assert [row["nearer_training"] for row in mine] == [str(int(v)) for v in nearer]
            ranks = [1 + (f @ persons[1 - i] > f @ persons[i]) for f in found]
            assert [row["rank"] for row in mine] == list(map(str, ranks))
            seen |= {(row["rank"], row["nearer_training"]) for row in mine}
    assert len(seen) > 1
    both = lambda name: np.concatenate([vectors[0][name], vectors[1][name]])
    real, copy = both("T0 real frame"), both("T1 copy of the source")
    assert f"| copy of the source (1) | n/a | {metrics.frechet(real, copy):.3f} |" in said

    # the people of the training are looked at once
    stamp = (tmp_path / "out/training.npz").stat().st_mtime_ns
    assert command(*flags, cwd=tmp_path) == said
    assert (tmp_path / "out/training.npz").stat().st_mtime_ns == stamp


def test_as_a_user_runs_it(tmp_path, checkpoint):
    """In a process of its own, with all of fine-tuning's epochs and every default but the size."""
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
    assert not (tmp_path / "runs").exists()     # all of this before anything is written
