"""media/: what is read of a video, who is followed in it, what is written."""
import io
import shutil
from fractions import Fraction

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from conftest import PHOTO, moving, write_clip
from media import decode, encode, faces, folders, photos, sound, tracking
from media.crops import face_box
from media.recognition import Recognition, tell_apart
from runtime.files import UserError


def test_video_frames_times_and_sound_survive(tmp_path, clip):
    pts = np.array([0, 512, 1024, 1500, 2600, 2800])
    frames = [np.full((32, 48, 3), 40 * k, np.uint8) for k in range(6)]
    encode.write_video(tmp_path / "out.mp4", iter(frames), pts, (1, 12800), clip)
    back = list(decode.read_video(tmp_path / "out.mp4"))
    assert [float(f.pts * f.time_base) for f in back] == pytest.approx((pts / 12800).tolist())
    assert max(abs(decode.to_rgb(f).astype(int) - g).mean() for f, g in zip(back, frames)) < 4
    with av.open(str(tmp_path / "out.mp4")) as a, av.open(str(clip)) as b:
        picture = a.streams.video[0].codec_context
        assert picture.name == "h264" and picture.pix_fmt == "yuv420p"
        sound = [[(p.pts * p.time_base, bytes(p)) for p in c.demux(audio=0) if p.size] for c in (a, b)]
    assert sound[0] == sound[1]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out.mp4"]

def black(n):
    return [np.zeros((32, 32, 3), np.uint8)] * n


