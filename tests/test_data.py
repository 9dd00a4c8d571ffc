"""data.py: landmark images, crops, photos and videos, prepared folders, episodes."""
import io
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

import data
import gather
import faces
import media
import video
from toy import ToyHeads
from conftest import PHOTO, fail, moving, script, succeed, write_clip
from files import UserError
from config import Config


def test_landmark_groups_and_colours():
    """Every group in its colour; eyes and lips closed, the rest open."""
    groups = {"jaw": (range(0, 17), (255, 255, 255), False), "right brow": (range(17, 22), (255, 0, 0), False),
              "left brow": (range(22, 27), (0, 255, 0), False), "bridge": (range(27, 31), (0, 0, 255), False),
              "base": (range(31, 36), (0, 0, 255), False), "right eye": (range(36, 42), (255, 0, 255), True),
              "left eye": (range(42, 48), (0, 255, 255), True), "outer lips": (range(48, 60), (255, 255, 0), True),
              "inner lips": (range(60, 68), (255, 128, 0), True)}
    for name, (members, colour, closed) in groups.items():
        points = np.full((68, 2), -1000.0)                                      # the others far outside the picture
        angle = np.linspace(0, 4.5, len(members))                               # three quarters of a circle
        points[members] = 128 + 80 * np.stack([np.cos(angle), np.sin(angle)], 1)
        y = data.draw_landmarks(points, 256)
        assert {tuple(c) for c in y.reshape(-1, 3)} == {(0, 0, 0), colour}, name
        for k in members:
            x, row = points[k].round().astype(int)
            assert (y[row - 1:row + 2, x - 1:x + 2] == colour).all(-1).any(), name
        middle = points[[members[0], members[-1]]].mean(0).round().astype(int)
        assert (y[middle[1] - 2:middle[1] + 3, middle[0] - 2:middle[0] + 3] == colour).all(-1).any() == closed, name


