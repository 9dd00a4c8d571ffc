"""The sound of a media file as a player plays it: which stream is meant, and its samples.

    index = main_audio("v.mp4")     # None without sound
    for frame in audio_frames(container, container.streams[index]):
        ...                         # av.AudioFrame
"""
import re

import numpy as np

from media.streams import Damage, decoded, open_media, packets

SILENCE = 0.001     # of full scale, from the lowest sample to the highest
BESIDE = 0.7        # how loud what is neither left nor right becomes in both


def main_audio(path):
    """The index of the audio stream that a player would play, None without one.

    Of several, one that is silent is not taken: recorders write one for each source, used or not.
    """
    with open_media(path) as container:
        indices = [stream.index for stream in sorted(container.streams.audio, key=merit, reverse=True)]
    if len(indices) < 2:
        return indices[0] if indices else None
    return next((index for index in indices if is_heard(path, index)), indices[0])


def merit(stream):
    """The one marked as default, no commentary; the first of equals."""
    from av.stream import Disposition
    for_some = (Disposition.comment | Disposition.descriptions | Disposition.hearing_impaired
                | Disposition.visual_impaired | Disposition.karaoke)
    default = bool(stream.disposition & Disposition.default)
    return is_known(stream), default, not stream.disposition & for_some


def is_known(stream):
    return stream.codec_context is not None and stream.rate > 0


def is_heard(path, index):
    """Whether a stream of a file is more than silence, and can be read."""
    import av
    stereo = av.AudioResampler(format="flt", layout="stereo")   # PyAV reads 8 planes as if they were more
    try:
        with open_media(path) as container:
            stream = container.streams[index]
            frames = audio_frames(container, stream) if is_known(stream) else ()
            parts = (part for frame in frames for part in stereo.resample(frame))
            return any(np.ptp(part.to_ndarray()) > SILENCE for part in parts)
    except (av.FFmpegError, ValueError):
        return False


def audio_frames(container, stream):
    """Yield the av.AudioFrames of a stream.

    PyAV must not decode the PCM of a MOV. Where FFmpeg has no name for the order of its channels, as in most
    6.1 and 7.1, PyAV 18.1 frees that order twice, and the process dies, as soon as a frame, the layout or the
    number of channels is asked for. But the packets are plain samples.
    """
    if stream.codec_context.name.startswith("pcm_") and "mov" in container.format.name.split(","):
        yield from pcm_frames(container, stream)
    else:
        yield from decoded(container, stream, Damage())


def pcm_frames(container, stream):
    """Yield the av.AudioFrames of PCM, mono or stereo. ValueError where that cannot be made of it."""
    import av
    name, channels = stream.codec_context.name, None
    plain = re.fullmatch(r"pcm_([suf])(8|16|24|32|64)(le|be|)", name)
    kind, bits, order = plain.groups() if plain else (None, 8, None)            # A-law and mu-law have 8
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
            raise ValueError(f"{channels} channels of {name}")


def count_channels(packet, rate, width):
    """How many channels a packet of PCM has, by its size. width: bytes of a sample."""
    samples = float((packet.duration or 0) * packet.time_base * rate)
    channels = round(packet.size / width / samples) if samples else 0
    if not channels:
        raise ValueError("it does not say how many channels it has")
    return channels


def plain_samples(data, kind, width, order, channels):
    """Bytes of PCM -> (n, channels) in [-1, 1].

    kind: s, u or f: signed, unsigned, floating-point.  width: bytes of a sample.  order: le, be or nothing.
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
    """(n, channels) -> float32 (n, 2): the first two are left and right, the rest goes to both; or (n, 1)."""
    if samples.shape[1] > 2:
        rest = BESIDE * samples[:, 2:].sum(1, keepdims=True)
        loudness = np.sqrt(1 + (samples.shape[1] - 2) * BESIDE ** 2)    # of the sum, if all are as loud
        samples = (samples[:, :2] + rest) / loudness
    return np.ascontiguousarray(samples.clip(-1, 1), np.float32)