def write_sound(path, codec, rate=48000, frames=50):
    """A black video at 25 frames a second, with noise."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as out:
        video, audio = out.add_stream("mpeg4", rate=25), out.add_stream(codec, rate=rate, layout="mono")
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        for k in range(frames):
            out.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
            samples = rng.uniform(-0.5, 0.5, (1, rate // 25)).astype(np.float32)
            noise = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            noise.sample_rate, noise.pts, noise.time_base = rate, rate // 25 * k, Fraction(1, rate)
            out.mux(audio.encode(noise))
        out.mux(video.encode())
        out.mux(audio.encode())


def test_sound_that_mp4_cannot_hold_is_encoded_anew(tmp_path):
    write_sound(tmp_path / "a.avi", "pcm_s16le", rate=16000, frames=25)
    encode.write_video(tmp_path / "out.mp4", black(25), np.arange(25), (1, 25), tmp_path / "a.avi")
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
        encode.write_video(tmp_path / "out.mp4", black(50), np.arange(50), (1, 25), tmp_path / name)
        with av.open(str(tmp_path / "out.mp4")) as container:
            packets = [p for p in container.demux() if p.size]
            assert sum(p.stream.type == "video" for p in packets) == 50
            heard = [float(p.pts * p.time_base) for p in packets if p.stream.type == "audio"]
        if name == "some.avi":              # a hole, and sound in time after it
            assert max(heard) > 1.9 and max(np.diff(heard)) > 0.5
        else:
            assert not heard and "its sound cannot be read" in capsys.readouterr().err


def test_rotation_metadata_is_honoured(tmp_path):
    frame = np.zeros((32, 64, 3), np.uint8)
    frame[:, :32] = 255                                                         # white on the left
    write_clip(tmp_path / "a.mp4", [frame] * 3, np.arange(3) * 512, sound=False)
    blob = bytearray((tmp_path / "a.mp4").read_bytes())
    at = blob.index((0x10000).to_bytes(4, "big") + bytes(12), blob.index(b"tkhd"))
    # as phones write it: 90 degrees clockwise
    turn = [0, 0x10000, 0, -0x10000 % 2 ** 32, 0, 0, 0, 0, 0x40000000]
    blob[at:at + 36] = b"".join(v.to_bytes(4, "big") for v in turn)
    (tmp_path / "a.mp4").write_bytes(blob)
    upright = decode.to_rgb(next(decode.read_video(tmp_path / "a.mp4")))
    assert upright.shape == (64, 32, 3) and upright[:30].min() > 200 and upright[34:].max() < 50


def test_tracks_repeat_the_landmarks_of_faceless_frames(clip, detect, tmp_path):
    track = tracking.track_video(clip, detect)
    assert len(track.pts) == 20 and np.flatnonzero(~track.found).tolist() == [7, 8]
    assert (track.points[7] == track.points[6]).all() and (track.points[8] == track.points[6]).all()
    tracking.save_track(tmp_path / "t.npz", track)
    back = tracking.load_track(tmp_path / "t.npz")
    assert all(np.array_equal(a, b) for a, b in zip(track, back))
    assert track.seconds()[-1] == pytest.approx((9 * 512 + 10 * 768) / 12800)
    tracking.save_track(tmp_path / "still.npz", track._replace(pts=np.zeros(20, np.int64)))
    with pytest.raises(UserError, match="is not a landmark track"):
        tracking.load_track(tmp_path / "still.npz")


@pytest.mark.parametrize("container", ["mp4", "mkv", "ts"])
def test_truncated_video_is_used_as_far_as_it_goes(tmp_path, container, capsys):
    path = tmp_path / f"a.{container}"
    options = {"movflags": "faststart"} if container == "mp4" else {}       # the index first
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


def test_frames_without_a_time_of_their_own_get_one(tmp_path):
    """Raw H.264 has no time stamps; joined .ts files start their clock anew."""
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


# -------------------------------------------------------------------------------------- what is read

TURN = np.array([[0, -1], [1, 0]])      # of 90 degrees, on (x, y) with y down: x' = -y, y' = x is clockwise
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
    """Four turns, mirrored or not: where the white corner of a frame is seen."""
    frame = np.zeros((32, 64, 3), np.uint8)
    frame[:16, :32] = 255                                                       # top left
    write_clip(tmp_path / "a.mp4", [frame] * 3, np.arange(3) * 512, sound=False)
    matrix = np.linalg.matrix_power(-TURN.T, turns) @ (MIRROR if mirrored else np.eye(2, dtype=int))
    with_matrix(tmp_path / "a.mp4", matrix)
    seen = decode.to_rgb(next(decode.read_video(tmp_path / "a.mp4")))
    x, y = matrix @ [-1, -1]        # where the corner goes, from the middle
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
    (18, 0.75, 255), (16, 0.58, 255),               # HLG and PQ: white, and a grey card, of BT.2408, table 1
    (18, 0.38, 100), (16, 0.38, 100), (1, 0.75, 189)])  # 26 of 203 cd/m2 are 100 in sRGB; the last is no HDR
def test_hdr_is_seen_as_on_a_screen(tmp_path, curve, signal, grey):
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
    assert seen.dtype == np.uint8 and np.abs(seen.astype(int) - grey).max() < 10  # from 8 bits


def test_hdr_colours_of_a_clip_are_learned(tmp_path, face, detect, monkeypatch):
    write_clip(tmp_path / "a.mp4", moving(face, 2), np.arange(2) * 512, sound=False)
    monkeypatch.setattr(folders, "to_srgb_from_hdr", lambda image, frame: image // 2)
    learned = [shot.image for shot in folders.faces_in(tmp_path / "a.mp4", detect, 64)]
    assert len(learned) == 2 and max(crop.max() for crop in learned) < 128


@pytest.mark.parametrize("name", ["a.f4v", "a.asf", "clip", "a.video"])
def test_a_clip_of_any_name_is_a_clip(tmp_path, face, detect, name):
    write_clip(tmp_path / "a.mp4", moving(face, 3), np.arange(3) * 512, sound=False)
    shutil.copy(tmp_path / "a.mp4", tmp_path / name)
    assert len(list(folders.faces_in(tmp_path / name, detect, 64, 32))) == 3


def test_a_rate_that_changes_is_no_early_end(tmp_path, capsys):
    """60 frames a second, then 5: of a .ts, FFmpeg guesses the rate from the first ones."""
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


def remux(source, target, offset, kinds=("video", "audio"), **metadata):
    """Copy packets without re-encoding, those of these kinds `offset` seconds later."""
    with av.open(str(source)) as a, av.open(str(target), "w") as b:
        b.metadata.update(metadata)
        copies = {s.index: b.add_stream_from_template(s) for s in a.streams}
        for packet in a.demux():
            if packet.dts is not None:
                shift = round(offset / packet.time_base) if packet.stream.type in kinds else 0
                packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                packet.stream = copies[packet.stream.index]
                b.mux(packet)


def test_what_an_edit_list_cuts_off_is_not_counted(tmp_path, face, detect, capsys):
    """A clip trimmed without re-encoding stores frames that nobody sees."""
    write_clip(tmp_path / "a.mp4", moving(face, 40), np.arange(40) * 512, sound=False)
    remux(tmp_path / "a.mp4", tmp_path / "cut.mp4", offset=-30 / 25)
    with av.open(str(tmp_path / "cut.mp4")) as container:
        assert container.streams.video[0].frames == 40                          # they are stored
    assert decode.count_frames(tmp_path / "cut.mp4") == 10
    assert len(list(decode.read_video(tmp_path / "cut.mp4"))) == 10 and capsys.readouterr().err == ""
    assert len(list(folders.faces_in(tmp_path / "cut.mp4", detect, 64, 5))) == 5


def box(name, body):
    return (len(body) + 8).to_bytes(4, "big") + name + body


def add_cover(path):
    """Put a cover (JPEG) before the streams of an mp4, as music shops and recorders do."""
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(picture, "JPEG")
    cover = box(b"covr", box(b"data", bytes([0, 0, 0, 13, 0, 0, 0, 0]) + picture.getvalue()))
    kind = box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    blob = path.read_bytes()
    at = blob.rindex(b"moov") - 4
    size = int.from_bytes(blob[at:at + 4], "big")
    assert at + size == len(blob)       # after the media: no offset changes
    inside = box(b"udta", box(b"meta", bytes(4) + kind + box(b"ilst", cover))) + blob[at + 8:]
    path.write_bytes(blob[:at] + box(b"moov", inside))


def test_a_cover_is_no_video(tmp_path, clip):
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


def test_paths_are_only_paths(tmp_path, clip, detect, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("12:30.mp4", "http:x.mp4", "a%03d.mp4", "pipe:0.mp4"):
        shutil.copy(clip, name)
        assert decode.count_frames(name) == len(list(decode.read_video(name))) == 20
        assert sound.usable_sound(name) == name
        encode.write_video("out:" + name, [np.zeros((32, 32, 3), np.uint8)] * 3, np.arange(3), (1, 25), name)
        assert len(list(decode.read_video("out:" + name))) == 3
    with pytest.raises(UserError, match="is a folder, but a video file is needed"):
        list(decode.read_video(tmp_path))


# ---------------------------------------------------------------------------------- who is followed

def two_people(face, n, hidden=(), gap=20):
    """n frames of 200 x 500 with two heads that move by themselves.

    The left one is not there in the frames `hidden`.
    """
    frames = []
    for k in range(n):
        frame = np.full((200, 500, 3), 128, np.uint8)
        if k not in hidden:
            frame[:180, 5 + k % 5:225 + k % 5] = face[20:, 10:230]
        # the right one comes and goes a little, so that now the one, now the other has the larger box
        size = 1.0 + 0.12 * np.sin(k)
        mirrored = Image.fromarray(face[20:, 10:230][:, ::-1])
        other = np.asarray(mirrored.resize((round(200 * size), round(164 * size))))
        frame[:other.shape[0], 260:260 + other.shape[1]] = other
        frames.append(frame)
    return frames


def side(track):
    """0 where the left person is followed, 1 where the right one is."""
    return (track.points[:, :, 0].mean(1) > 240).astype(int)


def test_the_track_keeps_to_one_of_two_people(tmp_path, face, detect):
    said = []
    hidden = range(20, 30)                                                      # 0.4 s: to be waited for
    write_clip(tmp_path / "two.mp4", two_people(face, 50, hidden), np.arange(50) * 512, sound=False)
    track = tracking.track_video(tmp_path / "two.mp4", detect, complain=said.append)
    first = side(track)[0]
    assert (side(track) == first).all()
    assert track.found.sum() >= (50 if first else 38)
    assert len(said) == 1 and "show several faces" in said[0] and ("left", "right")[first] in said[0]
    prepared = list(folders.faces_in(tmp_path / "two.mp4", detect, 64, complain=said.append))
    assert len(prepared) == track.found.sum()


def test_another_is_chosen_after_a_second_without_the_first(tmp_path, face, detect):
    frames = two_people(face, 70, range(20, 70))
    for frame in frames[:20]:
        frame[:, 240:] = 128        # at first there is only the left one
    write_clip(tmp_path / "two.mp4", frames, np.arange(70) * 512, sound=False)
    follower = tracking.Follower(detect)
    track = tracking.follow_face(tmp_path / "two.mp4", follower, lambda k: True, False, lambda line: None)
    assert track.found[:20].all() and (side(track)[:20] == 0).all()
    assert track.found[50:].all() and (side(track)[50:] == 1).all()


def two_who_differ(n, away, left, right):
    """n frames of 220 x 500: one person on the left, gone in the frames `away`, and another on the right."""
    frames = []
    for k in range(n):
        frame = np.full((220, 500, 3), 128, np.uint8)
        far = min((abs(k - m) for m in away), default=n)        # frames before or after the time away
        out = np.clip(24 * (11 - far), 0, 240)                  # pixels: they leave and come back by the side
        frame[:200, k % 3:240 - out + k % 3] = left[:, out:]
        frame[10:210, 255 + k % 2:495 + k % 2] = right
        frames.append(frame)
    return frames


@pytest.fixture(scope="module")
def other(detect):
    """Another person's head, as large as `face`."""
    image = photos.read_photo(PHOTO.with_name("mona_lisa.jpg"))
    x, y, half = face_box(detect(image))
    part = Image.fromarray(image).crop((round(x - 1.5 * half), round(y - 1.25 * half), round(x + 1.5 * half),
                                        round(y + 1.25 * half)))
    return np.asarray(part.resize((240, 200), Image.LANCZOS))


