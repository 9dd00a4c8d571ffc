"""encode.py, sound.py and audio.py: writing a video with the sound of another file."""
from fractions import Fraction

import av
import numpy as np
import pytest
from av.stream import Disposition

from conftest import remux
from media import decode, encode, sound


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
    """-> n black frames."""
    return [np.zeros((32, 32, 3), np.uint8)] * n


def write_sound(path, codec, rate=48000, frames=50):
    """Write a black video with 25 frames a second, and noise as its sound."""
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


def test_channels_that_change_are_heard_to_the_end(tmp_path):
    """A second in mono and one in stereo, as television switches them."""
    for name, layout, channels in (("mono.mp2", "mono", 1), ("stereo.mp2", "stereo", 2)):
        with av.open(str(tmp_path / name), "w") as out:
            stream = out.add_stream("mp2", rate=48000, layout=layout)
            tone = np.sin(np.arange(48000) / 20).astype(np.float32)[None]
            tones = np.repeat(tone, channels, axis=0)
            frame = av.AudioFrame.from_ndarray(tones, format="fltp", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = 48000, 0, Fraction(1, 48000)
            out.mux(stream.encode(frame))
            out.mux(stream.encode())
    parts = [(tmp_path / name).read_bytes() for name in ("mono.mp2", "stereo.mp2")]
    (tmp_path / "a.mp2").write_bytes(b"".join(parts))
    encode.write_video(tmp_path / "out.mp4", black(50), np.arange(50), (1, 25), tmp_path / "a.mp2")
    with av.open(str(tmp_path / "out.mp4")) as container:
        heard = np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)])
    assert len(heard) / 48000 == pytest.approx(2, abs=0.1)
    assert np.abs(heard[-24000:-9600]).mean() > 0.3


def test_sound_that_mp4_cannot_hold_is_encoded_again(tmp_path):
    write_sound(tmp_path / "a.avi", "pcm_s16le", rate=16000, frames=25)
    encode.write_video(tmp_path / "out.mp4", black(25), np.arange(25), (1, 25), tmp_path / "a.avi")
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.streams.audio[0].codec_context.name == "aac"
        assert sum(f.samples for f in container.decode(audio=0)) == pytest.approx(16000, abs=2048)


def test_damaged_sound_affects_neither_the_video_nor_the_sound_after_it(tmp_path, capsys):
    write_sound(tmp_path / "some.avi", "mp2")
    write_sound(tmp_path / "all.ts", "aac")
    some, rest = (tmp_path / "some.avi").read_bytes(), bytearray((tmp_path / "all.ts").read_bytes())
    with av.open(str(tmp_path / "some.avi")) as container:
        for packet in [p for p in container.demux(audio=0) if p.size][10:40]:
            some = some.replace(bytes(packet), b"\x55" * packet.size)
    (tmp_path / "some.avi").write_bytes(some)
    with av.open(str(tmp_path / "all.ts")) as container:
        number = container.streams.audio[0].id
    for k in range(0, len(rest), 188):      # the packets of a transport stream, without its tables
        if (rest[k + 1] & 31) << 8 | rest[k + 2] == number:
            rest[k + 30:k + 188] = bytes(158)
    (tmp_path / "all.ts").write_bytes(rest)
    for name in ("some.avi", "all.ts"):
        encode.write_video(tmp_path / "out.mp4", black(50), np.arange(50), (1, 25), tmp_path / name)
        with av.open(str(tmp_path / "out.mp4")) as container:
            packets = [p for p in container.demux() if p.size]
            assert sum(p.stream.type == "video" for p in packets) == 50
            heard = [float(p.pts * p.time_base) for p in packets if p.stream.type == "audio"]
        if name == "some.avi":              # there is a hole, and the sound after it is in time
            assert max(heard) > 1.9 and max(np.diff(heard)) > 0.5
        else:
            assert not heard and "its sound cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("rate,nearest", [(22255, 22050), (11127, 11025), (37800, 32000),
                                          (192000, 96000), (7000, 7350)])
