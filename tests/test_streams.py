"""decode.py and streams.py: videos that are damaged or change their size, and animated pictures."""
import re
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from conftest import moving, write_clip
from media import decode, faces, folders, sound, streams, tracking
from runtime.files import UserError

DAMAGED = (12, 13, 26)      # the numbers of packets among 40, with a key frame every 10


def write_greys(path, codec):
    """Write 40 frames of 64 x 64 pixels that become lighter and lighter."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=25)
        stream.width, stream.height, stream.codec_context.gop_size = 64, 64, 10
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for k in range(40):
            noise = np.random.default_rng(k).integers(0, 40, (64, 64, 3)) + 5 * k
            frame = av.VideoFrame.from_ndarray(noise.astype(np.uint8), format="rgb24")
            frame.pts, frame.time_base = k, Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def damage(path, numbers, ending=b""):
    """Overwrite the packets of a video that have these numbers; each then ends with `ending`."""
    blob = path.read_bytes()
    with av.open(str(path)) as container:
        stored = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    for k in numbers:
        assert blob.count(stored[k]) == 1
        blob = blob.replace(stored[k], b"\xff" * (len(stored[k]) - len(ending)) + ending)
    path.write_bytes(blob)


@pytest.mark.parametrize("name,codec", [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("b.mp4", "libx265"),
                                        ("c.mp4", "mpeg4"), ("c.avi", "mpeg4"), ("d.avi", "mjpeg"),
                                        ("e.webm", "libvpx"), ("f.webm", "libvpx-vp9")])
@pytest.mark.parametrize("numbers", [(0,), (14,), (39,), DAMAGED])
def test_a_damaged_packet_does_not_end_the_video(tmp_path, name, codec, numbers):
    write_greys(tmp_path / name, codec)
    whole = [float(f.pts * f.time_base) for f in decode.read_video(tmp_path / name)]
    assert len(whole) == 40
    damage(tmp_path / name, numbers)
    said = []
    frames = list(decode.read_video(tmp_path / name, said.append))
    times = [float(f.pts * f.time_base) for f in frames]
    assert len(frames) >= 18 and set(times) <= set(whole) and (np.diff(times) > 0).all()
    if numbers != (39,):
        assert times[-1] == whole[-1]
    # each frame has its own time
    late = [abs(decode.to_rgb(f).mean() - 20 - 5 * 25 * t) for f, t in zip(frames, times)]
    assert np.median(late) < 3 and late[-1] < 5
    line, = said
    assert f"only {len(frames)}" in line and "damaged packets: " in line


def test_a_damaged_packet_that_seems_to_hold_two_frames_does_not_block_vp9(tmp_path):
    """The second of them stays in FFmpeg's decoder, which then refuses all packets after this one."""
    write_greys(tmp_path / "f.webm", "libvpx-vp9")
    two_frames = b"\xc1\x40\x40\xc1"      # the index at the end of a superframe: two frames of 64 bytes
    damage(tmp_path / "f.webm", [0], two_frames)
    said = []
    frames = list(decode.read_video(tmp_path / "f.webm", said.append))
    assert len(frames) >= 30 and "damaged packets: " in said[0]     # all from the next key frame on


@pytest.mark.parametrize("name", ["b.mp4", "b.mkv"])
def test_frames_that_the_decoder_drops_without_an_error_are_counted(tmp_path, name):
    """FFmpeg's HEVC decoder drops damaged frames, and the frames that remain give a lower rate."""
    write_greys(tmp_path / name, "libx265")
    blob = bytearray((tmp_path / name).read_bytes())
    with av.open(str(tmp_path / name)) as container:
        stored = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    for k in DAMAGED:       # some bits of each slice
        start = blob.find(stored[k][:40])
        assert start > 0
        for place in range(start + 8, start + 40, 4):
            blob[place] ^= 0x55
    (tmp_path / name).write_bytes(blob)
    said = []
    frames = list(decode.read_video(tmp_path / name, said.append))
    line, = said
    expected = int(re.search(r"of about (\d+) frames", line)[1])
    assert len(frames) < 35 and f"only {len(frames)} of about" in line and 38 <= expected <= 40


def test_interlaced_frames_are_not_counted_by_their_packets(tmp_path):
    """A packet of an interlaced stream may hold half a frame."""
    for flags in ("", "+ildct+ilme"):
        damage = streams.Damage()
        with av.open(str(tmp_path / "a.mp4"), "w") as out:
            stream = out.add_stream("libx264", rate=25, options={"flags": flags} if flags else {})
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            for _ in range(5):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), "rgb24")))
            out.mux(stream.encode())
        with av.open(str(tmp_path / "a.mp4")) as container:
            assert len(list(streams.decoded(container, container.streams.video[0], damage))) == 5
        assert damage.due == (0 if flags else 5)