@pytest.mark.parametrize("abrupt", [False, True])
def test_a_speaker_who_comes_back_is_followed_again(tmp_path, face, other, detect, abrupt):
    said, asked = [], []
    frames = two_who_differ(140, () if abrupt else range(50, 100), face, other)
    for frame in frames[:5]:
        frame[:, 250:] = 128        # so that the left one is chosen
    for frame in frames[50:100] if abrupt else ():
        frame[:, :250] = 128
    write_clip(tmp_path / "a.mp4", frames, np.arange(140) * 512)
    first = side(tracking.track_video(tmp_path / "a.mp4", detect))
    assert (first[:45] == 0).all() and (first[-30:] == 1).all()     # without recognition, the other one stays
    recognition = tell_apart()
    counted = recognition._replace(vector=lambda *shot: asked.append(1) or recognition.vector(*shot))
    again = side(tracking.track_video(tmp_path / "a.mp4", detect, complain=said.append, recognition=counted))
    assert (again[:45] == 0).all() and (again[-25:] == 0).all()
    assert "returned to the same person 1 times" in said[0] and len(asked) < 20


def test_nobody_is_recognised_where_there_is_no_choice(tmp_path, face, detect):
    def vector(frame, points):
        raise AssertionError("not needed")
    frames = two_who_differ(75, range(20, 50), face, np.full_like(face, 128))
    write_clip(tmp_path / "a.mp4", frames, np.arange(75) * 512, sound=False)
    track = tracking.track_video(tmp_path / "a.mp4", detect, recognition=Recognition(vector, 0.9))
    assert track.found[:10].all() and not track.found[30:45].any() and track.found[-10:].all()