def test_rates_that_aac_does_not_support(tmp_path, rate, nearest):
    write_sound(tmp_path / "a.mov", "pcm_s16le", rate=rate, frames=25)
    assert sound.usable_sound(tmp_path / "a.mov")
    encode.write_video(tmp_path / "out.mp4", black(25), np.arange(25), (1, 25), tmp_path / "a.mov")
    with av.open(str(tmp_path / "out.mp4")) as container:
        audio = container.streams.audio[0]
        assert audio.codec_context.name == "aac" and audio.rate == nearest
        assert sum(f.samples for f in container.decode(audio)) / nearest == pytest.approx(1, abs=0.15)


def test_sound_that_begins_after_the_video_is_kept(tmp_path, capsys):
    write_sound(tmp_path / "a.mp4", "aac", frames=50)
    remux(tmp_path / "a.mp4", tmp_path / "late.mp4", offset=3, kinds=["audio"])
    assert sound.usable_sound(tmp_path / "late.mp4") and not capsys.readouterr().err
    encode.write_video(tmp_path / "out.mp4", black(150), np.arange(150), (1, 25), tmp_path / "late.mp4")
    with av.open(str(tmp_path / "out.mp4")) as container:
        first = next(p for p in container.demux(audio=0) if p.size)
        assert float(first.pts * first.time_base) == pytest.approx(3, abs=0.1)


def test_mp3_with_a_rate_that_mp4_does_not_support_is_encoded_again(tmp_path):
    write_sound(tmp_path / "a.mkv", "libmp3lame", rate=11025, frames=25)
    assert sound.usable_sound(tmp_path / "a.mkv")
    encode.write_video(tmp_path / "out.mp4", black(25), np.arange(25), (1, 25), tmp_path / "a.mkv")
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.streams.audio[0].codec_context.name == "aac"


def test_sound_that_cannot_be_written_is_reported_before_the_work(tmp_path, capsys, monkeypatch):
    write_sound(tmp_path / "a.avi", "pcm_s16le", frames=5)

    def fail(*_):
        raise av.ArgumentError(22, "no such layout")
    monkeypatch.setattr(sound, "add_aac", fail)
    assert sound.usable_sound(tmp_path / "a.avi") is None
    assert "the result will have none" in capsys.readouterr().err
    encode.write_video(tmp_path / "out.mp4", black(5), np.arange(5), (1, 25), None)
    assert len(list(decode.read_video(tmp_path / "out.mp4"))) == 5


def test_the_default_stream_is_used(tmp_path):
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
def test_the_result_starts_at_0_with_its_sound_in_sync(tmp_path, name, codec):
    """The times of the source start at ten hours. At 1 s the picture becomes white and a sound begins."""
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


# ----------------------------------------------------------------------------- many channels and streams

def write_sounds(path, codec, tracks, rate=16000, layout="stereo"):
    """Write two seconds of black frames with these tracks: a function of time per channel."""
    with av.open(str(path), "w") as out:
        video = out.add_stream("mpeg4", rate=25)
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        streams = [out.add_stream(codec, rate=rate, layout=layout) for _ in tracks]
        for k in range(50):
            out.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
            t = np.arange(rate // 25 * k, rate // 25 * (k + 1)) / rate
            for stream, channels in zip(streams, tracks):
                samples = np.stack([channel(t) for channel in channels], axis=1).astype(np.float32)
                frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="flt", layout=layout)
                frame.sample_rate, frame.pts, frame.time_base = rate, rate // 25 * k, Fraction(1, rate)
                out.mux(stream.encode(frame))
        for stream in (video, *streams):
            out.mux(stream.encode())


def tone(pitch, loudness=0.5):
    """-> a function of time: a sine of `pitch` Hz."""
    return lambda t: loudness * np.sin(2 * np.pi * pitch * t)


silence = np.zeros_like