@pytest.mark.parametrize("size,rows", [(64, 1), (128, 1), (256, 2), (512, 4)])
def test_lines_grow_with_the_image(size, rows):
    points = np.full((68, 2), -1000.0)
    points[17:22] = np.stack([np.linspace(.25, .75, 5) * size, np.full(5, size / 2)], 1)
    assert data.draw_landmarks(points, size)[:, size // 2, 0].astype(float).sum() / 255 == pytest.approx(rows, abs=1.1)


def test_crop_follows_its_definition(face):
    points = np.zeros((68, 2), np.float32)
    points[36:42], points[42:48], points[[48, 54]] = (100, 90), (140, 90), (120, 130)
    assert faces.face_box(points) == pytest.approx([120, 110, max(2 * 40, 1.8 * 40)])
    box = np.array([120.0, 100.0, 50.0])
    assert faces.to_crop(np.array([[120.0, 100.0], [70.0, 50.0]]), box, 100) == pytest.approx(np.array([[49.5, 49.5], [-.5, -.5]]))


def test_a_crop_stays_in_the_picture_where_it_fits():
    image = np.zeros((100, 200, 3), np.uint8)
    edges = lambda box: (box[0] + .5 - box[2], box[0] + .5 + box[2], box[1] + .5 - box[2], box[1] + .5 + box[2])
    assert edges(faces.inside(np.array([100.0, 50.0, 30.0]), image)) == pytest.approx((70.5, 130.5, 20.5, 80.5))     # as it was
    assert edges(faces.inside(np.array([10.0, 90.0, 30.0]), image)) == pytest.approx((0, 60, 40, 100))               # moved
    assert edges(faces.inside(np.array([10.0, 90.0, 70.0]), image)) == pytest.approx((0, 140, -20, 120))             # too high: in the middle


def test_mirrored_and_warped_landmarks_stay_on_the_face(detect):
    """The detector, asked again, agrees; and the person's right eye is still drawn as the right one."""
    image = media.read_photo(PHOTO)
    points = detect(image)
    box = faces.face_box(points)
    frame, points = faces.crop(image, box, 256), faces.to_crop(points, box, 256)
    eyes = np.linalg.norm(points[36] - points[45])
    for seed in range(6):
        rng = np.random.default_rng(seed)
        frames, moved = data.warp(rng, frame[None], points[None])
        frames, moved = data.recolour_and_mirror(rng, frames, moved)
        again = detect(np.ascontiguousarray(frames[0]))
        assert np.linalg.norm(again - moved[0], axis=1).mean() < 0.05 * eyes
        assert moved[0, 36, 0] < moved[0, 45, 0] and not np.array_equal(frames[0], frame)
    assert sorted(data.MIRRORED) == list(range(68)) and (data.MIRRORED[data.MIRRORED] == np.arange(68)).all()


def test_how_often_a_sequence_is_drawn():
    class Videos(ToyHeads):
        def count(self, i):
            return (1, 2, 7)[i]

        def load(self, i, choose):
            return super().load(i, lambda count: [t % 7 for t in choose(7)])
    share = lambda **flags: np.bincount([episodes[n][0] for n in range(400)], minlength=3) / 400 \
        if (episodes := data.Episodes(Videos(3), 1, 1, config=Config(image_size=64, **flags))) else None
    assert share() == pytest.approx([1 / 3] * 3, abs=.08)
    assert share(by_frames=True) == pytest.approx([.1, .2, .7], abs=.08)
    assert share(by_frames=True, stills=1.0) == pytest.approx([1 / 3] * 3, abs=.08)
    assert data.draw_frames(np.random.default_rng(0), 9, 3, still=True) == [7] * 4


def test_points_stay_on_the_same_pixels_in_the_crop():
    image = np.zeros((120, 160, 3), np.uint8)
    image[61:64, 81:84] = 255                                                   # a dot around (82, 62)
    box = np.array([90.3, 55.7, 40.2])
    x, y = faces.to_crop(np.array([[82.0, 62.0]]), box, 256)[0]
    bright = np.argwhere(faces.crop(image, box, 256)[..., 0] > 128).mean(0)
    assert (y, x) == pytest.approx(tuple(bright), abs=0.6)


def test_crop_beyond_the_border_is_reflected():
    image = np.arange(100, dtype=np.uint8)[None, :, None].repeat(100, 0).repeat(3, 2) * 2
    out = faces.crop(image, np.array([0.0, 50.0, 20.0]), 40)[20, :, 0].astype(int)
    assert abs(out[:19][::-1] - out[20:39]).max() <= 3                           # a mirror, not a streak
    assert faces.crop(image[:1, :1], np.array([0.0, 0.0, 30.0]), 64).shape == (64, 64, 3)


def test_a_photo_and_the_same_frame_as_video_give_the_same_crop(tmp_path, face, detect):
    frame = face[:200, :240]
    Image.fromarray(frame).save(tmp_path / "a.png")
    write_clip(tmp_path / "a.mp4", [frame] * 5, np.arange(5) * 512, sound=False)
    (photo, points), = gather.faces_in(tmp_path / "a.png", detect, "dlib", 128)
    frames = list(gather.faces_in(tmp_path / "a.mp4", detect, "dlib", 128))
    assert len(frames) == 5
    for picture, p in frames:
        assert np.abs(picture.astype(int) - photo).mean() < 4 and np.abs(p - points).max() < 2


def test_boxes_of_a_video_are_steady():
    rng = np.random.default_rng(0)
    face = np.zeros((68, 2))
    face[36:42], face[42:48], face[[48, 54]] = (100, 90), (140, 90), (120, 130)
    points = face + rng.normal(0, 3, (100, 1, 2)) + np.linspace(0, 50, 100)[:, None, None]  # jitter on a slow walk
    boxes = faces.steady_boxes(points, np.arange(100) / 25)
    assert np.abs(np.diff(boxes[:, 0])).max() < 1.0 < np.abs(np.diff(faces.face_box(points)[:, 0])).max()
    assert np.abs(boxes[25:75, 0] - (120 + np.linspace(0, 50, 100)[25:75])).max() < 5       # but it follows


def test_dlib_finds_the_astronaut_and_nothing_in_the_dark(detect):
    points = detect(np.asarray(Image.open(PHOTO)))
    assert points.shape == (68, 2) and points[30] == pytest.approx((224, 120), abs=12)      # the tip of her nose
    assert points[36, 0] < points[45, 0] and points[36:48, 1].max() < points[48:, 1].min()
    assert detect(np.zeros((300, 200, 3), np.uint8)) is None


def picture(path, image, **options):
    image.save(path, **options)
    return media.read_photo(path)


def test_photos_of_every_kind(tmp_path):
    rgb = Image.new("RGB", (30, 20), (200, 100, 50))
    assert picture(tmp_path / "a.png", rgb).shape == (20, 30, 3)
    exif = Image.Exif()
    exif[0x0112] = 6                                                            # a phone held upright
    assert picture(tmp_path / "b.jpg", rgb, exif=exif).shape == (30, 20, 3)
    assert picture(tmp_path / "c.png", Image.new("L", (30, 20), 77))[0, 0].tolist() == [77] * 3
    assert picture(tmp_path / "d.png", Image.new("RGBA", (30, 20), (9, 9, 9, 0)))[0, 0].tolist() == [255] * 3
    assert picture(tmp_path / "e.png", Image.fromarray(np.full((4, 4), 65535, np.uint16)))[0, 0].tolist() == [255] * 3
    assert picture(tmp_path / "f.png", Image.fromarray(np.full((4, 4), 32768, np.uint16))).max() < 140
    assert picture(tmp_path / "g.jpg", Image.new("CMYK", (30, 20))).shape == (20, 30, 3)
    assert picture(tmp_path / "h.gif", rgb.convert("P"), save_all=True, append_images=[rgb.convert("P")]).shape == (20, 30, 3)
    assert picture(tmp_path / "i.png", Image.new("LA", (30, 20), (0, 0)))[0, 0].tolist() == [255] * 3


def test_video_frames_times_and_sound_survive(tmp_path, clip):
    pts = np.array([0, 512, 1024, 1500, 2600, 2800])
    frames = [np.full((32, 48, 3), 40 * k, np.uint8) for k in range(6)]
    video.write_video(tmp_path / "out.mp4", iter(frames), pts, (1, 12800), clip)
    back = list(media.read_video(tmp_path / "out.mp4"))
    assert [float(f.pts * f.time_base) for f in back] == pytest.approx((pts / 12800).tolist())
    assert max(abs(media.to_rgb(f).astype(int) - g).mean() for f, g in zip(back, frames)) < 4
    with av.open(str(tmp_path / "out.mp4")) as a, av.open(str(clip)) as b:
        assert a.streams.video[0].codec_context.name == "h264" and a.streams.video[0].codec_context.pix_fmt == "yuv420p"
        sound = [[(p.pts * p.time_base, bytes(p)) for p in c.demux(audio=0) if p.size] for c in (a, b)]
    assert sound[0] == sound[1]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out.mp4"]


def write_sound(path, codec, rate=48000, frames=50):
    """A black video at 25 frames a second, with noise."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as out:
        video, audio = out.add_stream("mpeg4", rate=25), out.add_stream(codec, rate=rate, layout="mono")
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        for k in range(frames):
            out.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
            noise = av.AudioFrame.from_ndarray(rng.uniform(-0.5, 0.5, (1, rate // 25)).astype(np.float32), format="fltp", layout="mono")
            noise.sample_rate, noise.pts, noise.time_base = rate, rate // 25 * k, Fraction(1, rate)
            out.mux(audio.encode(noise))
        out.mux(video.encode())
        out.mux(audio.encode())


def test_sound_that_mp4_cannot_hold_is_encoded_anew(tmp_path):
    write_sound(tmp_path / "a.avi", "pcm_s16le", rate=16000, frames=25)
    video.write_video(tmp_path / "out.mp4", [np.zeros((32, 32, 3), np.uint8)] * 25, np.arange(25), (1, 25), tmp_path / "a.avi")
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.streams.audio[0].codec_context.name == "aac"
        assert sum(f.samples for f in container.decode(audio=0)) == pytest.approx(16000, abs=2048)


def test_broken_sound_does_not_cost_the_video_nor_the_sound_after_it(tmp_path, capsys):
    write_sound(tmp_path / "some.avi", "mp2")
    write_sound(tmp_path / "all.ts", "aac")
    some, rest = (tmp_path / "some.avi").read_bytes(), bytearray((tmp_path / "all.ts").read_bytes())
    with av.open(str(tmp_path / "some.avi")) as container:
        for packet in [p for p in container.demux(audio=0) if p.size][10:40]:
            some = some.replace(bytes(packet), b"\x55" * packet.size)
    (tmp_path / "some.avi").write_bytes(some)
    with av.open(str(tmp_path / "all.ts")) as container:
        number = container.streams.audio[0].id
    for k in range(0, len(rest), 188):      # the packets of a transport stream; the tables stay
        if (rest[k + 1] & 31) << 8 | rest[k + 2] == number:
            rest[k + 30:k + 188] = bytes(158)
    (tmp_path / "all.ts").write_bytes(rest)
    for name in ("some.avi", "all.ts"):
        video.write_video(tmp_path / "out.mp4", [np.zeros((32, 32, 3), np.uint8)] * 50, np.arange(50), (1, 25), tmp_path / name)
        with av.open(str(tmp_path / "out.mp4")) as container:
            packets = [p for p in container.demux() if p.size]
            assert sum(p.stream.type == "video" for p in packets) == 50
            heard = [float(p.pts * p.time_base) for p in packets if p.stream.type == "audio"]
        if name == "some.avi":              # a hole, and sound in time after it
            assert max(heard) > 1.9 and max(np.diff(heard)) > 0.5
        else:
            assert not heard and "sound cannot be read" in capsys.readouterr().err


def test_rotation_metadata_is_honoured(tmp_path):
    frame = np.zeros((32, 64, 3), np.uint8)
    frame[:, :32] = 255                                                         # white on the left
    write_clip(tmp_path / "a.mp4", [frame] * 3, np.arange(3) * 512, sound=False)
    blob = bytearray((tmp_path / "a.mp4").read_bytes())
    at = blob.index((0x10000).to_bytes(4, "big") + bytes(12), blob.index(b"tkhd"))
    turn = [0, 0x10000, 0, -0x10000 % 2 ** 32, 0, 0, 0, 0, 0x40000000]          # as phones write it: 90 degrees clockwise
    blob[at:at + 36] = b"".join(v.to_bytes(4, "big") for v in turn)
    (tmp_path / "a.mp4").write_bytes(blob)
    upright = media.to_rgb(next(media.read_video(tmp_path / "a.mp4")))
    assert upright.shape == (64, 32, 3) and upright[:30].min() > 200 and upright[34:].max() < 50


def test_tracks_repeat_the_landmarks_of_faceless_frames(clip, detect, tmp_path):
    track = video.track_video(clip, detect, "dlib")
    assert len(track.pts) == 20 and np.flatnonzero(~track.found).tolist() == [7, 8]
    assert (track.points[7] == track.points[6]).all() and (track.points[8] == track.points[6]).all()
    video.save_track(tmp_path / "t.npz", track)
    back = video.load_track(tmp_path / "t.npz")
    assert all(np.array_equal(a, b) for a, b in zip(track, back))
    assert track.seconds()[-1] == pytest.approx((9 * 512 + 10 * 768) / 12800)
    video.save_track(tmp_path / "still.npz", track._replace(pts=np.zeros(20, np.int64)))
    with pytest.raises(UserError, match="is not a landmark track"):
        video.load_track(tmp_path / "still.npz")


@pytest.mark.parametrize("container", ["mp4", "mkv", "ts"])
def test_truncated_video_is_used_as_far_as_it_goes(tmp_path, container, capsys):
    path = tmp_path / f"a.{container}"
    with av.open(str(path), "w", options={"movflags": "faststart"} if container == "mp4" else {}) as out:  # the index first
        stream = out.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for k in range(40):
            noise = np.random.default_rng(k).integers(0, 255, (64, 64, 3), np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        out.mux(stream.encode())
    blob = path.read_bytes()
    assert len(list(media.read_video(path))) == 40 and capsys.readouterr().err == ""
    path.write_bytes(blob[:len(blob) // 2])
    assert 5 < len(list(media.read_video(path))) < 40
    assert "frames could be read" in capsys.readouterr().err or container == "ts"       # a .ts file does not know its length


def test_frames_without_a_time_of_their_own_get_one(tmp_path):
    """Raw H.264 has no time stamps; joined .ts files start their clock anew."""
    with av.open(str(tmp_path / "a.ts"), "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for k in range(50):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), 5 * k, np.uint8), format="rgb24")))
        out.mux(stream.encode())
    with av.open(str(tmp_path / "a.ts")) as source, open(tmp_path / "raw.h264", "wb") as raw:
        for packet in source.demux(video=0):
            raw.write(bytes(packet))
    (tmp_path / "twice.ts").write_bytes((tmp_path / "a.ts").read_bytes() * 2)
    for name, count in (("raw.h264", 50), ("twice.ts", 100)):
        times = [float(f.pts * f.time_base) for f in media.read_video(tmp_path / name)]
        assert len(times) == count and np.diff(times) == pytest.approx(1 / 25, abs=1e-3)


def test_nothing_is_averaged_across_a_cut():
    points = np.zeros((50, 68, 2))
    points[:, 36:42], points[:, 42:48], points[:, [48, 54]] = (100, 90), (140, 90), (120, 130)
    points[25:] += 300
    assert faces.steady_boxes(points, np.arange(50) / 25)[:, 0] == pytest.approx([120] * 25 + [420] * 25)


@pytest.fixture(scope="module")
def videos(tmp_path_factory, clip, face):
    """VoxCeleb2's layout, VoxCeleb1's, a person's photos, and what should only be reported."""
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
    arguments = ["data.py", "--videos", videos, "--out", "out", "--landmarks", "dlib", "--image-size", "64", "--workers", "2"]
    said = succeed(*arguments, cwd=tmp_path)
    files = sorted(str(f.relative_to(tmp_path / "out")) for f in (tmp_path / "out").rglob("*") if f.is_file())
    assert files == ["id1/vid1.pt", "loose.mp4.pt", "person.pt", "vox1/name.pt"]
    for words in ("4 sequences", "broken/a.mp4", "dark/none.mp4", "empty: no videos", "0 were there already"):
        assert words in said
    prepared = data.PreparedVideos(tmp_path / "out")
    counts = [len(torch.load(f, weights_only=True)["landmarks"]) for f in prepared.files]
    assert counts == [18 + 4, 18, 2, 6]                                         # all clips of a video in one sequence

    again = succeed(*arguments, cwd=tmp_path)
    assert "0 sequences with 0 frames prepared, 4 were there already" in again
    assert "--image-size 64" in fail(*arguments[:-4], "--image-size", "128", cwd=tmp_path)
    (tmp_path / "out/person.pt").unlink()
    assert "1 sequences with 2 frames prepared, 3 were there" in succeed(*arguments, "--max-frames", "3", cwd=tmp_path)


def test_max_frames_are_spread_evenly(clip, detect):
    few = list(gather.faces_in(clip, detect, "dlib", 64, 3))
    every = list(gather.faces_in(clip, detect, "dlib", 64))
    assert len(few) == 3 and len(every) == 18
    assert np.abs(few[-1][1] - every[-1][1]).max() < 1                          # the last frame is among them


def test_prepared_frames_and_landmarks_belong_together(tmp_path):
    toy, jpegs = ToyHeads(1, 128), []
    pairs = [toy.draw(0, t) for t in range(3)]
    for frame, _ in pairs:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG", quality=95)
        jpegs.append(torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8))
    torch.save({"jpeg": torch.cat(jpegs), "offsets": torch.tensor([0] + [len(j) for j in jpegs]).cumsum(0), "image_size": 128,
                "landmarks": torch.stack([torch.from_numpy(p) for _, p in pairs]), "detector": "dlib"}, tmp_path / "a.pt")
    frames, points = data.PreparedVideos(tmp_path).load(0, lambda n: [2, 0])
    assert np.abs(frames[0].astype(int) - pairs[2][0]).mean() < 6 and points[1] == pytest.approx(pairs[0][1], abs=1e-4)
    small, half = data.PreparedVideos(tmp_path, 64).load(0, lambda n: [2, 0])
    assert small.shape == (2, 64, 64, 3) and half == pytest.approx((points + .5) / 2 - .5, abs=1e-4)
    with pytest.raises(UserError, match="--image-size 256"):
        data.PreparedVideos(tmp_path, 256)