@pytest.mark.parametrize("name,codec", [("a.mp4", "libx264"), ("b.mp4", "libx265"), ("c.avi", "mpeg4"),
                                        ("d.avi", "mjpeg"), ("f.webm", "libvpx-vp9")])
def test_frames_that_damage_has_spoilt_are_known(tmp_path, name, codec):
    write_greys(tmp_path / name, codec)
    whole = {f.pts: decode.to_rgb(f) for f in decode.read_video(tmp_path / name)}
    damage(tmp_path / name, (14,))
    frames = list(decode.read_video(tmp_path / name, lambda line: None))
    good = [f for f in frames if not decode.is_spoilt(f)]
    assert all(np.array_equal(decode.to_rgb(f), whole[f.pts]) for f in good)
    assert len(good) >= 30 and frames[-1] in good   # before the damage, and from the next key frame


def test_a_clip_is_learned_without_the_frames_that_damage_has_spoilt(tmp_path, face, detect, monkeypatch):
    write_clip(tmp_path / "a.mp4", moving(face, 12), np.arange(12) * 512, sound=False)
    assert len(list(folders.faces_in(tmp_path / "a.mp4", detect, 64))) == 12
    damage(tmp_path / "a.mp4", (5,))        # the only key frame is the first
    shots = list(folders.faces_in(tmp_path / "a.mp4", detect, 64, complain=lambda line: None))
    assert 3 <= len(shots) <= 8
    monkeypatch.setattr(folders, "is_spoilt", lambda frame: True)
    with pytest.raises(UserError, match="so damaged"):
        list(folders.faces_in(tmp_path / "a.mp4", detect, 64, complain=lambda line: None))


def test_a_damaged_container_does_not_end_the_video(tmp_path):
    write_greys(tmp_path / "a.mkv", "libx264")
    blob = (tmp_path / "a.mkv").read_bytes()
    middle = len(blob) // 2
    (tmp_path / "a.mkv").write_bytes(blob[:middle] + bytes(4000) + blob[middle + 4000:])
    frames = list(decode.read_video(tmp_path / "a.mkv", lambda line: None))
    assert 15 < len(frames) < 40 and float(frames[-1].pts * frames[-1].time_base) == pytest.approx(39 / 25)


def test_two_passes_agree_although_frames_are_missing_in_the_second(tmp_path, face, detect, monkeypatch):
    """FFmpeg's threads do not always decode the same frames of a damaged video."""
    frames = moving(face, 12)
    write_clip(tmp_path / "a.mp4", frames, np.arange(12) * 512, sound=False)
    track = tracking.track_video(tmp_path / "a.mp4", detect)
    whole = tracking.read_crops(tmp_path / "a.mp4", track, range(12), 64)
    shots = list(folders.faces_in(tmp_path / "a.mp4", detect, 64))
    read = decode.read_video

    def without_the_fourth(path, complain):
        return (frame for k, frame in enumerate(read(path, complain)) if k != 3)
    monkeypatch.setattr(tracking, "read_video", without_the_fourth)
    less = tracking.read_crops(tmp_path / "a.mp4", track, range(12), 64)
    assert sorted(less) == [0, 1, 2, *range(4, 12)]
    assert all(np.array_equal(less[k], whole[k]) for k in less)
    monkeypatch.setattr(tracking, "read_video", read)
    monkeypatch.setattr(folders, "read_video", without_the_fourth)
    fewer = list(folders.faces_in(tmp_path / "a.mp4", detect, 64))
    assert len(shots) == 12 and len(fewer) == 11
    assert all(np.array_equal(a.image, b.image) for a, b in zip(fewer, shots[:3] + shots[4:]))


# ------------------------------------------------------------------------------------- sizes that change