def test_after_a_cut_the_person_who_was_followed_most_is_preferred(tmp_path, face, other, detect):
    grey = np.full_like(face, 128)
    alone = two_who_differ(40, (), face, grey)
    cutaway = [frame[:, ::-1] // 2 for frame in two_who_differ(20, (), other, grey)]
    both = [255 - np.full_like(frame, 100) if (k < 1) else frame
            for k, frame in enumerate(two_who_differ(30, (), other, face))]
    write_clip(tmp_path / "a.mp4", alone + cutaway + both, np.arange(90) * 512, sound=False)
    track = tracking.track_video(tmp_path / "a.mp4", detect, recognition=tell_apart())
    assert (side(track)[62:] == 1).all()


def test_after_a_cut_a_face_is_chosen_at_once(tmp_path, face, detect):
    left = [f.copy() for f in two_people(face, 20)]
    for frame in left:
        frame[:, 240:] = 128
    right = [255 - np.full_like(f, 128) // 2 for f in left]
    for frame in right:
        frame[:180, 270:490] = face[20:, 10:230]
    write_clip(tmp_path / "cut.mp4", left + right, np.arange(40) * 512, sound=False)
    track = tracking.track_video(tmp_path / "cut.mp4", detect)
    assert track.found.all() and side(track).tolist() == [0] * 20 + [1] * 20
    assert np.flatnonzero(track.cuts).tolist() == [20]


def test_a_cut_is_kept_with_the_first_face_behind_it(tmp_path, face, detect):
    """Black, the face, a title without one, the face a little larger as vloggers cut it, and a flash."""
    title = np.random.default_rng(0).integers(0, 255, (160, 200, 3), np.uint8)
    before = [face[20 + k % 3:180 + k % 3, 20:220] for k in range(30)]
    larger = [np.asarray(Image.fromarray(f).resize((200, 160), box=(10, 8, 190, 152))) for f in before]
    larger[20] = np.full_like(title, 255)
    frames = [np.zeros_like(title)] * 5 + before[:20] + [title] * 5 + larger
    write_clip(tmp_path / "a.mp4", frames, np.arange(60) * 512, sound=False)
    track = tracking.track_video(tmp_path / "a.mp4", detect)
    assert (~track.found).sum() == 11 and np.flatnonzero(track.cuts).tolist() == [30, 51]
    assert (track.shots() == np.repeat([0, 1], 30)).all()       # a flash is none
    tracking.save_track(tmp_path / "t.npz", track)
    assert (tracking.load_track(tmp_path / "t.npz").cuts == track.cuts).all()
    tracking.save_track(tmp_path / "t.npz", track._replace(cuts=~track.found))
    with pytest.raises(UserError, match="is not a landmark track"):
        tracking.load_track(tmp_path / "t.npz")


def test_a_video_that_lies_on_its_side_is_turned(tmp_path, face, detect):
    said = []
    write_clip(tmp_path / "a.mp4", [np.rot90(f) for f in moving(face, 20)], np.arange(20) * 512, sound=False)
    track = tracking.track_video(tmp_path / "a.mp4", detect, complain=said.append)
    assert track.found.all() and track.turns == 3 and "lies on its side" in said[0]
    assert len(list(folders.faces_in(tmp_path / "a.mp4", detect, 64, complain=said.append))) == 20
    tracking.save_track(tmp_path / "t.npz", track)
    assert np.array_equal(tracking.load_track(tmp_path / "t.npz").points, track.points)


def test_a_faceless_intro_is_not_looked_at_with_large_copies(tmp_path, face, detect):
    intro = [np.random.default_rng(0).integers(0, 255, (160, 200, 3), np.uint8)] * 50
    write_clip(tmp_path / "a.mp4", intro + moving(face, 10), np.arange(60) * 512, sound=False)
    looked = []

    class Counting(faces.DlibDetector):
        def faces_at(self, image, side):
            looked.append(side)
            return super().faces_at(image, side)
    track = tracking.track_video(tmp_path / "a.mp4", Counting())
    # from the first frame with a face on
    assert track.found.tolist() == [False] * 50 + [True] * 10
    assert looked.count(1024) <= 5


# ------------------------------------------------------------------------------------ what is written

@pytest.mark.parametrize("rate,nearest", [(22255, 22050), (11127, 11025), (37800, 32000),
                                          (192000, 96000), (7000, 7350)])
def test_rates_that_aac_does_not_know(tmp_path, rate, nearest):
    write_sound(tmp_path / "a.mov", "pcm_s16le", rate=rate, frames=25)
    assert sound.usable_sound(tmp_path / "a.mov")
    encode.write_video(tmp_path / "out.mp4", black(25), np.arange(25), (1, 25), tmp_path / "a.mov")
    with av.open(str(tmp_path / "out.mp4")) as container:
        audio = container.streams.audio[0]
        assert audio.codec_context.name == "aac" and audio.rate == nearest
        assert sum(f.samples for f in container.decode(audio)) / nearest == pytest.approx(1, abs=0.15)


def test_sound_that_begins_late_is_kept(tmp_path, capsys):
    write_sound(tmp_path / "a.mp4", "aac", frames=50)
    remux(tmp_path / "a.mp4", tmp_path / "late.mp4", offset=3, kinds=["audio"])
    assert sound.usable_sound(tmp_path / "late.mp4") and not capsys.readouterr().err
    encode.write_video(tmp_path / "out.mp4", black(150), np.arange(150), (1, 25), tmp_path / "late.mp4")
    with av.open(str(tmp_path / "out.mp4")) as container:
        first = next(p for p in container.demux(audio=0) if p.size)
        assert float(first.pts * first.time_base) == pytest.approx(3, abs=0.1)


def test_mp3_that_mp4_does_not_know_is_encoded_anew(tmp_path):
    write_sound(tmp_path / "a.mkv", "libmp3lame", rate=11025, frames=25)
    assert sound.usable_sound(tmp_path / "a.mkv")
    encode.write_video(tmp_path / "out.mp4", black(25), np.arange(25), (1, 25), tmp_path / "a.mkv")
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.streams.audio[0].codec_context.name == "aac"


def test_sound_that_cannot_be_made_is_told_before_the_work(tmp_path, capsys, monkeypatch):
    write_sound(tmp_path / "a.avi", "pcm_s16le", frames=5)

    def fail(*_):
        raise av.ArgumentError(22, "no such layout")
    monkeypatch.setattr(sound, "add_aac", fail)
    assert sound.usable_sound(tmp_path / "a.avi") is None
    assert "the result will have none" in capsys.readouterr().err
    encode.write_video(tmp_path / "out.mp4", black(5), np.arange(5), (1, 25), None)
    assert len(list(decode.read_video(tmp_path / "out.mp4"))) == 5


def test_the_default_sound_is_taken(tmp_path):
    with av.open(str(tmp_path / "two.mkv"), "w") as out:
        picture = out.add_stream("libx264", rate=25)
        picture.height, picture.width, picture.pix_fmt = 32, 32, "yuv420p"
        tracks = [out.add_stream("aac", rate=16000, layout="mono") for _ in range(2)]
        tracks[0].disposition = Disposition.comment
        tracks[1].disposition = Disposition.default
        for frame in black(25):
            out.mux(picture.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(picture.encode())
        for pitch, stream in zip((0.1, 0.4), tracks):
            tone = (np.sin(np.arange(16000) * pitch) * 8000).astype(np.int16)[None]
            note = av.AudioFrame.from_ndarray(tone, format="s16", layout="mono")
            note.rate, note.pts = 16000, 0
            out.mux(stream.encode(note))
            out.mux(stream.encode())
    encode.write_video(tmp_path / "out.mp4", black(25), np.arange(25), (1, 25), tmp_path / "two.mkv")
    with av.open(str(tmp_path / "out.mp4")) as container:
        heard = np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)])
    crossings = (np.diff(np.sign(heard[4000:12000])) != 0).mean()
    assert crossings == pytest.approx(0.4 / np.pi, rel=0.05)    # the tone of the default track


