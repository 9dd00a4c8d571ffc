"""Photos and videos as a viewer sees them: the stream that is meant, upright, with square pixels, in sRGB.

    image = read_photo("x.jpg")             # uint8 (H, W, 3)
    for frame in read_video("v.mp4"):       # av.VideoFrame, one at a time
        image = to_rgb(frame)               # uint8 (H, W, 3), upright
"""
import functools
import io
import os
import warnings

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError
from PIL.Image import Transpose

from runtime.files import UserError, warn


def open_media(path, mode="r", **options):
    """av.open for what is only ever a path: "12:30.mp4" names no protocol, "http:x.mp4" no server.

    Its title may be in any alphabet.
    """
    import av
    return av.open("file:" + os.fspath(path), mode, metadata_errors="replace", **options)


# ---------------------------------------------------------------------------------------------- streams

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


def main_audio(container):
    """The audio stream that a player would play: the one marked as default, no commentary; or None."""
    from av.stream import Disposition
    for_some = (Disposition.comment | Disposition.descriptions | Disposition.hearing_impaired
                | Disposition.visual_impaired | Disposition.karaoke)

    def merit(stream):
        readable = stream.codec_context is not None and stream.rate > 0
        default = bool(stream.disposition & Disposition.default)
        return readable, default, not stream.disposition & for_some

    return max(container.streams.audio, key=merit, default=None)     # the first of equals


# --------------------------------------------------------------------------------------------- reading

def read_video(path, complain=warn):
    """Yield every frame of a video that is shown, as an av.VideoFrame, streaming.

    Its pts rises, in units of its time_base (seconds). Its opaque is how much wider than high its pixels are.
    UserError if there is no frame to be had. What ends early is used as far as it goes, with complain(line).
    """
    import av
    count, start, problem = 0, None, None
    try:
        with open_media(path) as container:
            stream = main_video(container)
            if stream is None:
                raise UserError(f"{path} has no video in it")
            promised = promises(container, stream)
            for frame in with_rising_times(container.decode(stream), stream):
                frame.opaque = pixel_aspect(stream)
                count += 1
                start = frame.pts if start is None else start
                shown = (frame.pts + frame.duration - start) * frame.time_base      # seconds
                yield frame
    except (av.FFmpegError, OSError) as e:
        problem = e.strerror or str(e)
        if not count and os.path.isdir(path):
            raise UserError(f"{path} is a folder, and a video is wanted") from None
        if not count and not os.path.exists(path):
            raise UserError(f"no file {path}") from None
        if not count:
            raise UserError(f"{path} is not a video that can be read ({problem})") from None
    if not count:
        raise UserError(f"{path} is a video without a frame that can be read")
    expected = shown_frames(*promised, count, float(shown))
    if problem or count < 0.95 * expected - 1:      # containers' own counts are a little off at times
        why = problem or "it ends early"
        complain(f"{path}: only {count} of about {expected:.0f} frames could be read ({why})")


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


def with_rising_times(frames, stream):
    """Give every frame a time of its own."""
    clock = Clock(stream.time_base, round(1 / ((stream.average_rate or 25) * stream.time_base)))
    for frame in frames:
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


def count_frames(path):
    """How many frames of a video are shown, without decoding it; 0 if it cannot be read."""
    import av
    try:
        with open_media(path) as container:
            stream = main_video(container)
            if stream is None:
                return 0
            # what an edit list cuts off is stored and decoded, but not shown
            return sum(packet.size > 0 and not packet.is_discard for packet in container.demux(stream))
    except (av.FFmpegError, OSError):
        return 0


# ---------------------------------------------------------------------------------------------- frames

PQ, HLG = 16, 18    # H.273's numbers of the two HDR curves; phones record the latter
FROM_BT2020 = np.float32([[1.6605, -0.5876, -0.0728],
                          [-0.1246, 1.1329, -0.0083],
                          [-0.0182, -0.1006, 1.1187]])      # to sRGB's primaries, of linear light


def pixel_aspect(stream):
    """How much wider than high the pixels of a stream are: 1, but for DV, DVD, HDV and their like."""
    aspect = float(stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or 1)
    return aspect if 1 / 8 < aspect < 8 else 1.0    # beyond, it is damage


def to_rgb(frame):
    """av.VideoFrame of read_video -> uint8 (H, W, 3): square pixels, turned and mirrored as it says.

    The colours of HDR are pale as yet.
    """
    aspect = frame.opaque or 1.0
    width = round(frame.width * max(aspect, 1))      # enlarged, so that nothing is lost
    height = round(frame.height / min(aspect, 1))
    if (width, height) == (frame.width, frame.height):
        image = frame.to_ndarray(format="rgb24")
    else:
        image = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="BICUBIC")
    return np.ascontiguousarray(as_displayed(image, frame))