def write_part(path, frames, start, aspect=Fraction(1)):
    """Write a transport stream, which can be joined with others to one recording -> its bytes."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"bf": "0", "crf": "10"})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        stream.codec_context.sample_aspect_ratio = aspect
        for k, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture.pts, picture.time_base = start + k, Fraction(1, 25)
            out.mux(stream.encode(picture))
        out.mux(stream.encode())
    return path.read_bytes()


def resized(frames, width, height):
    return [np.asarray(Image.fromarray(f).resize((width, height), Image.LANCZOS)) for f in frames]


def test_frames_of_other_sizes_are_scaled_to_the_first_one(tmp_path):
    white = [np.full((80, 120, 3), 255, np.uint8)] * 25
    shapes = {"half": (60, 40), "tall": (40, 60), "wide": (120, 60), "narrow": (80, 80)}
    for name, (width, height) in shapes.items():
        aspect = Fraction(3, 2) if name == "narrow" else Fraction(1)
        blob = write_part(tmp_path / "a.ts", white, 0)
        blob += write_part(tmp_path / "b.ts", resized(white, width, height), 25, aspect)
        (tmp_path / "joined.ts").write_bytes(blob)
        pictures = [decode.to_rgb(frame) for frame in decode.read_video(tmp_path / "joined.ts")]
        assert [p.shape for p in pictures] == [(80, 120, 3)] * 50
        bright = (pictures[-1] > 128).mean((0, 2))          # of each column
        borders = {"tall": (120 - 80 * 40 / 60) / 2}.get(name, 0)
        assert (bright == 0).sum() == pytest.approx(2 * borders, abs=1), name
        share = {"tall": 4 / 9, "wide": 3 / 4}.get(name, 1)
        assert (pictures[-1] > 128).mean() == pytest.approx(share, abs=0.02)


def test_a_face_is_followed_through_changes_of_size(tmp_path, face, detect):
    frames, said = moving(face, 30), []
    parts = frames[:10], resized(frames[10:20], 100, 80), frames[20:]
    blob = b"".join(write_part(tmp_path / "part.ts", part, 10 * k) for k, part in enumerate(parts))
    (tmp_path / "call.ts").write_bytes(blob)
    write_clip(tmp_path / "whole.mp4", frames, np.arange(30) * 512, sound=False)
    track = tracking.track_video(tmp_path / "call.ts", detect, complain=said.append)
    whole = tracking.track_video(tmp_path / "whole.mp4", detect)
    assert track.found.all() and not said
    eyes = np.linalg.norm(whole.points[0, 36] - whole.points[0, 45])
    assert np.linalg.norm(track.points - whole.points, axis=-1).mean() < 0.03 * eyes


def test_no_message_contains_none():
    """Another face is in the picture only while the followed one is not."""
    image, box = np.zeros((200, 400, 3), np.uint8), (20, 20, 100, 100)

    class Found(faces.Detector):
        def faces(self, image, sides=None):
            return self.now

        def landmarks(self, image, face):
            return np.linspace(face.box[:2], face.box[2:], 68, dtype=np.float32)
    detector = Found()
    follower = tracking.Follower(detector)
    for k in range(10):
        detector.now = [faces.Face(box if k % 5 else (300, 20, 380, 100), 2.0)]
        follower.look(image, k / 25, cut=k == 0)
    assert "None" not in str(follower.report("a.mp4") or "")


@pytest.mark.parametrize("name", ["a.webp", "a.gif", "a.png", "a.avif"])
def test_an_animation_can_be_a_driver(tmp_path, face, detect, name, capsys):
    frames, path = moving(face, 12), tmp_path / name
    first, *rest = map(Image.fromarray, frames)
    lasting = [40] * 6 + [80] * 6
    first.save(path, save_all=True, append_images=rest, duration=lasting, quality=95)
    assert decode.count_frames(path) == 12
    read = list(decode.read_video(path))
    times = [float(frame.pts * frame.time_base) for frame in read]
    assert times == pytest.approx((np.cumsum([0, *lasting[:-1]]) / 1000).tolist())
    assert np.mean([np.abs(decode.to_rgb(a).astype(int) - b).mean() for a, b in zip(read, frames)]) < 8
    track = tracking.track_video(path, detect)
    assert track.found.all() and sorted(tracking.read_crops(path, track, range(12), 64)) == list(range(12))
    assert sound.usable_sound(path) is None and not capsys.readouterr().err


def test_a_damaged_animation_is_refused(tmp_path, face):
    first, *rest = map(Image.fromarray, moving(face, 5))
    first.save(tmp_path / "a.webp", save_all=True, append_images=rest, duration=40)
    blob = (tmp_path / "a.webp").read_bytes()
    (tmp_path / "a.webp").write_bytes(blob[:len(blob) // 2])
    with pytest.raises(UserError, match="a.webp is an animated picture that is damaged"):
        list(decode.read_video(tmp_path / "a.webp"))
    assert decode.count_frames(tmp_path / "a.webp") == 0