@pytest.mark.parametrize("name,codec", [("late.ts", "aac"), ("late.mkv", "pcm_s16le"),
                                        ("late.mov", "pcm_s16le")])
def test_the_result_starts_at_0_with_its_sound_in_step(tmp_path, name, codec):
    """A clock that starts at ten hours; the sound has a click at 1 s."""
    with av.open(str(tmp_path / name), "w") as out:
        picture, audio = out.add_stream("libx264", rate=25), out.add_stream(codec, rate=16000, layout="mono")
        picture.height, picture.width, picture.pix_fmt = 32, 32, "yuv420p"
        for k in range(50):
            pixels = np.full((32, 32, 3), 255 * (k >= 25), np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = 36000 * 25 + k, Fraction(1, 25)
            out.mux(picture.encode(frame))
            samples = np.zeros((1, 640), np.int16)
            samples[:] = 0 if k < 25 else np.arange(640) % 20 * 1000 - 10000
            note = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            note.rate, note.pts, note.time_base = 16000, 36000 * 16000 + 640 * k, Fraction(1, 16000)
            out.mux(audio.encode(note))
        out.mux(picture.encode())
        out.mux(audio.encode())
    frames = list(decode.read_video(tmp_path / name))
    pts = np.array([f.pts for f in frames])
    time_base = frames[0].time_base.as_integer_ratio()
    pictures = [np.ascontiguousarray(decode.to_rgb(f)) for f in frames]
    encode.write_video(tmp_path / "out.mp4", pictures, pts, time_base, tmp_path / name)
    back = list(decode.read_video(tmp_path / "out.mp4"))
    assert back[0].pts == 0 and float(back[-1].pts * back[-1].time_base) == pytest.approx(49 / 25, abs=0.01)
    white = next(float(f.pts * f.time_base) for f in back if decode.to_rgb(f).mean() > 128)
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.duration / av.time_base < 2.2
        loud = next(float(f.pts * f.time_base) + np.argmax(np.abs(f.to_ndarray()[0]) > 0.05) / f.sample_rate
                    for f in container.decode(audio=0) if np.abs(f.to_ndarray()[0]).max() > 0.05)
    assert white == pytest.approx(1, abs=0.01) and loud == pytest.approx(1, abs=0.03)
