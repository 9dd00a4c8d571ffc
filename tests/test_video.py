"""decode.py: what is read from a video."""
import io
import shutil
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from conftest import moving, remux, write_clip
from media import decode, encode, folders, sound
from runtime.files import UserError


def test_rotation_metadata_is_applied(tmp_path):
    frame = np.zeros((32, 64, 3), np.uint8)
    frame[:, :32] = 255     # white on the left
    write_clip(tmp_path / "a.mp4", [frame] * 3, np.arange(3) * 512, sound=False)
    blob = bytearray((tmp_path / "a.mp4").read_bytes())
    at = blob.index((0x10000).to_bytes(4, "big") + bytes(12), blob.index(b"tkhd"))
    # 90 degrees clockwise, as phones write it
    turn = [0, 0x10000, 0, -0x10000 % 2 ** 32, 0, 0, 0, 0, 0x40000000]
    blob[at:at + 36] = b"".join(v.to_bytes(4, "big") for v in turn)
    (tmp_path / "a.mp4").write_bytes(blob)
    upright = decode.to_rgb(next(decode.read_video(tmp_path / "a.mp4")))
    assert upright.shape == (64, 32, 3) and upright[:30].min() > 200 and upright[34:].max() < 50


@pytest.mark.parametrize("container", ["mp4", "mkv", "ts"])
def test_a_truncated_video_is_used_up_to_its_end(tmp_path, container, capsys):
    path = tmp_path / f"a.{container}"
    options = {"movflags": "faststart"} if container == "mp4" else {}       # with the index at the start
    with av.open(str(path), "w", options=options) as out:
        stream = out.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for k in range(40):
            noise = np.random.default_rng(k).integers(0, 255, (64, 64, 3), np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        out.mux(stream.encode())
    blob = path.read_bytes()
    assert len(list(decode.read_video(path))) == 40 and capsys.readouterr().err == ""
    path.write_bytes(blob[:len(blob) // 2])
    assert 5 < len(list(decode.read_video(path))) < 40
    # a .ts file does not know its length
    assert "frames could be read" in capsys.readouterr().err or container == "ts"


def test_frames_without_increasing_times_get_them(tmp_path):
    """Raw H.264 has no time stamps. In .ts files that were joined, they start again."""
    with av.open(str(tmp_path / "a.ts"), "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for k in range(50):
            grey = np.full((64, 64, 3), 5 * k, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        out.mux(stream.encode())
    with av.open(str(tmp_path / "a.ts")) as source, open(tmp_path / "raw.h264", "wb") as raw:
        for packet in source.demux(video=0):
            raw.write(bytes(packet))
    (tmp_path / "twice.ts").write_bytes((tmp_path / "a.ts").read_bytes() * 2)
    for name, count in (("raw.h264", 50), ("twice.ts", 100)):
        times = [float(f.pts * f.time_base) for f in decode.read_video(tmp_path / name)]
        assert len(times) == count and np.diff(times) == pytest.approx(1 / 25, abs=1e-3)


TURN = np.array([[0, -1], [1, 0]])      # 90 degrees clockwise, x' = -y and y' = x, because y points down
MIRROR = np.diag([-1, 1])


def with_matrix(path, matrix):
    """Write the display matrix x' = m00 x + m01 y, y' = m10 x + m11 y into an mp4's track header."""
    blob = bytearray(path.read_bytes())
    at = blob.index((0x10000).to_bytes(4, "big") + bytes(12), blob.index(b"tkhd"))
    (a, c), (b, d) = (matrix * 0x10000).tolist()
    row = [a, b, 0, c, d, 0, 0, 0, 0x40000000]
    blob[at:at + 36] = b"".join((v % 2 ** 32).to_bytes(4, "big") for v in row)
    path.write_bytes(blob)


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
@pytest.mark.parametrize("mirrored", [False, True])
def test_the_whole_display_matrix_is_applied(tmp_path, turns, mirrored):
    """For four rotations, mirrored or not, a frame's white corner is where it should be."""
    frame = np.zeros((32, 64, 3), np.uint8)
    frame[:16, :32] = 255       # the top left corner
    write_clip(tmp_path / "a.mp4", [frame] * 3, np.arange(3) * 512, sound=False)
    matrix = np.linalg.matrix_power(-TURN.T, turns) @ (MIRROR if mirrored else np.eye(2, dtype=int))
    with_matrix(tmp_path / "a.mp4", matrix)
    seen = decode.to_rgb(next(decode.read_video(tmp_path / "a.mp4")))
    x, y = matrix @ [-1, -1]        # the new position of the corner relative to the middle
    rows, columns = (np.arange(n) < n / 2 for n in seen.shape[:2])
    white = (rows if y < 0 else ~rows)[:, None] & (columns if x < 0 else ~columns)[None]
    assert seen.shape == ((32, 64, 3) if turns % 2 == 0 else (64, 32, 3))
    assert seen[white].mean() > 240 and seen[~white].mean() < 15


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "flv"])
def test_a_title_in_any_alphabet(tmp_path, clip, suffix):
    path = tmp_path / f"a.{suffix}"
    remux(clip, path, offset=0, title="cafXX")
    blob = path.read_bytes()
    assert b"cafXX" in blob
    path.write_bytes(blob.replace(b"cafXX", b"caf\xe9 "))     # Latin-1
    assert len(list(decode.read_video(path))) == len(list(decode.read_video(clip)))


@pytest.mark.parametrize("curve,signal,grey", [
    (18, 0.75, 255), (16, 0.58, 255),                   # white in HLG and PQ, from table 1 of BT.2408
    (18, 0.38, 100), (16, 0.38, 100), (1, 0.75, 189)])  # a grey card (26 of 203 cd/m2); the last is not HDR
def test_hdr_colours_are_those_on_a_screen(tmp_path, curve, signal, grey):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p10le"
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace, context.color_range = curve, 9, 9, 1
        frame = av.VideoFrame(64, 48, "yuv420p10le")
        for plane, level in zip(frame.planes, (round(64 + 876 * signal), 512, 512)):
            plane.update(np.full(plane.buffer_size // 2, level, np.uint16).tobytes())
        frame.color_trc, frame.color_primaries, frame.colorspace, frame.color_range = curve, 9, 9, 1
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    frame = next(decode.read_video(path))
    seen = decode.to_srgb_from_hdr(decode.to_rgb(frame), frame)
    assert seen.dtype == np.uint8 and np.abs(seen.astype(int) - grey).max() < 10    # computed from 8 bits


def test_hdr_colours_of_a_clip_are_converted_in_its_crops(tmp_path, face, detect, monkeypatch):
    write_clip(tmp_path / "a.mp4", moving(face, 2), np.arange(2) * 512, sound=False)
    monkeypatch.setattr(folders, "to_srgb_from_hdr", lambda image, frame: image // 2)
    learned = [shot.image for shot in folders.faces_in(tmp_path / "a.mp4", detect, 64)]
    assert len(learned) == 2 and max(crop.max() for crop in learned) < 128


@pytest.mark.parametrize("name", ["a.f4v", "a.asf", "clip", "a.video"])
def test_a_clip_may_have_any_name(tmp_path, face, detect, name):
    write_clip(tmp_path / "a.mp4", moving(face, 3), np.arange(3) * 512, sound=False)
    shutil.copy(tmp_path / "a.mp4", tmp_path / name)
    assert len(list(folders.faces_in(tmp_path / name, detect, 64, 32))) == 3


def test_a_frame_rate_that_changes_is_not_taken_for_an_early_end(tmp_path, capsys):
    """60 frames a second, then 5. For a .ts file, FFmpeg guesses the rate from the first frames."""
    with av.open(str(tmp_path / "a.ts"), "w") as out:
        stream = out.add_stream("libx264", rate=60, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 60)
        for k in range(120):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), k, np.uint8), format="rgb24")
            frame.pts, frame.time_base = (k if k < 60 else 60 + (k - 60) * 12), Fraction(1, 60)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    assert len(list(decode.read_video(tmp_path / "a.ts"))) == 120 and capsys.readouterr().err == ""


@pytest.mark.parametrize("name,ratio,shape", [
    ("a.mp4", (4, 3), (48, 64)), ("a.mkv", (4, 3), (48, 64)), ("a.ts", (4, 3), (48, 64)),
    ("b.mp4", (8, 9), (54, 48)), ("c.mp4", (1, 1), (48, 48))])
def test_pixels_that_are_not_square(tmp_path, name, ratio, shape):
    with av.open(str(tmp_path / name), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(*ratio)
        for _ in range(25):
            noise = np.random.default_rng(0).integers(0, 255, (48, 48, 3), np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        out.mux(stream.encode())
    assert decode.to_rgb(next(decode.read_video(tmp_path / name))).shape == (*shape, 3)


def test_frames_that_an_edit_list_hides_are_not_counted(tmp_path, face, detect, capsys):
    """A clip that was trimmed without re-encoding stores frames that players do not show."""
    write_clip(tmp_path / "a.mp4", moving(face, 40), np.arange(40) * 512, sound=False)
    remux(tmp_path / "a.mp4", tmp_path / "cut.mp4", offset=-30 / 25)
    with av.open(str(tmp_path / "cut.mp4")) as container:
        assert container.streams.video[0].frames == 40      # the number of stored frames
    assert decode.count_frames(tmp_path / "cut.mp4") == 10
    assert len(list(decode.read_video(tmp_path / "cut.mp4"))) == 10 and capsys.readouterr().err == ""
    assert len(list(folders.faces_in(tmp_path / "cut.mp4", detect, 64, 5))) == 5


def box(name, body):
    """-> the bytes of a box of an mp4 file."""
    return (len(body) + 8).to_bytes(4, "big") + name + body


def add_cover(path):
    """Add a cover picture (JPEG) as the first stream of an mp4, as music shops and recorders do."""
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(picture, "JPEG")
    cover = box(b"covr", box(b"data", bytes([0, 0, 0, 13, 0, 0, 0, 0]) + picture.getvalue()))
    kind = box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    blob = path.read_bytes()
    at = blob.rindex(b"moov") - 4
    size = int.from_bytes(blob[at:at + 4], "big")
    assert at + size == len(blob)       # it is behind the media, so that no offset changes
    inside = box(b"udta", box(b"meta", bytes(4) + kind + box(b"ilst", cover))) + blob[at + 8:]
    path.write_bytes(blob[:at] + box(b"moov", inside))


def test_a_cover_is_not_used_as_the_video(tmp_path, clip):
    shutil.copy(clip, tmp_path / "a.mp4")
    add_cover(tmp_path / "a.mp4")
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert len(container.streams.video) == 2 and container.streams.video[0].codec_context.name == "mjpeg"
    assert decode.count_frames(tmp_path / "a.mp4") == len(list(decode.read_video(tmp_path / "a.mp4"))) == 20

    with av.open(str(tmp_path / "song.mp4"), "w") as out, av.open(str(clip)) as source:
        copy = out.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(audio=0):
            if packet.dts is not None:
                packet.stream = copy
                out.mux(packet)
    add_cover(tmp_path / "song.mp4")
    with pytest.raises(UserError, match="has no video in it"):
        list(decode.read_video(tmp_path / "song.mp4"))
    assert decode.count_frames(tmp_path / "song.mp4") == 0


def test_paths_are_never_urls(tmp_path, clip, detect, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("12:30.mp4", "http:x.mp4", "a%03d.mp4", "pipe:0.mp4"):
        shutil.copy(clip, name)
        assert decode.count_frames(name) == len(list(decode.read_video(name))) == 20
        assert sound.usable_sound(name) == name
        encode.write_video("out:" + name, [np.zeros((32, 32, 3), np.uint8)] * 3, np.arange(3), (1, 25), name)
        assert len(list(decode.read_video("out:" + name))) == 3
    with pytest.raises(UserError, match="is a folder, but a video file is needed"):
        list(decode.read_video(tmp_path))
