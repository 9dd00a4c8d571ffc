"""streams.py and sound.py: recordings that were joined by appending files to each other."""
from fractions import Fraction

import av
import numpy as np
import pytest

from media import decode, encode, streams


def write_part(path, spoken, codec="aac", rate=48000):
    """Write two seconds that begin with a flash and a beep of a tenth of a second -> bytes.

    spoken: the length of the sound in seconds; 0 for none.
    """
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        sounds = []
        if spoken:
            audio = out.add_stream(codec, rate=rate, layout="mono")
            at = np.arange(round(spoken * rate))
            beep = np.sin(at * 9600 / rate) * (at < rate / 10) / 2
            note = av.AudioFrame.from_ndarray(beep.astype(np.float32)[None], format="fltp", layout="mono")
            note.sample_rate, note.pts, note.time_base = rate, 0, Fraction(1, rate)
            sounds = audio.encode(note) + audio.encode()
        for k in range(50):
            frame = np.full((64, 64, 3), 255 * (k == 0), np.uint8)
            out.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(video.encode())
        out.mux(sounds)
    return path.read_bytes()


@pytest.mark.parametrize("codec,rate,lengths", [
    ("aac", 48000, (1.6,) * 3), ("aac", 48000, (2.3,) * 3), ("aac", 16000, (2,) * 4),
    ("mp2", 48000, (2.3,) * 3),                             # it is encoded again
    ("aac", 48000, (2, 0, 2)), ("aac", 48000, (2, 0, 0, 2)), ("aac", 48000, (2, 2, 0)),
    ("aac", 48000, (0, 2)), ("mp2", 48000, (0, 0, 2)), ("aac", 48000, (0, 2, 0, 2))])
def test_sound_and_picture_of_joined_files_stay_in_step(tmp_path, codec, rate, lengths):
    parts = [write_part(tmp_path / "part.ts", spoken, codec, rate) for spoken in lengths]
    (tmp_path / "joined.ts").write_bytes(b"".join(parts))
    frames = list(decode.read_video(tmp_path / "joined.ts"))
    pts, base = np.array([frame.pts for frame in frames]), frames[0].time_base
    pictures = [decode.to_rgb(frame) for frame in frames]
    encode.write_video(tmp_path / "out.mp4", pictures, pts, base.as_integer_ratio(), tmp_path / "joined.ts")

    flashes = [float(f.pts * f.time_base) for f in decode.read_video(tmp_path / "out.mp4")
               if decode.to_rgb(f).mean() > 128]
    with av.open(str(tmp_path / "out.mp4")) as container:
        loud = np.concatenate([f.time + np.flatnonzero(abs(f.to_ndarray()[0]) > 0.1) / f.sample_rate
                               for f in container.decode(audio=0)])
    beeps = loud[np.diff(loud, prepend=-1) > 1]
    assert len(flashes) == len(lengths)
    assert beeps == pytest.approx([flash for flash, spoken in zip(flashes, lengths) if spoken], abs=0.06)


def test_sound_that_does_not_start_again_at_a_joint_goes_on():
    clock = streams.JoinedClock(Fraction(1, 10), [streams.Joint(begins=2.0, shift=2.0)])
    times = [clock.increasing(k) for k in range(100)]
    assert times == [*range(20), *[None] * 50, *range(70, 100)]


def test_after_sound_that_is_far_too_long_the_rest_is_in_step():
    """The first of five parts of 2 seconds has 9 seconds of sound. The end of the fifth is heard."""
    joints = [streams.Joint(begins=k, shift=k) for k in (2.0, 4.0, 6.0, 8.0)]
    clock = streams.JoinedClock(Fraction(1, 10), joints)
    times = [[clock.increasing(k) for k in range(n)] for n in (90, 20, 20, 20, 20)]
    assert times[-1] == [*[None] * 10, *range(90, 100)]
