"""Reading videos as a viewer sees them: the right stream, upright, with square pixels, in sRGB.

    for frame in read_video("v.mp4"):       # av.VideoFrame, one at a time
        image = to_rgb(frame)               # uint8 (H, W, 3), upright
"""
import functools
import os
from fractions import Fraction

import numpy as np
from PIL import Image, ImageOps

from media.streams import Damage, expected_frames, main_video, open_media, packets, promises, shown
from runtime.files import UserError, raise_if_out_of_memory, warn

# --------------------------------------------------------------------------------------------- reading

def read_video(path, complain=warn):
    """Yield the frames of a video that a player would show, one at a time, as av.VideoFrame.

    A frame's time is pts * time_base seconds, and always later than the one before. Its `opaque` is for
    to_rgb(). Damaged packets are skipped, and a file that ends early is used up to there; complain(line) is
    called in both cases. Raises UserError if no frame can be read.
    """
    import av
    if is_animated_webp(path):
        yield from animated_webp(path, complain)
        return
    count, start, damage = 0, None, Damage()
    try:
        with open_media(path) as container:
            stream = main_video(container)
            if stream is None:
                raise UserError(f"{path} has no video in it: use a file with a video")
            promised = promises(container, stream)
            for frame in of_one_size(shown(container, stream, damage), stream, damage):
                count += 1
                start = frame.pts if start is None else start
                seconds = (frame.pts + frame.duration - start) * frame.time_base
                yield frame
    except (av.FFmpegError, OSError) as e:
        if os.path.isdir(path):
            raise UserError(f"{path} is a folder, but a video file is needed") from None
        if not os.path.exists(path):
            raise UserError(f"no file {path}") from None
        raise UserError(f"{path} is not a video that can be read ({e.strerror or e}): convert it to "
                        "mp4, or use another file") from None
    if not count:
        raise UserError(f"{path} is a video, but none of its frames can be read: use another file")
    seconds = 0.0 if damage.packets else float(seconds)     # with frames missing, it would give a wrong rate
    expected = max(damage.due, expected_frames(*promised, count, seconds))
    lost = words_on_loss(count, expected, damage)
    if lost:
        complain(f"{path}: {lost}")


def words_on_loss(count, expected, damage):
    """-> a few words on the frames that could not be read, or that look damaged; None if all are well.

    count: the number of frames that were read.  expected: about how many there should be, or 0.
    """
    missing = count < 0.95 * expected - 1       # a tolerance, because some containers' counts are a bit wrong
    if not missing and not damage.packets and not damage.end:
        return f"{len(damage.spoilt)} of {count} frames are damaged" if damage.spoilt else None
    frames = f"{count} of about {expected:.0f} frames" if count < expected else f"{count} frames"
    why = [f"damaged packets: {damage.packets}"] if damage.packets else []
    if damage.end or not why:
        why.append(damage.end or "the others are missing or damaged")
    return f"only {frames} could be read ({'; '.join(why)})"


def count_frames(path):
    """The number of frames that a player would show, found without decoding; 0 if it cannot be read."""
    import av
    try:
        if is_animated_webp(path):
            with Image.open(path) as image:
                return image.n_frames
        with open_media(path) as container:
            stream = main_video(container)
            if stream is None:
                return 0
            # is_discard: frames that an edit list cuts off are stored and decoded, but not shown
            return sum(not packet.is_discard for packet in packets(container, stream, Damage()))
    except (av.FFmpegError, OSError):
        return 0


def is_animated_webp(path):
    try:
        with open(path, "rb") as file:
            head = file.read(21)
    except OSError:     # read_video() tells why
        return False
    return len(head) == 21 and head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and bool(head[20] & 2)


def animated_webp(path, complain):
    """The same as read_video(), but with PIL, because FFmpeg does not decode animated WebP."""
    import av
    from media.photos import to_srgb, upright_by_exif   # imported here, because that module imports this one
    count, time, aspect = 0, 0, 1.0
    try:
        with Image.open(path) as image:
            for count in range(image.n_frames):
                image.seek(count)
                picture = to_srgb(upright_by_exif(image), image.info.get("icc_profile"))
                milliseconds = image.info["duration"]
                frame = av.VideoFrame.from_image(picture)
                frame.pts, frame.time_base = time, Fraction(1, 1000)
                frame.opaque = aspect, None, False      # a new tuple, because PyAV loses a shared one
                time += milliseconds if milliseconds > 10 else 100      # browsers do this, too
                yield frame
    except Exception as e:      # PIL raises a dozen types for damaged files
        raise_if_out_of_memory(e)
        if not count:
            raise UserError(f"{path} is an animated picture that is damaged or incomplete ({e})") from None
        complain(f"{path}: only {count} of {image.n_frames} frames could be read ({e})")


# ---------------------------------------------------------------------------------------------- frames

PQ, HLG = 16, 18    # the two transfer functions of HDR, as numbered in H.273; phones record HLG
FROM_BT2020 = np.float32([[1.6605, -0.5876, -0.0728],
                          [-0.1246, 1.1329, -0.0083],
                          [-0.0182, -0.1006, 1.1187]])      # linear BT.2020 to linear sRGB


