"""puppeteer.py and its metrics, compared with values that are computed by hand; and the command."""
import csv
import re
import shutil

import numpy as np
import pytest
import torch

import evaluate
import infer
from beyond import face3d
from beyond.adapt import adapt, describe
from beyond.toy import ToyHeads
from conftest import ROOT, prepare
from data import PreparedVideos
from evaluation import metrics, puppeteer, report
from finetune import content_loss, learn_person
from media.folders import Photo
from media.tracking import load_track
from runtime.files import UserError
from test_evaluate import Colours, command


def talking(model, lips, yaw, roll, scale=80):
    """Landmarks (n, 68, 2) of the mean face with known angles (n,) and openings of the lips (n,)."""
    n, zero = len(lips), np.zeros(len(lips))
    pose = np.c_[yaw, zero, roll, np.full(n, np.log(scale)), np.full((n, 2), 128)]
    points = face3d.project(pose, np.tile(model.mean, (n, 1, 1)))
    missing = lips[:, None] - face3d.openings(points, pose)[:, face3d.LIPS]         # (n, 3)
    move = 0.5 * missing[..., None] * face3d.down(pose)[:, None]
    points[:, [61, 62, 63]] -= move
    points[:, [67, 66, 65]] += move
    return points


# ------------------------------------------------------------------------------------------ the metrics

def test_whom_a_puppet_shows():
    """Vectors are given by angles in the plane. People are represented by their hold-out frames alone."""
    at = lambda *degrees: np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=1)
    vectors = at(0, 20, 50, 80)
    photo, others, driver = at(0)[0], at(30, 50), at(0, 10, 90, 90)
    people = at(40, 81)         # the means of their hold-out frames; the puppet is the first person
    figures = metrics.puppet_identity(vectors, photo, others, driver, people, 0)
    cos = lambda degrees: np.cos(np.radians(degrees))
    csim = [(cos(30) + cos(50)) / 2, (cos(10) + cos(30)) / 2, (cos(20) + 1) / 2, (cos(50) + cos(30)) / 2]
    assert figures["csim"] == pytest.approx(np.mean(csim))
    assert figures["csim_photo"] == pytest.approx(np.mean([cos(0), cos(20), cos(50), cos(80)]))
    assert figures["csim_driver"] == pytest.approx(np.mean([cos(0), cos(10), cos(40), cos(10)]))
    assert figures["nearer_driver"] == 3 / 4                        # 1 > .75, .98 > .93, .77 < .97, .98 > .75
    assert figures["nearest"] == 3 / 4                              # all but the one at 80 degrees
    without_frames = metrics.puppet_identity(vectors, photo, others, None, people, 0)
    assert not {"csim_driver", "nearer_driver"} & set(without_frames)


def test_how_results_follow_the_drivers_movements(model):
    """With half the opening, the same yaw and the opposite roll. The second of five frames shows no face."""
    lips = np.array([.1, .3, .2, .05, .25])
    yaw, roll = np.linspace(-.2, .2, 5), np.array([0, .1, .05, -.1, 0])
    driver, result = talking(model, lips, yaw, roll), talking(model, lips / 2, yaw, -roll, scale=60)
    found = iter([result[0], None, *result[2:]])
    frames = np.zeros((5, 256, 256, 3), np.uint8)
    figures = metrics.movements(frames, result + (3, 4), driver, lambda frame: next(found), model)
    eyes = np.linalg.norm(result[[0, 2, 3, 4], 36] - result[[0, 2, 3, 4], 45], axis=1)
    assert figures["found"] == 4 / 5
    assert figures["landmark_error"] == pytest.approx(np.mean(100 * 5 / eyes))
    assert figures["mouth_r"] == pytest.approx(1, abs=.02)
    assert figures["mouth_ratio"] == pytest.approx(.5, abs=.02)
    assert (figures["yaw_r"], figures["roll_r"]) == (pytest.approx(1, abs=.01), pytest.approx(-1, abs=.01))

    nowhere = metrics.movements(frames, result, driver, lambda frame: None, model)
    assert nowhere == {"found": 0}
    still = metrics.movements(frames, result, driver[[0] * 5], lambda frame: result[0], model)
    assert np.isnan([still[name] for name in ("mouth_r", "mouth_ratio", "yaw_r", "roll_r")]).all()


def test_correlation():
    assert metrics.correlation(np.array([1., 2, 3]), np.array([2., 4, 3])) == pytest.approx(.5)
    assert np.isnan(metrics.correlation(np.array([1., 2]), np.array([2., 4])))
    assert np.isnan(metrics.correlation(np.array([1., 2, 3]), np.full(3, .1)))


