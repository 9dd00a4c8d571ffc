"""Writing a media file's sound into an mp4: copied, or re-encoded if browsers would not play it there.

    sound_from = usable_sound("v.mp4")  # the path; None, with a warning, if it has no usable sound
    with Sound(sound_from, out, start) as sound:    # out: an av container that is being written
        sound.write_until(seconds)
"""
import io
from fractions import Fraction
from itertools import chain

from media.audio import audio_frames, is_known, main_audio
from media.streams import Clock, Damage, JoinedClock, find_joints, open_media, packets
from runtime.files import warn

COPIED = {"aac", "mp3", "mp3float", "opus", "libopus", "flac"}  # the codecs that browsers play in an mp4
PREROLL = 0.1   # seconds of sound that are kept before the start, because decoders may need them


def usable_sound(path):
    """-> path if its sound can be written into an mp4, else None. Warns unless the file just has no sound."""
    import av
    problem = None
    try:
        if main_audio(path) is None:
            return None
        with open_media(path) as container:
            start = (container.start_time or 0) / av.time_base
        with av.open(io.BytesIO(), "w", format="mp4") as out, Sound(path, out, start) as sound:
            sound.write_until(1)
            if sound.packet and not sound.written:      # the sound begins later than that
                sound.write_until(sound.packet.pts * sound.packet.time_base)
            if not sound.written:
                problem, sound.problem = sound.problem or "its stream is empty", None
    except (av.FFmpegError, OSError, ValueError) as e:
        problem = e
    if problem:
        warn(f"{path}: its sound cannot be read or written, so the result will have none ({problem})")
    return None if problem else path


class Sound:
    """Adds an audio stream to `out` with the sound of a file, `start` seconds earlier than in that file.

    If path is None or the file has no sound, it does nothing.
    """

    def __init__(self, path, out, start):
        self.path, self.out, self.start = path, out, start
        self.source = self.problem = None
        self.packet, self.written = None, 0     # the next packet: None before the first one, False at the end
        self.packets = iter(())
        if path is None:
            return
        index = main_audio(path)
        if index is None:
            return
        self.joints = find_joints(path, index)
        self.source = open_media(path)
        audio = self.source.streams[index]
        if audio.codec_context is None:
            self.problem = "its codec is unknown"
        elif is_known(audio) and audio.codec_context.name in COPIED and not is_slow_mp3(audio):
            self.packets = self.copied(audio, out.add_stream_from_template(audio))
        else:
            frames = audio_frames(self.source, audio)
            first = next(frames, None)
            if first is None:
                self.problem = "none of it can be decoded"
            else:
                stream = add_aac(out, first.sample_rate, first.layout.nb_channels == 1)
                self.packets = self.encoded(chain([first], frames), stream)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.packets = None     # the generator holds a reference to the source
        if self.source is not None:
            self.source.close()
        if self.problem:
            what = "ends early" if self.written else "cannot be read or written, so the result has none"
            warn(f"{self.path}: its sound {what} ({self.problem})")

    def write_until(self, seconds):
        """Write the packets up to this time of the result.

        If reading the sound fails, the result's sound ends there, and __exit__() warns. The pictures are
        not affected.
        """
        import av
        try:
            if self.packet is None:
                self.packet = next(self.packets, False)
            while self.packet and (self.packet.pts or 0) * self.packet.time_base <= seconds:
                self.out.mux(self.packet)
                self.written += 1
                self.packet = next(self.packets, False)
        except (av.InvalidDataError, av.EOFError, ValueError) as e:     # a full disk is passed on
            self.packet, self.problem = False, getattr(e, "strerror", None) or str(e)

    def clock(self, base, step):
        """-> the clock for times of the source. base, step: as in Clock."""
        return JoinedClock(base, self.joints) if self.joints else Clock(base, step)

    def copied(self, audio, stream):
        """Yield the packets with shifted times, without those that end before the result starts."""
        clock = None
        for packet in packets(self.source, audio, Damage()):
            if packet.dts is None or packet.pts is None:
                continue
            clock = clock or self.clock(packet.time_base, packet.duration or 1)
            time = clock.increasing(packet.dts)
            if time is None:
                continue
            shift = time - packet.dts - round(self.start / packet.time_base)
            packet.pts += shift
            packet.dts += shift
            if (packet.pts + (packet.duration or 0)) * packet.time_base > -PREROLL:
                packet.stream = stream
                yield packet

    def encoded(self, frames, stream):
        """Yield the frames as AAC packets with the stream's rate and layout."""
        import av
        encoder, clock, kind, end = stream.codec_context, None, None, 0
        for frame in frames:
            if clock is None:
                seconds = frame.samples / frame.sample_rate
                clock = self.clock(frame.time_base, round(seconds / frame.time_base))
            time, start = clock.increasing(frame.pts), round(self.start / frame.time_base)
            if time is None or time < start:    # it comes before the result starts
                continue
            frame.pts = time - start
            # Channels and rate can change within a stream, but the encoder's own resampler refuses that.
            previous, kind = kind, (frame.format.name, frame.layout.name, frame.sample_rate)
            if kind != previous:
                resampler = av.AudioResampler(encoder.format, encoder.layout, encoder.rate)
            for part in resampler.resample(frame):
                part.pts = round(part.pts * part.time_base * encoder.rate)
                part.time_base = Fraction(1, encoder.rate)
                if part.pts <= end - part.samples / 2:
                    continue    # an earlier, damaged frame came out too long and already covers this time
                end = part.pts + part.samples
                yield from stream.encode(part)
        yield from stream.encode()


def is_slow_mp3(audio):
    """Whether a stream is MP3 with a rate below 16,000 Hz, which an mp4 cannot hold."""
    return audio.codec_context.name.startswith("mp3") and audio.rate < 16_000


def add_aac(out, rate, mono):
    """Add an AAC stream to `out`, with the rate nearest to this one that AAC supports, and return it."""
    import av
    rates = av.Codec("aac", "w").audio_rates
    nearest = min(rates, key=lambda r: abs(r - rate))
    return out.add_stream("aac", rate=nearest, layout="mono" if mono else "stereo")
