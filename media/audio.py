"""Reading the sound of a media file as a player does: the right stream, and its samples.

    index = main_audio("v.mp4")     # None if the file has no sound
    for frame in audio_frames(container, container.streams[index]):
        ...                         # av.AudioFrame
"""
import re

import numpy as np

from media.streams import Damage, decoded, open_media, packets

SILENCE = 0.005     # of full scale: frames whose samples differ by less are silent; weak hiss stays below it
HEARD = 0.1         # a stream is heard if it has this many seconds that are not silent; a click has fewer
OTHERS = 0.7        # the factor by which channels that are neither left nor right are mixed into both


def main_audio(path):
    """The index of the audio stream that a player would play, or None if there is none.

    A silent stream is passed over if another can be heard, because screen recorders write a stream for every
    source of sound, even for unused ones.
    """
    with open_media(path) as container:
        indices = [stream.index for stream in sorted(container.streams.audio, key=merit, reverse=True)]
    if len(indices) < 2:
        return indices[0] if indices else None
    return next((index for index in indices if is_heard(path, index)), indices[0])


def merit(stream):
    """A key for sorting, best last: can be decoded, is marked as default, is not for a special audience."""
    from av.stream import Disposition
    for_some = (Disposition.comment | Disposition.descriptions | Disposition.hearing_impaired
                | Disposition.visual_impaired | Disposition.karaoke)
    default = bool(stream.disposition & Disposition.default)
    return is_known(stream), default, not stream.disposition & for_some


def is_known(stream):
    """Whether FFmpeg has a decoder for this audio stream, and knows its sampling rate."""
    return stream.codec_context is not None and stream.rate > 0


def is_heard(path, index):
    """Whether a stream of a file can be read and is not silent."""
    import av
    stereo = av.AudioResampler(format="flt", layout="stereo")   # because PyAV misreads frames with 8 planes
    try:
        with open_media(path) as container:
            stream = container.streams[index]
            frames = audio_frames(container, stream) if is_known(stream) else ()
            parts = (part for frame in frames for part in stereo.resample(frame))
            seconds = 0.0
            for part in parts:
                loud = np.ptp(part.to_ndarray()) > SILENCE
                seconds += loud * part.samples / part.sample_rate
                if seconds > HEARD:
                    return True
    except (av.FFmpegError, ValueError):
        pass
    return False


def audio_frames(container, stream):
    """Yield the av.AudioFrames of a stream.

    PCM in a MOV file is read from the packets, because PyAV must not decode it: if FFmpeg has no name for the
    order of the channels, as for most 6.1 and 7.1 sound, PyAV 18.1 frees the channel layout twice, and the
    process dies when a frame, the layout or the number of channels is accessed.
    """
    if stream.codec_context.name.startswith("pcm_") and "mov" in container.format.name.split(","):
        yield from pcm_frames(container, stream)
    else:
        yield from decoded(container, stream, Damage())


def pcm_frames(container, stream):
    """Yield a PCM stream as av.AudioFrames, mixed down to mono or stereo.

    Raises ValueError if that is impossible.
    """
    import av
    name, channels = stream.codec_context.name, None
    plain = re.fullmatch(r"pcm_([suf])(8|16|24|32|64)(le|be|)", name)
    kind, bits, order = plain.groups() if plain else (None, 8, None)    # A-law and mu-law have 8 bits
    for packet in packets(container, stream, Damage()):
        channels = channels or count_channels(packet, stream.rate, int(bits) // 8)
        if plain:
            samples = mixed_down(plain_samples(bytes(packet), kind, int(bits) // 8, order, channels))
            layout = "mono" if samples.shape[1] == 1 else "stereo"
            frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="flt", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = stream.rate, packet.pts, packet.time_base
            yield frame
        elif channels <= 2:
            yield from stream.decode(packet)
        else:
            raise ValueError(f"{channels} channels of {name} cannot be decoded")


def count_channels(packet, rate, width):
    """The number of channels of a PCM packet, found from its size. width: the bytes of a sample."""
    samples = float((packet.duration or 0) * packet.time_base * rate)
    channels = round(packet.size / width / samples) if samples else 0
    if not channels:
        raise ValueError("the number of its channels is unknown")
    return channels


def plain_samples(data, kind, width, order, channels):
    """Bytes of PCM -> samples (n, channels) in [-1, 1].

    kind: "s", "u" or "f", for signed, unsigned and floating-point.  width: the bytes of a sample.
    order: "le", "be" or "", for little-endian, big-endian and single bytes.
    """
    whole = len(data) // (width * channels) * (width * channels)    # the file may end within a sample
    parts = np.frombuffer(data[:whole], np.uint8).reshape(-1, width)
    if order == "le":
        parts = parts[:, ::-1]
    if kind == "f":
        values = np.ascontiguousarray(parts).view(f">f{width}")
    else:
        padded = np.zeros((len(parts), 4), np.uint8)
        padded[:, :width] = parts
        padded[:, 0] ^= 128 * (kind == "u")
        values = padded.view(">i4") / 2 ** 31
    return values.reshape(-1, channels)


def mixed_down(samples):
    """Samples (n, channels) -> float32 (n, 2), or (n, 1) from mono.

    The first two channels are left and right, and all others are mixed into both.
    """
    if samples.shape[1] > 2:
        rest = OTHERS * samples[:, 2:].sum(1, keepdims=True)
        loudness = np.sqrt(1 + (samples.shape[1] - 2) * OTHERS ** 2)    # if all have the same
        samples = (samples[:, :2] + rest) / loudness
    return np.ascontiguousarray(samples.clip(-1, 1), np.float32)
