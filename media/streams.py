"""Reading a media file as a player does: the right stream, past damage, with times that always increase.

    with open_media("v.mp4") as container:
        stream, damage = main_video(container), Damage()
        for frame in shown(container, stream, damage):
            ...
"""
import os
from itertools import chain
from typing import NamedTuple

OVERRUN = 5     # seconds, at most, of sound that are dropped because the next part's picture has begun
RESTART = 1     # times that go back by more than this many seconds start again
TRIES = 10      # packets() gives up after this many errors in a row, as mpv does
# Codecs in which each packet gives a frame, and whose decoders drop damaged frames without an error.
ONE_EACH = {"h264", "hevc"}


def open_media(path, mode="r", **options):
    """av.open(), but `path` is always taken as a file, even if it looks like a URL, such as "12:30.mp4".

    Metadata that is not UTF-8 does not raise an error.
    """
    import av
    return av.open("file:" + os.fspath(path), mode, metadata_errors="replace", **options)


def main_video(container):
    """The video stream that a player would show, or None if there is none. Cover pictures are not videos."""
    from av.stream import Disposition
    no_video = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.dependent

    def merit(stream):
        moves = stream.frames != 1
        default = bool(stream.disposition & Disposition.default)
        return moves, default, stream.width * stream.height

    readable = [s for s in container.streams.video if s.codec_context is not None]
    streams = [s for s in readable if not s.disposition & no_video]
    return max(streams, key=merit, default=None)


# ------------------------------------------------------------------------------------------ past damage

class Damage:
    """Counts what could not be read in a stream."""

    def __init__(self):
        self.packets = 0    # the number of damaged packets
        self.due = 0        # the number of frames that the packets should give, or 0 if that is unknown
        self.times = []     # the times of what is damaged since the latest key frame
        self.spoilt = set() # the times of frames that shown() yielded but that refer to damaged ones
        self.end = None     # the reason, in words, if reading stopped before the end of the file


def packets(container, stream, damage):
    """Yield the packets of a stream, without empty ones.

    container.demux() ends at the first error. This function then starts it again after the damage.
    """
    import av
    tries = 0
    while True:
        try:
            for packet in container.demux(stream):
                if tries and packet.pts is not None:
                    damage.times.append(packet.pts)
                tries = 0
                if packet.size:     # an empty packet would end the decoding
                    yield packet
            return
        except (av.FFmpegError, OSError) as e:
            tries += 1
            if tries == TRIES or not isinstance(e, av.InvalidDataError):
                damage.end = e.strerror or str(e)
                return
            damage.packets += 1


def decoded(container, stream, damage):
    """Yield the frames of a stream. Unlike container.decode(), it continues after a damaged packet."""
    import av
    counts = stream.codec_context.name in ONE_EACH
    for packet in chain(packets(container, stream, damage), [None]):    # None flushes the decoder
        if counts and packet and not packet.is_discard:
            damage.due += bool(damage.due or packet.is_keyframe)    # none can be decoded before a key frame
        try:
            frames = decode(stream, packet)
        except av.FFmpegError:
            damage.packets += 1
            if packet and packet.pts is not None:
                damage.times.append(packet.pts)
            continue
        for frame in frames:
            counts = counts and not frame.interlaced_frame      # two packets can give one interlaced frame
            yield frame
    if not counts:
        damage.due = 0


def decode(stream, packet):
    """-> the frames that a packet completes. Raises av.FFmpegError if it is damaged."""
    try:
        return stream.decode(packet)
    except BlockingIOError:
        # A part of a damaged packet is still in the decoder, which would refuse all later packets (VP9).
        stream.codec_context.flush_buffers()
        return stream.decode(packet)


# ------------------------------------------------------------------------------------- increasing times

def in_order(frames, damage, base):
    """Yield the frames in order of time.

    Decoders mix up the order after a damaged packet, and a damaged file can give a frame a time that is more
    than a second too late. One frame is held back, and frames that come after it but have earlier times are
    yielded before it.
    base: the unit of the times, in seconds.
    """
    held, overtaken, last = None, False, None       # last: the time of the last frame that was yielded
    for frame in frames:
        if frame.pts is None:       # a raw stream has no times
            yield frame
            continue
        early = held is not None and frame.pts < held.pts and (last is None or frame.pts > last)
        if early and (damage.packets or overtaken or (held.pts - frame.pts) * base > 1):
            overtaken, last = True, frame.pts
            yield frame
        elif damage.packets and last is not None and 0 <= (last - frame.pts) * base < 1:
            continue                # it is too late for this frame
        else:
            if held is not None:
                last = held.pts
                yield held
            held, overtaken = frame, False
    if held is not None and not overtaken:      # if it was overtaken until the end, its time is wrong
        yield held


def shown(container, stream, damage):
    """Yield the frames of a stream that a player would show, each with a later time than the one before.

    Frames after a damaged packet, up to the next key frame, are predicted from pictures that were lost: their
    times are added to damage.spoilt.
    """
    clock = picture_clock(stream)
    for frame in in_order(decoded(container, stream, damage), damage, stream.time_base):
        stored = frame.pts
        frame.pts, frame.time_base = clock.increasing(frame.pts), stream.time_base
        if stored is not None:
            if frame.key_frame:
                damage.times = [time for time in damage.times if time > stored]
            if frame.is_corrupt:
                damage.times.append(stored)
            if any(time <= stored for time in damage.times):
                damage.spoilt.add(frame.pts)
        yield frame


