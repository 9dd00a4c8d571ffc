"""data.py: landmark images, prepared folders, episodes."""
import gc
import multiprocessing
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from beyond.augment import recolour_and_mirror, warp
from beyond.toy import ToyHeads
from conftest import PHOTO, here, moving, prepare, write_clip
from media import crops, faces, folders, photos
from media.decode import read_video
from media.lines import draw_lines
from runtime.files import UserError


def test_landmark_groups_and_colours():
    """Every group is drawn in its colour. Eyes and lips are closed lines, the others are open."""
    groups = {"jaw": (range(0, 17), (255, 255, 255), False),
              "right brow": (range(17, 22), (255, 0, 0), False),
              "left brow": (range(22, 27), (0, 255, 0), False),
              "bridge": (range(27, 31), (0, 0, 255), False),
              "base": (range(31, 36), (0, 0, 255), False),
              "right eye": (range(36, 42), (255, 0, 255), True),
              "left eye": (range(42, 48), (0, 255, 255), True),
              "outer lips": (range(48, 60), (255, 255, 0), True),
              "inner lips": (range(60, 68), (255, 128, 0), True)}
    for name, (members, colour, closed) in groups.items():
        points = np.full((68, 2), -1000.0)              # the other groups are far outside the picture
        angle = np.linspace(0, 4.5, len(members))       # three quarters of a circle
        points[members] = 128 + 80 * np.stack([np.cos(angle), np.sin(angle)], 1)
        y = data.draw_landmarks(points, 256)
        drawn = y.reshape(-1, 3)
        assert {tuple(c) for c in drawn[(drawn == colour).all(-1)]} == {colour}, name
        assert (drawn[:, np.array(colour) == 0] == 0).all(), name       # no other colour, but darker edges
        for k in members:
            x, row = points[k].round().astype(int)
            assert (y[row - 1:row + 2, x - 1:x + 2] == colour).all(-1).any(), name
        x, row = points[[members[0], members[-1]]].mean(0).round().astype(int)    # between its ends
        assert (y[row - 2:row + 3, x - 2:x + 3] == colour).all(-1).any() == closed, name


@pytest.mark.parametrize("size,rows", [(64, 0.5), (128, 1), (256, 2), (512, 4)])
def test_lines_grow_with_the_image(size, rows):
    points = np.full((68, 2), -1000.0)
    points[17:22] = np.stack([np.linspace(.25, .75, 5) * size, np.full(5, size / 2)], 1)
    column = data.draw_landmarks(points, size)[:, size // 2, 0].astype(float)
    assert column.sum() / 255 == pytest.approx(0.925 * rows, abs=0.01)


def test_a_pixel_gets_the_share_that_the_line_covers():
    """A line 2 wide at a height of 10.25 covers 9.25 to 11.25, and pixel 9 is from 8.5 to 9.5."""
    image = np.zeros((20, 20, 3), np.float32)
    draw = lambda points, colour: draw_lines(image, [(np.array(points), False, colour)], 2)
    draw([(2, 10.25), (8, 10.25), (30, 10.25)], (100, 0, 200))
    assert image[8:13, 10, 0] == pytest.approx([0, 25, 100, 75, 0]) and (image[..., 1] == 0).all()
    assert (image[:, 4:] == image[:, 4:5]).all() and image[10, 0].sum() == 0      # beyond the border, too
    draw([(10, -50), (10, 50)], (0, 100, 0))                                      # over the first one
    assert image[:, 10].tolist() == [[0, 100, 0]] * 20
    before = image.copy()
    draw([(-30, -30), (-30, 60), (200, 90)], (9, 9, 9))
    assert np.array_equal(image, before)            # it lies outside


def test_a_drawing_follows_movements_of_a_fiftieth_of_a_pixel():
    """PIL's lines end at whole pixels: such a movement makes them jump, or does not move them at all."""
    points = ToyHeads(1, 256).load(0, [0])[1][0]
    drawings = [data.draw_landmarks(points + move, 256).astype(float) for move in (0, 0.02, 0.2)]
    small, large = (np.abs(drawing - drawings[0]).mean() for drawing in drawings[1:])
    assert small == pytest.approx(large / 10, rel=0.25)


def test_mirrored_and_warped_landmarks_stay_on_the_face(detect):
    """The detector finds the same landmarks again, and the right eye is still drawn as the right one."""
    image = photos.read_photo(PHOTO)
    points = detect(image)
    box = crops.face_box(points)
    frame, points = crops.crop(image, box, 256), crops.to_crop(points, box, 256)
    eyes = np.linalg.norm(points[36] - points[45])
    for seed in range(6):
        rng = np.random.default_rng(seed)
        frames, moved = warp(rng, frame[None], points[None])
        frames, moved = recolour_and_mirror(rng, frames, moved)
        again = detect(np.ascontiguousarray(frames[0]))
        assert np.linalg.norm(again - moved[0], axis=1).mean() < 0.05 * eyes
        assert moved[0, 36, 0] < moved[0, 45, 0] and not np.array_equal(frames[0], frame)
    assert sorted(faces.MIRRORED) == list(range(68))
    assert (faces.MIRRORED[faces.MIRRORED] == np.arange(68)).all()


def test_how_often_a_sequence_is_drawn():
    """All sequences are equally likely. A still needs one frame, and an episode needs two."""
    class Videos(ToyHeads):
        def usable(self, i):
            return np.arange((0, 1, 2, 7)[i])

        def load(self, i, ts):
            assert max(ts) < (0, 1, 2, 7)[i]
            return np.zeros((2, 64, 64, 3), np.uint8), np.zeros((2, 68, 2))

    def share(stills):
        episodes = data.Episodes(Videos(4), 1, 1, stills=stills)
        return np.bincount([episodes[n][0] for n in range(400)], minlength=4) / 400
    assert share(0.0) == pytest.approx([0, 0, 1 / 2, 1 / 2], abs=.08)
    assert share(1.0) == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3], abs=.08)
    assert len(set(data.draw_frames(np.random.default_rng(0), np.arange(9), 3, still=True))) == 1
    with pytest.raises(UserError, match="two frames that training can use"):
        data.Episodes(Videos(2), 1, 1)


