"""protocol.py: which videos are evaluated, and which of their frames are learned from or held out."""
import numpy as np
import pytest

from beyond.toy import ToyHeads
from conftest import prepare
from data import PreparedVideos
from evaluation import protocol
from runtime.files import UserError


def timed(folder, **videos):
    """A prepared folder of videos with black frames.

    videos: {name: ("file" and "seconds" of the frames)}.
    """
    for name, (file, seconds) in videos.items():
        prepare(folder / f"{name}.pt", np.zeros((len(file), 64, 64, 3), np.uint8),
                np.zeros((len(file), 68, 2), np.float32), file, seconds)
    return PreparedVideos(str(folder))


class Folder:
    """Stands in for PreparedVideos: the names of sequences, and how many frames they have."""
    folder = "."

    def __init__(self, **counts):
        self.files, self.counts = [f"./{name}.pt" for name in counts], list(counts.values())

    def count(self, i):
        return self.counts[i]


def test_a_video_is_split_with_a_second_between_the_parts():
    seconds = np.arange(100) / 10                                   # ten frames a second
    first, last = protocol.split_in_time(seconds, 8, 32)
    assert (first.tolist(), last.tolist()) == (list(range(45)), list(range(54, 99 + 1)))
    assert seconds[last[0]] - seconds[first[-1]] == pytest.approx(1)
    first, last = protocol.split_in_time(seconds, 8, 80)            # the second part needs more than half
    assert (len(first), len(last)) == (11, 80) and last[-1] == 99
    first, last = protocol.split_in_time(seconds, 80, 8)
    assert (len(first), len(last)) == (80, 11)
    first, last = protocol.split_in_time(seconds, 60, 32)                   # 60 + 9 + 32 are 101
    assert (len(first), len(last)) == (0, 0)


def test_a_video_learns_from_its_first_part_and_holds_out_its_last(tmp_path):
    """The frames have an uneven rate and are of two clips. The time between the clips does not count."""
    file = [0] * 30 + [1] * 30
    seconds = [*np.cumsum(np.tile([.02, .06], 15)), *(500 + np.arange(30) * .04)]
    data = timed(tmp_path, video=(file, seconds))
    times = protocol.frame_times(data, 0)
    assert times[[0, 29, 30, 59]] == pytest.approx([0, 1.18, 1.18, 2.34])
    drawn = protocol.draw_protocol(data, [1, 8], 8, 50, seed=0)["video"]
    learn, held = drawn["learn"], drawn["holdout"]
    assert len(set(learn)) == len(set(held)) == 8 and held == sorted(held)
    assert times[min(held)] - times[max(learn)] >= protocol.GAP
    assert learn != sorted(learn)                                   # T = 1 may be any frame of the first part
    assert protocol.draw_protocol(data, [1, 8], 8, 50, seed=0)["video"] == drawn
    assert protocol.draw_protocol(data, [1, 8], 8, 50, seed=1)["video"] != drawn


def test_a_video_too_short_for_the_gap_is_left_out(tmp_path, capsys):
    times = lambda count: ([0] * count, np.arange(count) / 25)
    data = timed(tmp_path, long=times(60), brief=times(39))
    assert list(protocol.draw_protocol(data, [8], 8, 50, 0)) == ["long"]
    assert "left out brief: 8 frames" in capsys.readouterr().err       # 8 + 24 + 8 frames are 40


def test_photos_have_no_time(tmp_path, capsys):
    """They are divided at random."""
    photos = timed(tmp_path / "photos", person=(list(range(20)), [0.0] * 20))
    drawn = protocol.draw_protocol(photos, [8], 8, 50, 0)
    assert not capsys.readouterr().err
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
    assert said.count("is damaged") == 1 and "left out broken: 8 frames" in said


def test_a_given_split_is_kept():
    data = Folder(**{"train/a": 9, "test/a": 40, "train/b": 9, "test/b": 31, "other": 99})
    assert protocol.find_videos(data) == {"a": (0, 1), "b": (2, 3)}
    drawn = protocol.draw_protocol(data, [8], 32, 50, 0)
    assert list(drawn) == ["a"] and max(drawn["a"]["learn"]) < 9 and len(drawn["a"]["holdout"]) == 32


def test_who_is_the_same_person():
    names = ["clips/id00061/abc", "id00061/def", "photos/Tom_Hanks", "photos/Halle_Berry"]
    who = [protocol.person_of(name) for name in names]
    assert who == ["id00061", "id00061", "photos/Tom_Hanks", "photos/Halle_Berry"]