def test_crossed_lips_and_changes(model):
    points = talking(model, np.array([.2, .01, -.01, .1]), np.zeros(4), np.array([0, 1, 2, 3.]))
    assert metrics.crossed(points, model) == 1 / 4                   # also if the head lies on its side
    points[0, 66] = points[0, 62] - (0, 5)                          # the middle of the lips alone
    assert metrics.crossed(points, model) == 2 / 4
    frames = np.zeros((3, 2, 2, 3), np.uint8)
    frames[1], frames[2, 0] = 250, 10       # 250 everywhere; 240 in a half, 250 in the other
    assert metrics.change(frames) == pytest.approx((250 + 245) / 2)
    assert np.isnan(metrics.change(frames[:1]))


def person(name, photo, *others):
    return puppeteer.Person(name, None, None, np.array(photo), np.array(others))


def test_anchors_and_a_driver_who_is_the_same_person(capsys):
    """Two videos of one person do not count as strangers."""
    east, west, north = [1., 0], [-1., 0], [0., 1]
    people = {"a/1": person("a", east, east, north), "a/2": person("a", east, west),
              "b": person("b", north, north)}
    strangers, same = puppeteer.anchors(people)
    assert strangers == pytest.approx(np.mean([0, 0, .5, 0]))       # a/1 - b, a/2 - b, b - a/1, b - a/2
    assert same == pytest.approx(np.mean([.5, -1, 1]))
    assert np.isnan(puppeteer.anchors({"b": people["b"]})[0])

    vectors = {"b.mp4": np.array([north, north]), "a.mp4": np.array([east, north]), "track.npz": None}
    drivers = [puppeteer.Driver(name, None, None, None, None, v, 1.) for name, v in vectors.items()]
    others = puppeteer.other_drivers(drivers, "b", people["b"], strangers=0, same=1)
    # their scores are 50 and NaN, that of b.mp4 is 100
    assert [driver.name for driver in others] == ["a.mp4", "track.npz"]
    assert capsys.readouterr().out.strip() == "b.mp4 is left out for b: it seems to be the same person"


def test_the_table_and_the_ranking():
    """With two people and two drivers. Rows are averaged over each person first."""
    empty = dict.fromkeys(puppeteer.COLUMNS, "")
    rows = []
    for video, driver, csims in (("a", "x", (.1, .2, .3)), ("a", "y", (.3, .2, .4)),
                                 ("b", "x", (.4, .5, .1))):
        for motion, csim in zip(puppeteer.MOTIONS, csims):
            row = empty | {"video": video, "driver": driver, "motion": motion, "csim": csim, "nearest": .5}
            rows.append(report.as_numbers(row | {"csim_photo": csim + .1}))
    text = puppeteer.table(rows, 2, "judge", trained_on=False, strangers=0., same=.8)
    title, _, *lines = [re.split(r" *\| *", line)[1:-1] for line in text.splitlines()]
    cell = lambda motion, column: lines[puppeteer.MOTIONS.index(motion)][title.index(column)]
    assert cell("paper", "CSIM (judge) ↑") == "0.300 ± 0.100"       # the mean of .2 for a and .4 for b
    assert cell("paper", "identity score ↑") == "38" and cell("relative", "identity score ↑") == "28"
    assert [cell(motion, "better than paper") for motion in puppeteer.MOTIONS] == ["", "67 %", "67 %"]
    assert cell("absolute", "nearest of 2 ↑") == "50 %"
    assert cell("absolute", "nearer to the driver ↓") == "n/a"

    best = puppeteer.best_drivers(rows)
    assert best == {"a": "y", "b": "x"}
    ranked = puppeteer.ranking(rows, best).splitlines()[4:]
    assert ranked == ["| y | 0.400 | 0.300 | 0.500 | 1 of 2 |", "| x | 0.350 | 0.450 | 0.300 | 1 of 2 |"]


# ------------------------------------------------------------------------------------------ the command

class Detector:
    """Follows the driver with dlib. On generated frames it returns one of three faces by turns."""

    kind = "dlib"

    def __init__(self, detect, model):
        self.sides, self.faces, self.begin = detect.sides, detect.faces, detect.begin
        self.landmarks, self.calls = detect.landmarks, 0
        self.points = talking(model, np.array([.1, .2, .3]), np.array([0, .1, .2]), np.array([.1, 0, .1]))

    def __call__(self, frame):
        self.calls += 1
        return self.points[self.calls % 3]


