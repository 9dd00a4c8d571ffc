"""evaluate.py: its metrics against known values, its protocol, and the command as a user runs it."""
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
import metrics
import protocol
import report
import timing
from conftest import PHOTO, ROOT, networks, succeed
from data import PreparedVideos
from faces import crop, face_box, read_photo, to_crop
from files import UserError, save_tensors
from finetune import learn_person
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
    return metrics.dlib_recognition()


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
    """A prepared folder of black frames at these times: name -> (file, seconds), or a number of frames without."""
    for name, times in videos.items():
        count = times if isinstance(times, int) else len(times[0])
        times = {} if isinstance(times, int) else {"file": times[0], "seconds": times[1]}
        prepare(folder / f"{name}.pt", np.zeros((count, 64, 64, 3), np.uint8),
                np.zeros((count, 68, 2), np.float32), **times)
    return PreparedVideos(str(folder))


# -------------------------------------------------------------------------------------------- the metrics

def test_equal_images_score_one(astronaut, recognise):
    frame, points = astronaut
    assert metrics.ssim(frame, frame) == pytest.approx(1)
    v = recognise(frame, points)
    assert v.shape == (128,) and v @ v == pytest.approx(1)


def test_ssim_is_that_of_its_paper(astronaut):
    """Its formula at one place: 11 x 11 Gaussian of 1.5 pixels, C1 = (0.01 * 255)^2, C2 = (0.03 * 255)^2."""
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
    assert 0 < right < 4                                            # found again, on a smaller copy
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
    """Four vectors whose mean and covariance (of n - 1) are exactly these."""
    corners = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]]) * (3 / 4) ** .5
    return (corners * deviations) @ turn.T + mean


def test_frechet_distance_of_two_known_gaussians():
    """Along the same axes it is |mean - mean'|^2 + sum (s - s')^2. Turned by 45 degrees it follows from
    the closed form of 2 x 2: tr (C C')^1/2 = (tr C C' + 2 (det C C')^1/2)^1/2."""
    a = gaussian((1, 2))
    assert np.allclose(np.cov(a.T), np.diag([1, 4]))
    assert metrics.frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet(a, gaussian((3, 5), mean=(3, 4))) == pytest.approx(25 + 4 + 9)
    turn = np.array([[1, -1], [1, 1]]) * .5 ** .5
    C, C_turned = np.diag([1, 4]), turn @ np.diag([9, 25]) @ turn.T
    root = (np.trace(C @ C_turned) + 2 * (4 * 9 * 25) ** .5) ** .5
    assert metrics.frechet(a, gaussian((3, 5), turn)) == pytest.approx(5 + 34 - 2 * root)
    assert metrics.frechet(a, gaussian((3, 0))) == pytest.approx(4 + 4)         # flat, as of few frames


def test_frechet_distance_is_torch_fidelitys():
    from torch_fidelity.metric_fid import fid_features_to_statistics
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(50, 6)), rng.normal(size=(70, 6)) @ rng.normal(size=(6, 6)) + 1
    expected = metrics.fid(*(fid_features_to_statistics(torch.tensor(x)) for x in (a, b)))
    assert metrics.frechet(a, b) == pytest.approx(expected, rel=1e-6)


def test_an_arcface_like_network_gets_an_aligned_face(astronaut, tmp_path):
    """A network that returns its input: the aligned face is the same however the head is turned."""
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


# --------------------------------------------------------------------------------------- whom they show

def at(*degrees):
    a = np.radians(degrees)
    return np.stack([np.cos(a), np.sin(a)], axis=1)                             # (n, 2), of norm 1


def test_rank_by_hand():
    people = at(0, 40, 90)
    assert metrics.rank(at(5, 25, 70), people, 0).tolist() == [1, 2, 3]
    assert metrics.rank(at(5, 25, 70), people, 1).tolist() == [2, 1, 2]
    assert metrics.mean_vector(at(10, 70)) == pytest.approx(at(40)[0])


def test_identity_by_hand():
    """Three videos of two people, on a circle. a's hold-out frames are at 0 and 20 degrees in one video,
    at 40 and 60 in the other: together the person at 30. b is at 90."""
    people = {"a1": "a", "b": "b", "a2": "a"}
    vectors = {"a1": {"T0 real frame": at(0, 20), "T1 Ours-FT": at(10, 70)},
               "b": {"T0 real frame": at(80, 100), "T1 Ours-FT": at(50, 95)},
               "a2": {"T0 real frame": at(40, 60), "T1 Ours-FT": at(0, 40)}}
    rows = {name: [{"video": name, "T": str(T), "method": method, "frame": str(k)}
                   for T, method in ((0, "real frame"), (1, "Ours-FT")) for k in (0, 1)] for name in people}
    report.add_identity(rows, vectors, people, training=at(55, 200))
    cosine = lambda *degrees: pytest.approx(np.cos(np.radians(degrees)))
    pick = lambda name, column: [row[column] for row in rows[name] if row["method"] == "Ours-FT"]
    assert pick("a1", "csim") == cosine(10, 50)
    assert pick("a1", "csim_stranger") == cosine(70, 30)            # b: the next video of somebody else
    assert pick("a2", "csim_stranger") == cosine(80, 60)            # round the end: a1 is the same person
    assert pick("b", "csim_stranger") == cosine(10, 35)
    assert pick("a1", "rank") == [1, 2]                             # 10 is nearest to 30, 70 to 90
    assert pick("b", "rank") == [2, 1]
    assert pick("a1", "nearer_training") == [0, 1]                  # 10: 20 from a, 45 off; 70: 40 from a, 15 off
    assert pick("b", "nearer_training") == [1, 0]
    assert [row["rank"] for row in rows["a1"][:2]] == [1, 1]