def test_a_photo_and_the_same_frame_as_video_give_the_same_crop(tmp_path, face, detect):
    frame = face[:200, :240]
    Image.fromarray(frame).save(tmp_path / "a.png")
    write_clip(tmp_path / "a.mp4", [frame] * 5, np.arange(5) * 512, sound=False)
    shot, = folders.faces_in(tmp_path / "a.png", detect, 128)
    frames = list(folders.faces_in(tmp_path / "a.mp4", detect, 128))
    assert len(frames) == 5
    for frame in frames:
        assert np.abs(frame.image.astype(int) - shot.image).mean() < 4
        assert np.abs(frame.points - shot.points).max() < 2


def test_prepared_frames_and_landmarks_belong_together(tmp_path):
    toy = ToyHeads(1, 128)
    pairs = [toy.draw(0, t) for t in range(3)]
    prepare(tmp_path / "a.pt", *map(np.stack, zip(*pairs)), made_up=[0.0, 0.101, 0.1])
    with warnings.catch_warnings(action="error"):
        videos = data.PreparedVideos(tmp_path)
    assert videos.count(0) == 3 and videos.usable(0).tolist() == [0, 2]     # at most a tenth is made up
    maps = Path("/proc/self/maps")      # Linux allows 65,530 of them, and VoxCeleb2 has 145,112 sequences
    assert not maps.exists() or str(tmp_path) not in maps.read_text()
    frames, points = videos.load(0, [2, 0])
    assert np.abs(frames[0].astype(int) - pairs[2][0]).mean() < 6
    assert points[1] == pytest.approx(pairs[0][1], abs=1e-4)
    small, half = data.PreparedVideos(tmp_path, 64).load(0, [2, 0])
    assert small.shape == (2, 64, 64, 3) and half == pytest.approx((points + .5) / 2 - .5, abs=1e-4)
    with pytest.raises(UserError, match="--image-size 256"):
        data.PreparedVideos(tmp_path, 256)