def of_one_size(frames, stream, damage):
    """Set `opaque` on each frame, so that to_rgb() can scale it to the size of the first one, as players do.

    It is (width / height of a pixel, (height, width) of the first picture, whether damage spoilt the frame).
    Photos and animations have None as the second, because they keep their size.
    Video calls in browsers change the size of the frames within a recording, and so does television.
    """
    aspects, own, size = {}, None, None     # own: the first frame's pixel aspect as its codec gives it
    for frame in frames:
        kind = frame.width, frame.height
        if kind not in aspects:
            own = own or codec_aspect(stream)
            aspects[kind] = pixel_aspect(stream) * codec_aspect(stream) / own
        if size is None:
            frame.opaque = aspects[kind], None, False
            size = to_rgb(frame).shape[:2]
        frame.opaque = aspects[kind], size, frame.pts in damage.spoilt
        yield frame


def codec_aspect(stream):
    """The width / height of the pixels, as the codec gives it for the latest frame."""
    return sane(float(stream.codec_context.sample_aspect_ratio or 1))


def pixel_aspect(stream):
    """The width / height of the pixels, as the container gives it for the stream; for DVDs, it is not 1."""
    return sane(float(stream.sample_aspect_ratio or codec_aspect(stream)))


def sane(aspect):
    return aspect if 1 / 8 < aspect < 8 else 1.0    # other values come from damaged files


def to_rgb(frame):
    """An av.VideoFrame from read_video() -> uint8 (H, W, 3), upright, with square pixels.

    It gets black borders if its proportions are not those of the first frame. The colours of an HDR frame
    stay pale: see to_srgb_from_hdr().
    """
    aspect, size, _ = frame.opaque
    width = round(frame.width * max(aspect, 1))     # enlarged and never reduced, to keep all detail
    height = round(frame.height / min(aspect, 1))
    if (width, height) == (frame.width, frame.height):
        image = frame.to_ndarray(format="rgb24", threads=1)     # starting threads would take longer than this
    else:
        image = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="BICUBIC",
                                 threads=1)
    image = np.ascontiguousarray(as_displayed(image, frame))
    if size is None or image.shape[:2] == size:
        return image
    return np.asarray(ImageOps.pad(Image.fromarray(image), size[::-1], Image.BICUBIC))


def is_spoilt(frame):
    """Whether a frame from read_video() may look wrong, because a packet that it depends on is damaged."""
    return frame.opaque[2]


def to_srgb_from_hdr(image, frame):
    """uint8 (H, W, 3), from to_rgb(frame) or cropped from it -> the same in sRGB.

    This changes the colours of HDR frames (BT.2100) only. White is 203 cd/m2 (BT.2408). The conversion is
    slow, and not needed for finding faces.
    """
    if frame.color_trc not in (PQ, HLG):
        return image
    rgb = image / np.float32(255)
    if frame.color_trc == PQ:
        root = rgb ** (1 / 78.84375)
        light = (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (1 / 0.1593017578125)
        light = 10_000 * light                                          # cd/m2
    else:
        dark, bright = rgb ** 2 / 3, (np.exp((rgb - 0.55991073) / 0.17883277) + 0.28466892) / 12
        scene = np.where(rgb <= 0.5, dark, bright)
        luminance = scene @ np.float32([0.2627, 0.6780, 0.0593])
        light = 1000 * scene * luminance[..., None] ** 0.2              # cd/m2, on a screen with 1000 cd/m2
    light = (light / 203 @ FROM_BT2020.T).clip(0, 1)
    srgb = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return (255 * srgb).round().astype(np.uint8)


def as_displayed(image, frame):
    """Apply a frame's display matrix, by which phones rotate and mirror: x' = a x + c y, y' = b x + d y."""
    matrix = side_data(frame, "DISPLAYMATRIX")
    if matrix is None:
        return image
    a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).tolist()
    if abs(a) + abs(d) < abs(b) + abs(c):       # x and y are swapped
        image, (a, d) = image.swapaxes(0, 1), (c, b)
    if a < 0:
        image = image[:, ::-1]
    if d < 0:
        image = image[::-1]
    return image


def side_data(frame, kind):
    """Data that is attached to a frame: bytes, or None. kind: a name in av.sidedata.sidedata.Type."""
    number = kinds_of_side_data()[kind]     # first, because it extends the Type that the next line uses
    data = frame.side_data.get(number)
    return data and bytes(data)


@functools.cache
def kinds_of_side_data():
    """PyAV's Type of side data, extended so that it accepts unknown kinds.

    FFmpeg 8 attaches EXIF data (31) to photos. PyAV 18 does not know this kind, and would raise an exception
    for such a photo, whichever kind is asked for.
    """
    from av.sidedata.sidedata import Type

    def unknown(cls, value):
        member = object.__new__(cls)
        member._name_, member._value_ = f"UNKNOWN_{value}", value
        return member

    Type._missing_ = classmethod(unknown)
    return Type
