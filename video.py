"""Videos: reading frames, following a face, writing mp4 with the driver's sound.

    track = track_video("v.mp4", landmark_detector("dlib"), "dlib")     # the landmarks of every frame
    write_video("result.mp4", frames, track.pts, track.time_base, sound_from="v.mp4")
"""
import os
from array import array
from fractions import Fraction
from itertools import chain
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from faces import steady_boxes, to_crop
from files import UserError, atomic, warn

# ---------------------------------------------------------------------------------------------- reading

def read_video(path, complain=warn):
    """Yield every frame of a video as an av.VideoFrame, with pts (rising) and time_base, streaming.

    UserError if there is no frame to be had; what ends early is used as far as it goes, and `complain` is told.
    """
    import av
    last, offset, count, problem = None, 0, 0, "it ends early"
    try:
        with av.open(os.fspath(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path} has no video in it")
            stream = container.streams.video[0]
            base, rate = stream.time_base, stream.average_rate or 25
            expected = stream.frames or float((container.duration or 0) / av.time_base * rate)
            for frame in container.decode(stream):
                pts = frame.pts if frame.pts is None else frame.pts + offset
                if pts is None or (last is not None and pts <= last):  # every frame needs a time of its own
                    following = 0 if last is None else last + max(1, round(1 / (rate * base)))
                    if pts is not None and (last - pts) * base > 1:    # the clock started anew: it goes on from here
                        offset += following - pts
                    pts = following
                frame.pts, frame.time_base = pts, base
                last, count = pts, count + 1
                yield frame
    except (av.FFmpegError, OSError) as e:
        problem = e.strerror or str(e)
        if not count:
            raise UserError(f"no file {path}" if not os.path.exists(path) else f"{path} is not a video that can be read ({problem})") from None
    if not count:
        raise UserError(f"{path} is a video without a frame that can be read")
    if count < 0.95 * expected - 1 or problem != "it ends early":  # containers' own counts are a little off at times
        complain(f"{path}: only {count} of about {expected:.0f} frames could be read ({problem})")


def count_frames(path):
    """How many frames a video has, without decoding it; 0 if it cannot be read."""
    import av
    try:
        with av.open(os.fspath(path)) as container:
            return sum(packet.size > 0 for packet in container.demux(video=0))
    except (av.FFmpegError, OSError, IndexError):
        return 0


def to_rgb(frame):
    """av.VideoFrame -> uint8 (H, W, 3), upright: phones store the rotation beside the pixels."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))


class Track(NamedTuple):
    """The landmarks of a video, in pixels of its upright frames; times are pts * time_base[0] / time_base[1] seconds."""
    points: np.ndarray      # (n, 68, 2) float32; a frame without a face repeats the face before it, or the first one
    found: np.ndarray       # (n,) bool
    pts: np.ndarray         # (n,) int64
    time_base: np.ndarray   # (2,) int64
    detector: str           # fan | dlib

    def seconds(self):
        return self.pts * (self.time_base[0] / self.time_base[1])

    def in_crops(self, size):
        """The landmarks in the pixels of a steady size x size crop, (n, 68, 2)."""
        return to_crop(self.points, steady_boxes(self.points, self.seconds()), size)


def track_video(path, detect, detector, keep=lambda k: True, progress=False, complain=warn):
    """Landmarks of those frames k of a video for which keep(k). UserError if no face is in any of them."""
    points, found, pts, frames = array("f"), array("b"), array("q"), read_video(path, complain)  # an object a frame would fragment memory
    frames = chain([next(frames)], frames)  # what cannot be read is refused before a progress bar is drawn
    for k, frame in enumerate(tqdm(frames, "landmarks", unit=" frames", disable=not progress)):
        if keep(k):
            face = detect(to_rgb(frame))
            found.append(face is not None)
            points.frombytes(np.zeros((68, 2), np.float32).tobytes() if face is None else face.tobytes())
            pts.append(frame.pts)
    found, points = np.array(found, bool), np.frombuffer(points, np.float32).reshape(-1, 68, 2)
    if not found.any():
        raise UserError(f"no face found in any of the {len(points)} frames of {path}")
    before = np.maximum.accumulate(np.where(found, np.arange(len(points)), np.argmax(found)))
    base = frame.time_base
    return Track(points[before], found, np.array(pts, np.int64),
                 np.array([base.numerator, base.denominator], np.int64), detector)


def save_track(path, track):
    """Write a track as .npz, by way of a temporary name."""
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **track._asdict())


def load_track(path):
    try:
        with np.load(path, allow_pickle=False) as file:
            track = Track(*(file[name] for name in Track._fields))
        n = len(track.pts)
        shapes = [track.points.shape, track.found.shape, track.pts.shape, track.time_base.shape]
        if (n == 0 or shapes != [(n, 68, 2), (n,), (n,), (2,)] or not np.isfinite(track.points).all()
                or (track.time_base < 1).any() or (np.diff(track.pts) < 1).any()):
            raise ValueError("its arrays are not those of a track")
        return track._replace(detector=str(track.detector))
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except Exception as e:  # numpy and zipfile raise many types on foreign or damaged files
        raise UserError(f"{path} is not a landmark track ({e})") from None


# ---------------------------------------------------------------------------------------------- writing

def write_video(path, frames, pts, time_base, sound_from=None):
    """Write H.264 (yuv420p, mp4) that browsers play, by way of a temporary name.

    frames: an iterable of uint8 (H, W, 3), H and W even.  pts (n,): a time stamp a frame, in units of
    time_base = (numerator, denominator) seconds.  sound_from: a media file whose sound is copied packet by packet,
    or encoded anew as AAC where mp4 cannot hold its codec.
    """
    import av
    base = Fraction(*map(int, time_base))
    shift = -min(0, int(pts[0])) * base     # mp4 hides what comes before 0
    pts = pts - min(0, pts[0])
    rate = Fraction(1 / float(np.median(np.diff(pts)) * base)).limit_denominator(1001) if len(pts) > 1 else 25
    options = {"movflags": "faststart", "video_track_timescale": str(base.denominator)}
    with atomic(path) as temporary:
        try:
            with av.open(temporary, "w", format="mp4", options=options) as out:
                stream = out.add_stream("libx264", rate=rate, options={"crf": "16"})
                sound = _sound(sound_from, out, shift) if sound_from else iter(())
                packet = None
                for frame, stamp in zip(frames, pts, strict=True):
                    if packet is None:  # size and format must be set before the first mux
                        stream.height, stream.width, stream.pix_fmt = *frame.shape[:2], "yuv420p"
                        stream.codec_context.time_base = base
                        packet = next(sound, False)
                    picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
                    picture.pts, picture.time_base = int(stamp), base
                    while packet and (packet.pts or 0) * packet.time_base <= stamp * base:  # interleaved: memory stays flat
                        out.mux(packet)
                        packet = next(sound, False)
                    out.mux(stream.encode(picture))
                out.mux(stream.encode())
                while packet:
                    out.mux(packet)
                    packet = next(sound, False)
        except av.FFmpegError as e:
            raise OSError(e.errno, e.strerror or str(e)) from None


def _sound(path, out, shift):
    """Add an audio stream to `out` and return an iterator over its packets, `shift` seconds later; without sound, an empty one."""
    import av
    source = av.open(os.fspath(path))
    if not source.streams.audio:
        return iter(())
    audio = source.streams.audio[0]
    if audio.codec_context is None or not audio.rate:
        warn(f"{path}: its sound cannot be read, and is left out")
        return iter(())
    copy = audio.codec_context.name in {"aac", "mp3", "mp3float", "opus", "libopus", "flac"}  # what browsers play in mp4
    stream = out.add_stream_from_template(audio) if copy else out.add_stream("aac", rate=audio.rate)

    def decoded(packet):
        try:
            return packet.decode()
        except av.InvalidDataError:
            return []       # a damaged packet: a gap of some milliseconds

    def packets():
        with source:
            try:
                for packet in source.demux(audio):
                    if not copy:
                        for frame in decoded(packet):
                            yield from stream.encode(frame)
                    elif packet.dts is not None:  # the last one is empty, for flushing
                        packet.pts, packet.dts = packet.pts + round(shift / packet.time_base), packet.dts + round(shift / packet.time_base)
                        packet.stream = stream
                        yield packet
                if not copy:
                    yield from stream.encode()
            except av.FFmpegError as e:
                warn(f"the sound of {path} ends early ({e.strerror or e})")

    return packets()
