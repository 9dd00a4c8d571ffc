"""puppeteer.py and its figures in metrics.py, against values computed by hand; and the command, small."""
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
from conftest import ROOT
from data import PreparedVideos
from evaluation import metrics, puppeteer, report
from finetune import content_loss, learn_person
from media.tracking import load_track
from runtime.files import UserError
from test_evaluate import Colours, command, prepare


@pytest.fixture(scope="module")
def bundled():
    return face3d.load_face3d()


def talking(bundled, lips, yaw, roll, scale=80):
    """The mean face with known openings of the lips and known angles (n,) -> (n, 68, 2)."""
    n, zero = len(lips), np.zeros(len(lips))
    pose = np.c_[yaw, zero, roll, np.full(n, np.log(scale)), np.full((n, 2), 128)]
    points = face3d.project(pose, np.tile(bundled.mean, (n, 1, 1)))
    missing = lips[:, None] - face3d.openings(points, pose)[:, face3d.LIPS]         # (n, 3)
    move = 0.5 * missing[..., None] * face3d.down(pose)[:, None]
    points[:, [61, 62, 63]] -= move
    points[:, [67, 66, 65]] += move
    return points


# ------------------------------------------------------------------------------------------ the figures

def test_whom_a_puppet_shows():
    """In the plane, by angles in degrees. The photo itself is no rival: only the hold-out frames are."""
    at = lambda *degrees: np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=1)
    vectors = at(0, 20, 50, 80)
    photo, others, driver = at(0)[0], at(30, 50), at(0, 10, 90, 90)
    people = at(40, 81)         # by their hold-out frames; we are the first
    figures = metrics.likeness(vectors, photo, others, driver, people, 0)
    cos = lambda degrees: np.cos(np.radians(degrees))
    csim = [(cos(30) + cos(50)) / 2, (cos(10) + cos(30)) / 2, (cos(20) + 1) / 2, (cos(50) + cos(30)) / 2]
    assert figures["csim"] == pytest.approx(np.mean(csim))
    assert figures["csim_photo"] == pytest.approx(np.mean([cos(0), cos(20), cos(50), cos(80)]))
    assert figures["csim_driver"] == pytest.approx(np.mean([cos(0), cos(10), cos(40), cos(10)]))
    assert figures["nearer_driver"] == 3 / 4                        # 1 > .75, .98 > .93, .77 < .97, .98 > .75
    assert figures["first"] == 3 / 4                                # all but the one at 80 degrees
    undriven = metrics.likeness(vectors, photo, others, None, people, 0)
    assert not {"csim_driver", "nearer_driver"} & set(undriven)


def test_how_movements_are_taken_over(bundled):
    """Half the driver's opening, the same yaw, the opposite roll; the second of five frames shows no face."""
    lips = np.array([.1, .3, .2, .05, .25])
    yaw, roll = np.linspace(-.2, .2, 5), np.array([0, .1, .05, -.1, 0])
    driver, result = talking(bundled, lips, yaw, roll), talking(bundled, lips / 2, yaw, -roll, scale=60)
    found = iter([result[0], None, *result[2:]])
    frames = np.zeros((5, 256, 256, 3), np.uint8)
    figures = metrics.movements(frames, result + (3, 4), driver, lambda frame: next(found), bundled)
    eyes = np.linalg.norm(result[[0, 2, 3, 4], 36] - result[[0, 2, 3, 4], 45], axis=1)
    assert figures["found"] == 4 / 5
    assert figures["landmark_error"] == pytest.approx(np.mean(100 * 5 / eyes))
    assert figures["mouth_r"] == pytest.approx(1, abs=.02)
    assert figures["mouth_ratio"] == pytest.approx(.5, abs=.02)
    assert (figures["yaw_r"], figures["roll_r"]) == (pytest.approx(1, abs=.01), pytest.approx(-1, abs=.01))

    nowhere = metrics.movements(frames, result, driver, lambda frame: None, bundled)
    assert nowhere == {"found": 0}
    still = metrics.movements(frames, result, driver[[0] * 5], lambda frame: result[0], bundled)
    assert np.isnan([still[name] for name in ("mouth_r", "mouth_ratio", "yaw_r", "roll_r")]).all()


