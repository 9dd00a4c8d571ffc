"""media.py, video.py, sound.py: what is read of a video, who is followed in it, what is written."""
from fractions import Fraction

import av
import numpy as np
import pytest

import media
import video
from conftest import write_clip
from files import UserError


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
