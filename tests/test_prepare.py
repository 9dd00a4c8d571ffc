"""prepare.py and folders.py: preparing a folder of videos and photos, as `python data.py` does."""
import numpy as np
import pytest
import torch
from PIL import Image

import data
from conftest import PHOTO, fail, moving, script, succeed, write_clip
from media import folders, prepare


@pytest.fixture(scope="module")
def videos(tmp_path_factory, clip, face):
    """The layouts of VoxCeleb2 and VoxCeleb1, a person's photos, and files that are only reported."""
    root = tmp_path_factory.mktemp("videos")
    for name in ("id1/vid1", "vox1/name", "person", "dark", "empty", "broken"):
        (root / name).mkdir(parents=True)
    (root / "id1/vid1/00001.mp4").write_bytes(clip.read_bytes())
    write_clip(root / "id1/vid1/00002.mp4", moving(face, 4), np.arange(4) * 512)
    for k, frame in enumerate(moving(face, 6)):
        Image.fromarray(frame).save(root / f"vox1/name/{k:06}.jpg")
    Image.open(PHOTO).save(root / "person/a.jpg")
    Image.fromarray(face).save(root / "person/b.png")
    (root / "person/notes.txt").write_text("no picture")
    write_clip(root / "dark/none.mp4", [np.zeros((64, 64, 3), np.uint8)] * 4, np.arange(4) * 512)
    (root / "broken/a.mp4").write_bytes(b"not a video")
    (root / "loose.mp4").write_bytes(clip.read_bytes())
    return root


def test_preparing_a_folder(videos, tmp_path):
    arguments = ["data.py", "--videos", videos, "--out", "out", "--landmarks", "dlib",
                 "--image-size", "64", "--workers", "2"]
    said = succeed(*arguments, cwd=tmp_path)
    files = sorted(str(f.relative_to(tmp_path / "out")) for f in (tmp_path / "out").rglob("*") if f.is_file())
    assert files == ["id1/vid1.pt", "loose.mp4.pt", "person.pt", "vox1/name.pt"]
    for words in ("4 sequences", "broken/a.mp4", "dark/none.mp4", "empty: no videos", "0 were there already",
                  "person: skipped files that are neither videos nor photos: notes.txt"):
        assert words in said
    prepared = data.PreparedVideos(tmp_path / "out")
    counts = [len(torch.load(f, weights_only=True)["landmarks"]) for f in prepared.files]
    assert counts == [18 + 4, 18, 2, 6]         # all clips of a video in one sequence

    again = succeed(*arguments, cwd=tmp_path)
    assert "0 sequences with 0 frames prepared, 4 were there already" in again
    assert "--image-size 64" in fail(*arguments[:-4], "--image-size", "128", cwd=tmp_path)
    (tmp_path / "out/person.pt").unlink()
    again = succeed(*arguments, "--max-frames", "3", cwd=tmp_path)
    assert "1 sequences with 2 frames prepared, 3 were there" in again


def test_several_people_in_one_folder_and_photos_above_max_frames_are_told(tmp_path, face):
    """Photos or a clip of the astronaut show one person; together with the Mona Lisa they do not."""
    flat = tmp_path / "flat"
    (flat / "her").mkdir(parents=True)
    photos = {"a": Image.open(PHOTO), "b": Image.fromarray(face), "c": Image.open(PHOTO).resize((480, 480)),
              "x": Image.open(PHOTO.with_name("mona_lisa.jpg")).convert("RGB")}
    photos["y"] = photos["x"].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for name in "abc":
        photos[name].save(flat / f"her/{name}.png")
    for name in "abxy":
        photos[name].save(flat / f"{name}.png")
    write_clip(flat / "clip.mp4", moving(face, 4), np.arange(4) * 512)
    command = ["data.py", "--videos", "flat", "--landmarks", "dlib", "--image-size", "64", "--workers", "1"]
    said = succeed(*command, "--out", "out", cwd=tmp_path)
    line, = (line for line in said.splitlines() if "several people" in line)
    assert line.startswith("  flat: the files seem") and "give each person a folder" in line
    assert "left out" not in said
    said = succeed(*command, "--out", "few", "--max-frames", "2", cwd=tmp_path)
    assert "left out by --max-frames 2: 3 photos and clips of _photos, her\n" in said