def heard_in(path, rate=16000):
    """The amplitude of 400, 700 and 1000 Hz in the left and the right channel of a result: (2, 3)."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray() for frame in container.decode(audio=0)]
    middle = np.concatenate(frames, axis=1)[:, 8000:8000 + rate]        # one second
    return np.abs(np.fft.rfft(middle))[:, [400, 700, 1000]] * 2 / rate


def result_of(path):
    """Write a video with the sound of another one, as infer.py does -> its path."""
    out = path.with_name("out.mp4")
    usable = sound.usable_sound(path)
    encode.write_video(out, [np.zeros((32, 32, 3), np.uint8)] * 50, np.arange(50), (1, 25), usable)
    return out


LAYOUTS = {"6.1(back)": 125 << 16 | 7, "7.1": 128 << 16 | 8, "5.1": 122 << 16 | 6}  # MOV's layout tags


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("codec", ["pcm_s16le", "pcm_s24be", "pcm_f32le", "pcm_s32be", "pcm_u8"])
def test_pcm_with_many_channels_in_mov_is_heard(tmp_path, layout, codec):
    """FFmpeg has no name for the order of its channels, and PyAV would free their layout twice."""
    channels = [tone(400), tone(700), tone(1000), *[silence] * (int(layout[0]) - 2)]
    write_sounds(tmp_path / "a.mov", codec, [channels], layout=layout)
    blob = bytearray((tmp_path / "a.mov").read_bytes())
    at = blob.index(b"chan") + 8
    blob[at:at + 8] = LAYOUTS[layout].to_bytes(4, "big") + bytes(4)
    (tmp_path / "a.mov").write_bytes(blob)
    left, right = heard_in(result_of(tmp_path / "a.mov"))
    assert left[0] > 0.2 > 0.01 > left[1] and right[1] > 0.2 > 0.01 > right[0]
    assert left[2] == pytest.approx(0.7 * left[0], rel=0.05) and right[2] == pytest.approx(left[2], rel=0.05)


@pytest.mark.parametrize("codec", ["pcm_s16be", "pcm_u8", "pcm_mulaw"])
def test_stereo_pcm_in_mov_stays_as_it_is(tmp_path, codec):
    write_sounds(tmp_path / "a.mov", codec, [[tone(400), tone(700)]])
    left, right = heard_in(result_of(tmp_path / "a.mov"))
    assert left == pytest.approx([0.5, 0, 0], abs=0.03) and right == pytest.approx([0, 0.5, 0], abs=0.03)


def test_many_channels_of_another_codec_are_left_out(tmp_path, capsys):
    write_sounds(tmp_path / "a.mov", "pcm_mulaw", [[tone(400)] * 6], layout="5.1")
    with av.open(str(result_of(tmp_path / "a.mov"))) as container:
        assert not container.streams.audio
    line, = capsys.readouterr().err.splitlines()
    assert "its sound cannot be read" in line and "6 channels of pcm_mulaw" in line


@pytest.mark.parametrize("unused", [
    lambda t: 0.0005 * np.random.default_rng(0).standard_normal(t.shape),      # hiss of -66 dB
    lambda t: 0.8 * (abs(t - 1) < 0.005)])                                      # a click
def test_a_track_with_hiss_or_a_click_is_not_used(tmp_path, unused):
    write_sounds(tmp_path / "a.mkv", "pcm_s16le", [[unused, unused], [tone(700), tone(700)]], 16000)
    assert (heard_in(result_of(tmp_path / "a.mkv"))[:, 1] > 0.3).all()


@pytest.mark.parametrize("name,codec", [("a.mkv", "aac"), ("a.mp4", "aac"), ("a.mov", "pcm_s16le"),
                                        ("b.mkv", "libopus")])
def test_a_silent_track_is_not_used(tmp_path, name, codec):
    rate = 48000 if codec == "libopus" else 16000
    tracks = [[silence, silence], [tone(700), tone(700)], [tone(400), tone(400)]]
    write_sounds(tmp_path / name, codec, tracks, rate)
    spectrum = heard_in(result_of(tmp_path / name), rate)
    assert (spectrum[:, 1] > 0.3).all() and (spectrum[:, [0, 2]] < 0.05).all()
    write_sounds(tmp_path / name, codec, tracks[:1] * 2, rate)          # all tracks may be silent
    assert (heard_in(result_of(tmp_path / name), rate) < 0.001).all()