def test_parts_prepared_differently_are_told(tmp_path):
    sequence = {"jpeg": torch.zeros(1), "offsets": torch.zeros(1), "landmarks": torch.zeros(0, 68, 2), "detector": "dlib"}
    for part, difference in (("a", {"image_size": 128}), ("b", {"image_size": 64}), ("c", {"image_size": 128, "detector": "fan"})):
        (tmp_path / part).mkdir()
        (tmp_path / part / "0.pt").write_text("a damaged file first")
        torch.save(sequence | difference, tmp_path / part / "1.pt")
    with pytest.raises(UserError, match="c was prepared with fan landmarks, another part .* with dlib"):
        data.PreparedVideos(tmp_path)
    (tmp_path / "c" / "1.pt").unlink()
    assert data.PreparedVideos(tmp_path).image_size == 64
    with pytest.raises(UserError, match="b was prepared at 64 pixels"):
        data.PreparedVideos(tmp_path, 128)


def test_the_target_is_never_among_the_K():
    rng = np.random.default_rng(0)
    for count in (2, 3, 9, 50):
        for _ in range(200):
            t, *s = data.draw_frames(rng, count, 8)
            assert len(s) == 8 and t not in s and max(s + [t]) < count
            assert len(set(s)) == min(8, count - 1) or count < 9                # without repetition where possible
    assert {data.draw_frames(rng, 9, 8)[0] for _ in range(200)} == set(range(9))


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


