"""Going through a media file as a player does: the stream that is meant, past damage, at times that rise.

    with open_media("v.mp4") as container:
        stream, damage = main_video(container), Damage()
        for frame in shown(container, stream, damage):
            ...
"""
import os
from itertools import chain

TRIES = 10      # to read on behind a place that cannot be read, as mpv does


def open_media(path, mode="r", **options):
    """av.open for what is only ever a path: "12:30.mp4" names no protocol, "http:x.mp4" no server.

    Its title may be in any alphabet.
    """
    import av
    return av.open("file:" + os.fspath(path), mode, metadata_errors="replace", **options)


def main_video(container):
    """The video stream that a player would show: no cover, and the best of several. None without one."""
    from av.stream import Disposition
    beside = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.dependent

    def merit(stream):
        moves = stream.frames != 1
        default = bool(stream.disposition & Disposition.default)
        return moves, default, stream.width * stream.height

    readable = [s for s in container.streams.video if s.codec_context is not None]
    streams = [s for s in readable if not s.disposition & beside]
    return max(streams, key=merit, default=None)


# ------------------------------------------------------------------------------------------ past damage

class Damage:
    """What of a stream could not be used."""

    def __init__(self):
        self.packets = 0    # how many are damaged
        self.end = None     # why reading ended before the file did, in words


def packets(container, stream, damage):
    """Yield the packets of a stream that hold something.

    container.demux() is dead after the first place that cannot be read: this goes on behind it.
    """
    import av
    tries = 0
    while True:
        try:
            for packet in container.demux(stream):
                tries = 0
                if packet.size:     # an empty one would end the decoding
                    yield packet
            return
        except (av.FFmpegError, OSError) as e:
            tries += 1
            if tries == TRIES or not isinstance(e, av.InvalidDataError):
                damage.end = e.strerror or str(e)
                return
            damage.packets += 1


def decoded(container, stream, damage):
    """Yield the frames of a stream. container.decode() is dead after the first damaged packet."""
    import av
    for packet in chain(packets(container, stream, damage), [None]):    # None: what the decoder has kept
        try:
            frames = stream.decode(packet)
        except av.FFmpegError:
            damage.packets += 1
            continue
        yield from frames


# ---------------------------------------------------------------------------------------- rising times

def in_order(frames, damage, base):
    """Frames as they come, but those behind damage by their times, because decoders mix them up there.

    The latest frame is held back: what comes after it and is earlier goes first. base: of times, in seconds.
    """
    held, passed, last = None, False, None      # last: the time of the frame that was yielded last
    for frame in frames:
        if frame.pts is None:       # a raw stream
            yield frame
            continue
        early = held is not None and frame.pts < held.pts and (last is None or frame.pts > last)
        if early and (damage.packets or passed or (held.pts - frame.pts) * base > 1):
            passed, last = True, frame.pts
            yield frame
        elif damage.packets and last is not None and 0 <= (last - frame.pts) * base < 1:
            continue                # its place is gone
        else:
            if held is not None:
                last = held.pts
                yield held
            held, passed = frame, False
    if held is not None and not passed:     # else its time was wrong
        yield held


def shown(container, stream, damage):
    """Yield the frames of a stream, each with a time of its own that is later than the one before."""
    clock = Clock(stream.time_base, round(1 / ((stream.average_rate or 25) * stream.time_base)))
    for frame in in_order(decoded(container, stream, damage), damage, stream.time_base):
        frame.pts, frame.time_base = clock.rising(frame.pts), stream.time_base
        yield frame


class Clock:
    """Times that rise: raw streams have none, joined files start theirs anew in the middle."""

    def __init__(self, base, step):
        self.base = base                # seconds
        self.step = max(1, step)        # from one time to the next, in units of base
        self.last, self.offset = None, 0

    def rising(self, time):
        """time or None, in units of base -> a time that is later than the one before."""
        if time is not None:
            time += self.offset
        if time is None or (self.last is not None and time <= self.last):
            following = 0 if self.last is None else self.last + self.step
            if time is not None and (self.last - time) * self.base > 1:
                # it started anew: it goes on from here
                self.offset += following - time
            time = following
        self.last = time
        return time


# ------------------------------------------------------------------------------------ what was promised

def promises(container, stream):
    """What a container says of its length: frames, seconds, 0 where it does not; and frames a second."""
    if stream.duration:
        seconds = float(stream.duration * stream.time_base)
    else:
        seconds = (container.duration or 0) / 1e6
    return stream.frames, seconds, float(stream.average_rate or 25)


def shown_frames(stored, seconds, rate, count, shown):
    """About how many frames a container promised to show, 0 if it did not say.

    stored, seconds, rate: of promises().  count, shown: the frames that came, and for how many seconds: they
    say more about the rate than the container does, which may have guessed it from the first frames.
    An edit list hides some of those that are stored, or shows them twice: the smaller number counts.
    """
    by_time = seconds * (count / shown if shown else rate)
    return min(stored, by_time) if stored and by_time else stored or by_time