def test_correlation():
    assert metrics.correlation(np.array([1., 2, 3]), np.array([2., 4, 3])) == pytest.approx(.5)
    assert np.isnan(metrics.correlation(np.array([1., 2]), np.array([2., 4])))
    assert np.isnan(metrics.correlation(np.array([1., 2, 3]), np.full(3, .1)))


def test_crossed_lips_and_changes(bundled):
    points = talking(bundled, np.array([.2, .01, -.01, .1]), np.zeros(4), np.array([0, 1, 2, 3.]))
    assert metrics.crossed(points, bundled) == 1 / 4                   # the head may lie on its side
    points[0, 66] = points[0, 62] - (0, 5)                          # the middle alone
    assert metrics.crossed(points, bundled) == 2 / 4
    frames = np.zeros((3, 2, 2, 3), np.uint8)
    frames[1], frames[2, 0] = 250, 10       # 250 everywhere; 240 in a half, 250 in the other
    assert metrics.change(frames) == pytest.approx((250 + 245) / 2)
    assert np.isnan(metrics.change(frames[:1]))


def someone(who, photo, *others):
    return puppeteer.Person(who, None, None, np.array(photo), np.array(others))


def test_anchors_and_a_driver_who_is_the_person(capsys):
    """Two videos of one person are no strangers to each other."""
    east, west, north = [1., 0], [-1., 0], [0., 1]
    people = {"a/1": someone("a", east, east, north), "a/2": someone("a", east, west),
              "b": someone("b", north, north)}
    strangers, same = puppeteer.anchors(people)
    assert strangers == pytest.approx(np.mean([0, 0, .5, 0]))       # a/1 - b, a/2 - b, b - a/1, b - a/2
    assert same == pytest.approx(np.mean([.5, -1, 1]))
    assert np.isnan(puppeteer.anchors({"b": people["b"]})[0])

    vectors = {"b.mp4": np.array([north, north]), "a.mp4": np.array([east, north]), "track.npz": None}
    drivers = [puppeteer.Driver(name, None, None, None, None, v, 1.) for name, v in vectors.items()]
    others = puppeteer.other_drivers(drivers, "b", people["b"], strangers=0, same=1)
    assert [driver.name for driver in others] == ["a.mp4", "track.npz"]     # at 0.5 and unknown; b.mp4 at 1
    assert capsys.readouterr().out.strip() == "b.mp4 is left out for b: it seems to be the same person"


def test_the_table_and_the_ranking():
    """Two people, two drivers; the figures of pairs are averaged by person first."""
    empty = dict.fromkeys(puppeteer.COLUMNS, "")
    rows = []
    for video, driver, csims in (("a", "x", (.1, .2, .3)), ("a", "y", (.3, .2, .4)),
                                 ("b", "x", (.4, .5, .1))):
        for motion, csim in zip(puppeteer.MOTIONS, csims):
            row = empty | {"video": video, "driver": driver, "motion": motion, "csim": csim, "first": .5}
            rows.append(report.as_numbers(row | {"csim_photo": csim + .1}))
    told = puppeteer.table(rows, 2, "judge", trained_on=False, strangers=0., same=.8)
    title, _, *lines = [re.split(r" *\| *", line)[1:-1] for line in told.splitlines()]
    cell = lambda motion, column: lines[puppeteer.MOTIONS.index(motion)][title.index(column)]
    assert cell("paper", "CSIM (judge) ↑") == "0.300 ± 0.100"       # .2 of a, .4 of b
    assert cell("paper", "of the way") == "38 %" and cell("relative", "of the way") == "28 %"
    assert [cell(motion, "better than paper") for motion in puppeteer.MOTIONS] == ["", "67 %", "67 %"]
    assert cell("absolute", "first of 2 ↑") == "50 %" and cell("absolute", "nearer to the driver ↓") == "n/a"

    best = puppeteer.best_drivers(rows)
    assert best == {"a": "y", "b": "x"}
    ranked = puppeteer.ranking(rows, best).splitlines()[2:]
    assert ranked == ["| y | 0.400 | 0.300 | 0.500 | 1 of 2 |", "| x | 0.350 | 0.450 | 0.300 | 1 of 2 |"]


# ------------------------------------------------------------------------------------------ the command