def test_sequences_that_were_prepared_differently_are_told(tmp_path):
    """Every sequence is checked, because folders may have been copied together."""
    sequence = {"jpeg": torch.zeros(1), "offsets": torch.zeros(1), "landmarks": torch.zeros(0, 68, 2),
                "made_up": torch.zeros(0), "seconds": torch.zeros(0), "file": torch.zeros(0),
                "detector": "dlib"}
    (tmp_path / "0.pt").write_text("a damaged file first")
    for name, difference in (("1.pt", {"image_size": 128}), ("2.pt", {"image_size": 64}),
                             ("3.pt", {"image_size": 128, "detector": "fan"})):
        torch.save(sequence | difference, tmp_path / name)
    with pytest.raises(UserError, match="3.pt was prepared with fan landmarks, but .*1.pt with dlib"):
        data.PreparedVideos(tmp_path)
    (tmp_path / "3.pt").unlink()
    assert data.PreparedVideos(tmp_path).image_size == 64
    with pytest.raises(UserError, match="2.pt was prepared at 64 pixels"):
        data.PreparedVideos(tmp_path, 128)


def test_the_target_is_never_among_the_K():
    rng = np.random.default_rng(0)
    for count in (2, 3, 9, 50):
        for _ in range(200):
            t, *s = data.draw_frames(rng, np.arange(count), 8)
            assert len(s) == 8 and t not in s and max(s + [t]) < count
            # without repetition where possible
            assert len(set(s)) == min(8, count - 1) or count < 9
    assert {data.draw_frames(rng, np.arange(9), 8)[0] for _ in range(200)} == set(range(9))
    assert {t for _ in range(99) for t in data.draw_frames(rng, np.array([1, 5, 6]), 2)} == {1, 5, 6}


def test_episodes_are_a_pure_function_and_ranks_share_no_row():
    toy = ToyHeads(7, 64)
    a, b = data.Episodes(toy, 2, 4, seed=3), data.Episodes(toy, 2, 4, seed=3)
    assert all(torch.equal(p, q) for p, q in zip(a[9][1:], b[9][1:])) and a[9][0] == b[9][0]
    assert not torch.equal(a[9][1], data.Episodes(toy, 2, 4, seed=4)[9][1])
    assert a[0][1].shape == a[0][2].shape == (3, 3, 64, 64) and a[0][1].dtype == torch.uint8
    ranks = [data.Episodes(toy, 2, 4, seed=3, rank=r, world=2) for r in range(2)]
    assert [r.rows for r in ranks] == [4, 3]
    seen = [{e[n][0] * 2 + e.rank for n in range(60)} for e in ranks]
    assert seen == [{0, 2, 4, 6}, {1, 3, 5}]


def test_a_forked_process_does_not_hang_on_a_decoder(tmp_path, face):
    """A decoder in a reference cycle is freed at any time, in a loader's worker too. See conftest.py."""
    write_clip(tmp_path / "a.mp4", moving(face, 3), np.arange(3) * 512, sound=False)
    frames = read_video(tmp_path / "a.mp4")
    next(frames)        # this starts the threads of the decoder
    frames = [frames]
    frames.append(frames)
    del frames
    child = multiprocessing.get_context("fork").Process(target=gc.collect)
    child.start()
    child.join(30)
    ended = child.exitcode == 0
    child.kill()
    assert ended


def test_loader_workers_do_not_change_the_data():
    episodes = data.Episodes(ToyHeads(5, 64), 2, 2)
    loaders = [torch.utils.data.DataLoader(episodes, 2, sampler=range(4, 12), num_workers=n) for n in (0, 2)]
    for one, two in zip(*loaders):
        assert all(torch.equal(p, q) for p, q in zip(one, two))


def test_toy_heads_have_faces_where_their_landmarks_say(detect):
    toy, found = ToyHeads(12, 256), []
    for i in range(12):
        frame, points = toy.draw(i, 0)
        q = detect(frame)
        if q is not None:
            found.append(np.linalg.norm(q - points, axis=1).mean() / np.linalg.norm(points[36] - points[45]))
    assert len(found) >= 8 and np.median(found) < 0.15
    assert not np.array_equal(toy.draw(0, 0)[0], toy.draw(0, 1)[0])
    assert not np.array_equal(toy.draw(0, 0)[0], toy.draw(1, 0)[0])


def test_float_and_back():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    f = data.to_float(images)
    assert f.min() == -1 and f.max() == 1
    assert (data.to_uint8(f)[0].transpose(2, 0, 1) == images[0].numpy()).all()


def test_every_script_has_help(tmp_path):
    scripts = "data.py", "meta_train.py", "finetune.py", "infer.py", "evaluate.py"
    for name in (*scripts, "beyond.face3d", "beyond.teach"):
        result = here(name, "--help", cwd=tmp_path)
        assert result.returncode == 0 and name in result.stdout