@pytest.mark.parametrize("arguments,words", [
    (["--videos", "nowhere"], "no folder nowhere"), (["--videos", "."], "neither videos nor photos"),
    (["--workers", "-1"], "--workers"), (["--image-size", "0"], "image size 0")])
def test_wrong_folders(tmp_path, arguments, words):
    assert words in fail("data.py", *arguments, "--landmarks", "dlib", cwd=tmp_path)


def test_fan_without_a_network_says_where_to_put_its_weights(videos, tmp_path):
    result = script("data.py", "--videos", videos, "--out", "out", cwd=tmp_path, TORCH_HOME=str(tmp_path))
    line = result.stderr.splitlines()[-1]       # before it, torch hub may announce the download
    assert result.returncode == 2 and "Traceback" not in result.stderr and "--landmarks dlib" in line and "checkpoints" in line


def test_a_download_with_a_wrong_hash_is_refused(tmp_path, monkeypatch):
    from face_alignment.detection.sfd import sfd_detector
    (tmp_path / "net-0123456789.pth").write_bytes(b"something else")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(sfd_detector.models_urls, "s3fd", (tmp_path / "net-0123456789.pth").as_uri())
    with pytest.raises(UserError, match="invalid hash value"):
        faces.landmark_detector("fan")
    assert not list((tmp_path / "home/hub/checkpoints").iterdir())


def test_every_script_has_help(tmp_path):
    for name in ("data.py", "meta_train.py", "finetune.py", "infer.py", "evaluate.py"):
        result = script(name, "--help", cwd=tmp_path)
        assert result.returncode == 0 and name in result.stdout