def tree(root, *paths):
    """Make empty files and their folders below root."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def sequences(root, out=None):
    found, unused = folders.find_sequences(root, out)
    return {name: [f.name for f in files] for name, files in found.items()}, "\n".join(unused)


def test_hidden_and_system_folders_are_passed_over(tmp_path):
    tree(tmp_path, "ann/1.jpg", "ann/._1.jpg", "ann/.ipynb_checkpoints/1.jpg", "ann/@eaDir/S/1.jpg",
         ".Trash-1000/1.jpg", "__MACOSX/ann/1.jpg", "ann/.DS_Store", "$RECYCLE.BIN/1.jpg",
         "System Volume Information/1.jpg", "bob/2.HEIC", "bob/3.jfif", "bob/4.psd")
    found, unused = sequences(tmp_path)
    assert found == {"ann": ["1.jpg"], "bob": ["2.HEIC", "3.jfif"]}
    for name in (".ipynb_checkpoints", "@eaDir", ".Trash-1000", "__MACOSX", ".DS_Store", "._1.jpg",
                 "$RECYCLE.BIN", "System Volume", "4.psd"):
        assert name in unused, name


@pytest.mark.parametrize("link,target", [("ann/latest", ".."), ("ann/up", "../.."),
                                         ("ann/v/self", "."), ("again", "ann"),
                                         ("a", "ann"), ("ann/v/x", "../../bob")])
def test_links_give_nobody_twice(tmp_path, link, target):
    root = tree(tmp_path / "videos", "ann/1.jpg", "ann/v/2.jpg", "bob/3.jpg")
    tree(tmp_path, "elsewhere/9.jpg")
    (root / link).symlink_to(target)
    found, unused = sequences(root)
    assert found == {"ann": ["1.jpg"], "ann/v": ["2.jpg"], "bob": ["3.jpg"]}
    assert link in unused and "used already" in unused


def test_links_to_other_places_are_followed(tmp_path):
    root = tree(tmp_path / "videos", "ann/1.jpg")
    tree(tmp_path, "elsewhere/carl/9.jpg")
    (root / "more").symlink_to("../elsewhere")
    (root / "twice").symlink_to("../elsewhere/carl")
    (root / "ann/broken").symlink_to("nowhere")
    found, unused = sequences(root)
    assert found in ({"ann": ["1.jpg"], "more/carl": ["9.jpg"]},
                     {"ann": ["1.jpg"], "twice": ["9.jpg"]})
    assert "broken" in unused


def test_the_result_is_not_taken_for_videos(tmp_path):
    tree(tmp_path, "ann/1.jpg", "prepared/ann.pt")
    assert sequences(tmp_path, tmp_path / "prepared") == ({"ann": ["1.jpg"]}, "")


def test_max_frames_are_spread_evenly(clip, detect):
    few = list(folders.faces_in(clip, detect, 64, 3))
    every = list(folders.faces_in(clip, detect, 64))
    assert len(few) == 3 and len(every) == 18
    assert [shot.seconds for shot in few] == pytest.approx([0, 0.4, 0.94], abs=0.07)
    assert np.abs(few[-1].points - every[-1].points).max() < 1    # the last frame is one of them


@pytest.mark.parametrize("arguments,words", [
    (["--videos", "nowhere"], "no folder nowhere"), (["--videos", "."], "neither videos nor photos"),
    (["--workers", "-1"], "--workers"), (["--image-size", "0"], "--image-size 0")])


def test_wrong_folders(tmp_path, arguments, words):
    assert words in fail("data.py", *arguments, "--landmarks", "dlib", cwd=tmp_path)


def test_fan_without_a_network_says_where_to_put_its_weights(videos, tmp_path):
    result = script("data.py", "--videos", videos, "--out", "out", cwd=tmp_path, TORCH_HOME=str(tmp_path))
    line = result.stderr.splitlines()[-1]       # before it, torch hub may announce the download
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "--landmarks dlib" in line and "checkpoints" in line


def test_a_signal_while_a_worker_starts_is_obeyed_at_its_first_job(monkeypatch):
    """The pool prints a traceback of whatever the start of a worker raises."""
    def signalled(kind):
        raise SystemExit(129)
    monkeypatch.setattr(prepare, "_stopped", False)
    monkeypatch.setattr(prepare, "leave_on_signals", lambda *numbers: None)
    monkeypatch.setattr(prepare, "landmark_detector", signalled)
    monkeypatch.setattr(prepare, "_prepare", lambda *arguments: pytest.fail("a job was begun"))
    prepare._start_worker("dlib")
    with pytest.raises(SystemExit):
        prepare._job("files")