def test_the_table_counts_them():
    """Of four frames three are nearest to their person, and one is nearer to the training."""
    common = {"landmark_error": np.nan, "found": np.nan, "ssim": .5}
    row = lambda video, T, method, csim, stranger, rank, nearer: common | {
        "video": video, "T": T, "method": method, "csim": csim, "csim_stranger": stranger, "rank": rank,
        "nearer_training": nearer}
    rows = [row(video, 0.0, report.REAL, 1.0, .1, 1.0, 0.0) for video in "ab"]
    rows += [row(video, 1.0, report.COPY, .6, .1, 1.0, 0.0) for video in "ab"]
    rows += [row("a", 1.0, report.AFTER, .2, .1, 1.0, 0.0), row("a", 1.0, report.AFTER, .3, .1, 1.0, 1.0),
             row("b", 1.0, report.AFTER, .4, .5, 2.0, 0.0), row("b", 1.0, report.AFTER, .5, .1, 1.0, 0.0)]
    found = {"T0 real frame": {}, "T1 copy of the source": {}, "T1 Ours-FT": {"frechet": .25}}
    text, strangers, same = report.table(rows, found, judge="dlib", held_out=7, trained_on=True)
    assert (strangers, same) == (pytest.approx(.1), pytest.approx(.6))
    head, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines())
    ours = dict(zip(head, lines[2]))
    assert ours == {
        "method (T)": "Ours-FT (1)", "FID ↓": "n/a", "Fréchet (dlib) ↓": "0.250", "SSIM ↑": "0.500 ± 0.000",
        "CSIM (dlib, trained on) ↑": "0.350 ± 0.100", "of the way": "50 %", "right person": "75 %",
        "nearest of 7": "75 %", "nearer to training ↓": "25 %", "landmarks ↓": "n/a", "face found": "n/a"}
    plain, *_ = report.table([r | {"nearer_training": np.nan} for r in rows], found, judge="x.ts", held_out=7)
    assert "training" not in plain and "trained on" not in plain and "CSIM (x.ts) ↑" in plain


# ------------------------------------------------------------------------------------------- the protocol

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


def test_a_given_split_is_kept():
    data = Folder(**{"train/a": 9, "test/a": 40, "train/b": 9, "test/b": 31, "other": 99})
    assert protocol.find_videos(data) == {"a": (0, 1), "b": (2, 3)}
    drawn = protocol.draw_protocol(data, [8], 32, 50, 0)
    assert list(drawn) == ["a"] and max(drawn["a"]["learn"]) < 9 and len(drawn["a"]["holdout"]) == 32


def test_who_is_the_same_person():
    names = ["clips/id00061/abc", "id00061/def", "photos/Tom_Hanks", "photos/Halle_Berry"]
    who = [protocol.person(name) for name in names]
    assert who == ["id00061", "id00061", "photos/Tom_Hanks", "photos/Halle_Berry"]


# -------------------------------------------------------------------------------------------- the methods

def test_the_controls_are_frames_of_the_source():
    """With one source frame both are this one; with two, the nearer one by its landmarks is found."""
    frames = np.arange(2, dtype=np.uint8)[:, None, None, None] * np.ones((2, 64, 64, 3), np.uint8)
    points = np.zeros((2, 68, 2), np.float32)
    points[1] += 10
    truth = (frames, points[::-1] + 1)
    for T, nearest in ((1, [0, 0]), (2, [1, 0])):
        controls = evaluate.methods(None, T, (frames, points), truth)
        assert [next(controls)[1][:, 0, 0, 0].tolist() for _ in range(2)] == [[0, 0], nearest]


def test_what_is_scored_is_what_users_get(tmp_path, monkeypatch):
    """Frame by frame what infer.py renders: folded, in its number format (here bfloat16), with the clamp."""
    for module in (evaluate, infer):
        monkeypatch.setattr(module, "fast_dtype", lambda device: torch.bfloat16)
    cfg, E, G, D = networks(adain_clamp=.5)
    save_checkpoint(tmp_path / "clamp.pt", "meta", cfg, E=E, G=G, V=D.V, w0=D.w0, b=D.b)
    state = evaluate.load_checkpoint(tmp_path / "clamp.pt")
    data = ToyHeads(1)
    source, truth = data.load(0, lambda count: [0, 1]), data.load(0, lambda count: range(2, 12))
    setup = evaluate.Setup(state=state, ff_state=None, content=None, ablation=False, detect=None,
                           recognise=None, device="cpu")
    frames = next(frames for method, frames, _ in evaluate.methods(setup, 2, source, truth)
                  if method == report.BEFORE)
    x, y = map(evaluate.to_float, evaluate.to_tensors(*source))
    _, G, psi, _ = learn_person(state, x, y, content=None, epochs=0, device="cpu")
    users = np.stack(list(infer.render(G, psi, truth[1], 64)))
    assert np.array_equal(frames, users)
    monkeypatch.setattr(evaluate, "fast_dtype", lambda device: torch.float32)
    other = evaluate.draw(G.float(), psi, evaluate.to_float(evaluate.to_tensors(*truth)[1]))
    assert not np.array_equal(other, users)                         # the number format shows


# -------------------------------------------------------------------------------------------- the command

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


def test_timing_prints_table_2(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr(timing, "EPOCHS", 2)
    said = command("--toy", "--videos", "1", "--shots", "1", "--timing", "--checkpoint", checkpoint, cwd=tmp_path)
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