def picture_clock(stream):
    return Clock(stream.time_base, round(1 / ((stream.average_rate or 25) * stream.time_base)))


class Clock:
    """Makes times increase. Raw streams have no times, and in files that were joined they start again."""

    def __init__(self, base, step):
        self.base = base                # the unit of the times, in seconds
        self.step = max(1, step)        # the usual difference of two times, in units of base
        self.last, self.offset = None, 0

    def increasing(self, time):
        """A time in units of base, or None if there is none -> a time that is later than the one before."""
        if time is not None:
            time += self.offset
        if time is None or (self.last is not None and time <= self.last):
            following = 0 if self.last is None else self.last + self.step
            if time is not None and (self.last - time) * self.base > RESTART:
                self.offset += following - time     # the times start again, so shift all that follow
            time = following
        self.last = time
        return time


class JoinedClock:
    """Makes the times of a joined recording's sound increase, in step with its picture."""

    def __init__(self, base, joints):
        self.base = base                # the unit of the times, in seconds
        self.joints = list(joints)      # from find_joints()
        self.stored, self.last, self.offset = None, None, 0     # stored: the time before this one, as it was
        if self.joints and self.joints[0].begins is None:
            self.offset = round(self.joints.pop(0).shift / base)

    def increasing(self, time):
        """A time in units of base -> a later time than the one before, or None for sound that is dropped.

        Sound is dropped if two parts overlap, or if it has no time.
        """
        if time is None:
            return None
        if self.joints and self.stored is not None and (self.stored - time) * self.base > RESTART:
            self.offset = round(self.joints.pop(0).shift / self.base)
        self.stored = time
        time += self.offset
        overrun = time * self.base - self.joints[0].begins if self.joints else -1
        if 0 <= overrun < OVERRUN or (self.last is not None and time <= self.last):
            return None
        self.last = time
        return time


class Joint(NamedTuple):
    """Where the sound of a recording that was joined from several files starts again. In seconds."""
    begins: float       # when the next part's picture begins; later sound of the part before is dropped;
                        # None at the sound's own beginning, if the parts before it have no sound
    shift: float        # how much later than its stored times the sound after the joint is heard


def find_joints(path, sound):
    """-> [Joint] of a recording that was joined from several files. sound: the index of its audio stream.

    The times of all streams start again at a joint. The sound has to follow the picture's clock there,
    because it may end before or after the picture of its part, and a part may have no sound.
    """
    with open_media(path) as container:
        stream = main_video(container)
        if stream is None or container.format.name not in ("mpegts", "mpeg"):   # only these can be appended
            return []
        clock, seen, last = picture_clock(stream), None, None   # seen, last: the latest times, as stored
        parts, restarts = [], []    # of the picture: (place in the file, begins, shift); of the sound: place
        part = 0                    # how many joints of the picture are before the sound's current part
        both = [stream, container.streams[sound]]
        for packet in packets(container, both, Damage()):
            if packet.dts is None:
                continue
            if packet.stream is both[1]:
                if last is None:
                    behind = 0 if seen is None else (seen - packet.dts) * packet.time_base
                    part = len(parts) + (behind > RESTART)  # a part's sound may come before its picture
                elif (last - packet.dts) * packet.time_base > RESTART:
                    restarts.append(packet.pos or 0)
                last = packet.dts
                continue
            before, time, seen = clock.offset, clock.increasing(packet.dts), packet.dts
            if clock.offset != before:
                delay = (packet.pts or packet.dts) - packet.dts     # from decoding to showing a frame
                parts.append((packet.pos or 0, (time + delay) * clock.base, clock.offset * clock.base))
    part = min(part, len(parts))
    joints = [Joint(None, parts[part - 1][2])] if part else []
    for place in restarts if parts else ():
        number = min(range(len(parts)), key=lambda k: abs(parts[k][0] - place))
        joints.append(Joint(parts[min(part, number)][1], parts[number][2]))
        part = number + 1
    return joints


# ----------------------------------------------------------------------------------- the expected length

def promises(container, stream):
    """-> what a container says about a stream: the number of frames, the seconds, and the frames per second.

    The first two are 0 if it does not say.
    """
    if stream.duration:
        seconds = float(stream.duration * stream.time_base)
    else:
        seconds = (container.duration or 0) / 1e6
    return stream.frames, seconds, float(stream.average_rate or 25)


def expected_frames(stored, seconds, rate, count, lasted):
    """About how many frames a player should show according to the container; 0 if it does not say.

    stored, seconds, rate: the result of promises().  count, lasted: the number of frames that were read, and
    the seconds that they last, or 0. These give a better rate than the container, which may have guessed it
    from the first frames. There are two estimates: the stored number, and the duration times the rate. An
    edit list can hide stored frames or show them twice, so the smaller one is used.
    """
    by_time = seconds * (count / lasted if lasted else rate)
    return min(stored, by_time) if stored and by_time else stored or by_time