class Detector:
    """Follows the driver as dlib does; finds the same face on every result, but it moves."""

    kind = "dlib"

    def __init__(self, detect, bundled):
        self.sides, self.faces, self.landmarks, self.looks = detect.sides, detect.faces, detect.landmarks, 0
        self.points = talking(bundled, np.array([.1, .2, .3]), np.array([0, .1, .2]), np.array([.1, 0, .1]))

    def __call__(self, frame):
        self.looks += 1
        return self.points[self.looks % 3]


@pytest.fixture
def folder(tmp_path, clip, detect, bundled, monkeypatch):
    """Drawn heads stand for two people, the astronaut and a saved track drive them."""
    heads = ToyHeads(2, 64)
    for i in range(2):
        times = {"file": list(range(5)), "seconds": [0.] * 5}
        prepare(tmp_path / f"held/head{i}.pt", *heads.load(i, lambda count: range(5)), **times)
    (tmp_path / "drivers").mkdir()
    shutil.copy(clip, tmp_path / "drivers/clip.mp4")
    shutil.copy(ROOT / "assets/speech.npz", tmp_path / "drivers")
    torch.jit.save(torch.jit.script(Colours()), str(tmp_path / "colours.ts"))
    monkeypatch.setattr(evaluate, "landmark_detector", lambda kind: Detector(detect, bundled))
    for name, value in (("FRAMES", 3), ("SHOWN", 3), ("RUN", 4)):
        monkeypatch.setattr(puppeteer, name, value)
    return tmp_path


FLAGS = ["--data", "held", "--drivers", "drivers", "--shots", "1", "8", "--holdout", "3", "--recognition",
         "colours.ts", "--out", "out"]


def test_people_are_driven_as_infer_does_it(folder, checkpoint, bundled):
    said = command(*FLAGS, "--checkpoint", checkpoint, cwd=folder, epochs=1)
    rows = list(csv.DictReader(open(folder / "out/puppets.csv")))
    assert len(rows) == 2 * 2 * 3 and list(rows[0]) == puppeteer.COLUMNS
    assert (folder / "out/puppets.md").read_text().strip() in said and (folder / "out/puppets.png").exists()
    of_track = [row for row in rows if row["driver"] == "speech.npz"]
    assert not any(row["csim_driver"] or row["steadiness"] for row in of_track)     # it has no pictures
    assert all(row["csim_driver"] and row["steadiness"] for row in rows if row not in of_track)

    # one pair again, by the functions of infer.py
    drawn = evaluate.draw_protocol(PreparedVideos(str(folder / "held")), [1], 3, 50, 0)
    frames, points = PreparedVideos(str(folder / "held"), 64).load(1, lambda count: drawn["head1"]["learn"])
    state = evaluate.load_checkpoint(checkpoint)
    arguments = type("", (), {"content": None, "vgg19": None, "vggface": None})
    content = content_loss(arguments, state["config"])
    G, psi, _ = learn_person(state, [(frames, points)], content, epochs=1, device="cpu")
    track = load_track(str(folder / "drivers/speech.npz"))
    chosen = puppeteer.evenly(np.flatnonzero(track.found), 3)
    driving = adapt(track, describe([points[:1]], bundled), "relative", 64, bundled, 1.25)[chosen]
    results = list(infer.render(G, psi, driving, 64))
    assert np.array_equal(report.read_strip(folder / "out/head1/speech.npz relative.png"), results)
    recognise = metrics.torchscript_recognition(str(folder / "colours.ts"), "cpu")
    photo = recognise(frames[0], points[0])
    csim = np.mean([recognise(*pair) @ photo for pair in zip(results, driving)])
    row = next(row for row in of_track if (row["video"], row["motion"]) == ("head1", "relative"))
    assert float(row["csim_photo"]) == pytest.approx(csim, abs=1e-6)

    # a person that is done is kept
    kept, lost = (folder / f"out/head{i}/puppets.csv" for i in (0, 1))
    stamp = kept.stat().st_mtime_ns
    lost.unlink()
    before = (folder / "out/puppets.csv").read_text().splitlines()
    command(*FLAGS, "--checkpoint", checkpoint, cwd=folder, epochs=1)
    assert kept.stat().st_mtime_ns == stamp and lost.exists()
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
    assert not (folder / "out").exists()        # all of this before anything is written