def to_srgb_from_hdr(image, frame):
    """uint8 (H, W, 3), of to_rgb or cut from it -> the same; where the frame is HDR (BT.2100), in sRGB.

    White is 203 cd/m2 (BT.2408). This takes long, and to find a face to_rgb alone will do.
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
        light = 1000 * scene * luminance[..., None] ** 0.2              # on a screen of 1000 cd/m2
    light = (light / 203 @ FROM_BT2020.T).clip(0, 1)
    srgb = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return (255 * srgb).round().astype(np.uint8)


def as_displayed(image, frame):
    """Apply a frame's display matrix: x' = a x + c y, y' = b x + d y. Phones turn by it, some mirror."""
    matrix = side_data(frame, "DISPLAYMATRIX")
    if matrix is None:
        return image
    a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).tolist()
    if abs(a) + abs(d) < abs(b) + abs(c):       # x and y change places
        image, (a, d) = image.swapaxes(0, 1), (c, b)
    if a < 0:
        image = image[:, ::-1]
    if d < 0:
        image = image[::-1]
    return image


def side_data(frame, kind):
    """What comes with a frame beside its pixels: bytes, or None. kind: a name of av's Type."""
    data = frame.side_data.get(kinds_of_side_data()[kind])
    return data and bytes(data)


@functools.cache
def kinds_of_side_data():
    """av's Type, with members for those it lacks.

    FFmpeg 8 adds EXIF (31) to photos, of which PyAV 18 does not know: then reading any kind would raise.
    """
    from av.sidedata.sidedata import Type

    def unknown(cls, value):
        member = object.__new__(cls)
        member._name_, member._value_ = f"UNKNOWN_{value}", value
        return member

    Type._missing_ = classmethod(unknown)
    return Type


# ----------------------------------------------------------------------------------------------- photos

TURNS = {2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM,
         5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE,
         8: Transpose.ROTATE_90}    # what EXIF's orientations ask for


def read_photo(path):
    """-> uint8 (H, W, 3) in sRGB, upright (EXIF), alpha over white, the first picture of an animation.

    UserError if it is none.
    """
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder, and a photo is wanted")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return np.asarray(to_srgb(turned(image), image.info.get("icc_profile")))
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except UnidentifiedImageError as e:
        problem = e
    except Exception as e:      # PIL raises a dozen types on damaged files
        raise UserError(f"{path} is not a picture that can be read ({e})") from None
    try:    # what PIL does not know: .heic
        image, profile = read_still(path)
    except UserError:
        raise
    except Exception:       # FFmpeg raises many types on foreign files; PIL's word is the better one
        raise UserError(f"{path} is not a picture that can be read ({problem})") from None
    return np.asarray(to_srgb(Image.fromarray(image), profile))


def turned(image):
    """A PIL picture -> upright by its EXIF. ImageOps.exif_transpose fails where another tag there is odd."""
    image.load()        # a TIFF turns itself
    try:
        turn = TURNS.get(image.getexif().get(0x0112))
    except Exception:   # damaged EXIF: as if there were none
        turn = None
    return image if turn is None else image.transpose(turn)


def read_still(path):
    """The picture of a file such as .heic: uint8 (H, W, 3), upright, and its colour profile or None.

    Raises OSError or av.FFmpegError where there is none.
    """
    from av.stream import Disposition
    with open_media(path) as container:
        if any(s.disposition & Disposition.dependent for s in container.streams.video):
            raise UserError(f"{path} is stored in tiles, which are not put together here: save it as JPEG")
        stream = main_video(container)
        if stream is None or stream.width * stream.height > Image.MAX_IMAGE_PIXELS:     # as PIL warns of
            raise OSError("no picture in it, or too large a one")
        frame = next(container.decode(stream), None)
        if frame is None:
            raise OSError("no picture in it")
        frame.opaque = pixel_aspect(stream)
        return to_srgb_from_hdr(to_rgb(frame), frame), side_data(frame, "ICC_PROFILE")


def to_srgb(image, profile):
    """A PIL picture of any mode -> RGB, by its colour profile (bytes or None): else colours are pale."""
    if image.mode.startswith("I"):      # 16 bits, which PIL would clip to 8
        image = Image.fromarray((np.asarray(image, np.float64) / 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode not in ("RGB", "L", "CMYK", "LAB"):
        image = image.convert("RGB")
    if profile:
        try:
            source = ImageCms.getOpenProfile(io.BytesIO(profile))
            srgb = ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(image, source, srgb, outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass    # damaged, or of another mode than the picture: as if it had none
    return image.convert("RGB")