@pytest.fixture
def folder(tmp_path, clip, detect, model, monkeypatch):
    """A folder in which two drawn heads are driven by a clip of the astronaut and by a saved track."""
    heads = ToyHeads(2, 64)
    for i in range(2):
        prepare(tmp_path / f"held/head{i}.pt", *heads.load(i, range(5)))
    (tmp_path / "drivers").mkdir()
    shutil.copy(clip, tmp_path / "drivers/clip.mp4")
    shutil.copy(ROOT / "assets/speech.npz", tmp_path / "drivers")
    torch.jit.save(torch.jit.script(Colours()), str(tmp_path / "colours.ts"))
    monkeypatch.setattr(evaluate, "landmark_detector", lambda kind: Detector(detect, model))
    for name, value in (("FRAMES", 3), ("SHOWN", 3), ("RUN", 4)):
        monkeypatch.setattr(puppeteer, name, value)
    return tmp_path


FLAGS = ["--data", "held", "--drivers", "drivers", "--shots", "1", "8", "--holdout", "3", "--recognition",
         "colours.ts", "--out", "out"]


def test_people_are_driven_as_by_infer(folder, checkpoint, model):
    said = command(*FLAGS, "--checkpoint", checkpoint, cwd=folder, epochs=1)
    rows = list(csv.DictReader(open(folder / "out/puppets.csv")))
    assert len(rows) == 2 * 2 * 3 and list(rows[0]) == puppeteer.COLUMNS
    assert (folder / "out/puppets.md").read_text().strip() in said and (folder / "out/puppets.png").exists()
    of_track = [row for row in rows if row["driver"] == "speech.npz"]
    assert not any(row["csim_driver"] or row["frame_changes"] for row in of_track)     # it has no frames
    assert all(row["csim_driver"] and row["frame_changes"] for row in rows if row not in of_track)

    # one pair of a person and a driver is computed again with the functions of infer.py
    drawn = evaluate.draw_protocol(PreparedVideos(str(folder / "held")), [1], 3, 50, 0)
    frames, points = PreparedVideos(str(folder / "held"), 64).load(1, drawn["head1"]["learn"])
    state = evaluate.load_checkpoint(checkpoint)
    arguments = type("", (), {"content": None, "vgg19": None, "vggface": None})
    content = content_loss(arguments, state["config"])
    G, psi, _ = learn_person(state, [Photo(frames, points)], content, epochs=1, device="cpu")
    track = load_track(str(folder / "drivers/speech.npz"))
    chosen = puppeteer.evenly(np.flatnonzero(track.found), 3)
    driving = adapt(track, describe([points[:1]], model), "relative", 64, model, 1.25)[chosen]
    results = list(infer.render(G, psi, driving, 64))
    assert np.array_equal(report.read_strip(folder / "out/head1/speech.npz relative.png"), results)
    recognise = metrics.torchscript_recognition(str(folder / "colours.ts"), "cpu")
    photo = recognise(frames[0], points[0])
    csim = np.mean([recognise(*pair) @ photo for pair in zip(results, driving)])
    row = next(row for row in of_track if (row["video"], row["motion"]) == ("head1", "relative"))
    assert float(row["csim_photo"]) == pytest.approx(csim, abs=1e-6)

    # a person who is finished is not computed again
    finished, missing = (folder / f"out/head{i}/puppets.csv" for i in (0, 1))
    stamp = finished.stat().st_mtime_ns
    missing.unlink()
    before = (folder / "out/puppets.csv").read_text().splitlines()
    command(*FLAGS, "--checkpoint", checkpoint, cwd=folder, epochs=1)
    assert finished.stat().st_mtime_ns == stamp and missing.exists()
    assert len((folder / "out/puppets.csv").read_text().splitlines()) == len(before)
    (folder / "drivers/speech.npz").unlink()
    with pytest.raises(UserError, match="another --out"):
        command(*FLAGS, "--checkpoint", checkpoint, cwd=folder)


def test_what_a_user_can_get_wrong(folder, checkpoint):
    def refused(*args):
        with pytest.raises(UserError) as caught:
            command(*args, "--checkpoint", checkpoint, cwd=folder)
        return str(caught.value)

    assert "leave out --toy" in refused("--toy", "--drivers", "drivers")
    assert "leave out" in refused(*FLAGS, "--ablation")
    assert "no videos or saved tracks" in refused("--data", "held", "--drivers", "nowhere")
    assert "no videos or saved tracks" in refused("--data", "held", "--drivers", "held")
    (folder / "drivers/junk.npz").write_bytes(b"junk")
    assert "junk.npz is not a landmark track" in refused(*FLAGS)
    assert not (folder / "out").exists()        # all errors come before anything is written
