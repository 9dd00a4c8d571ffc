"""Photos as a viewer sees them: upright, in sRGB.

    image = read_photo("x.jpg")             # uint8 (H, W, 3)
"""
import io
import os
import re
import warnings

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError
from PIL.Image import Transpose
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from media.decode import pixel_aspect, side_data, to_rgb, to_srgb_from_hdr
from media.streams import main_video, open_media
from runtime.files import UserError, pass_on_want_of_memory

MOST = 300_000_000      # pixels of a photo: phones make 200 million
LARGE = 90_000_000      # one of more is read at a quarter of its width and height, which is enough for a face
Image.MAX_IMAGE_PIXELS = MOST       # PIL itself would refuse those that are LARGE

TURNS = {2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM,
         5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE,
         8: Transpose.ROTATE_90}    # what EXIF's orientations ask for


def read_photo(path):
    """-> uint8 (H, W, 3) in sRGB, upright (EXIF), alpha over white, the first picture of an animation.

    A LARGE photo comes at a quarter of its width and height. UserError if there is none.
    """
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder, and a photo is wanted")
    if is_raw(path):
        raise UserError(f"{path} is a camera's raw file, or begins with a small preview: export the photo "
                        "itself as JPEG or PNG")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # on what is odd in a file, but read all the same
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return np.asarray(to_srgb(turned(image), image.info.get("icc_profile")))
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except UnidentifiedImageError as e:
        problem = e
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise too_large(path) from None
    except Exception as e:      # PIL raises a dozen types on damaged files
        pass_on_want_of_memory(e)
        raise UserError(f"{path} is not a picture that can be read ({e})") from None
    try:    # what PIL does not know: .heic
        image, profile = read_still(path)
    except UserError:
        raise
    except Exception:       # FFmpeg raises many types on foreign files; PIL's word is the better one
        raise UserError(f"{path} is not a picture that can be read ({problem})") from None
    return np.asarray(to_srgb(shrunk(Image.fromarray(image)), profile))


def too_large(path):
    return UserError(f"{path} has more than {MOST / 1e6:.0f} megapixels: save a smaller copy, and use that")


def shrunk(image):
    """Load a PIL picture, a LARGE one at a quarter of its width and height. Returns it."""
    quarter = image.width // 4, image.height // 4
    if image.width * image.height > LARGE:
        image.draft(None, quarter)      # a JPEG can be decoded at this size; others are as they were
    image.load()
    if image.width * image.height > LARGE:
        image.thumbnail(quarter, reducing_gap=None)
    return image


def turned(image):
    """A PIL picture -> upright by its EXIF. ImageOps.exif_transpose fails where another tag there is odd."""
    shrunk(image)       # loads it, by which a TIFF turns itself
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
        if stream is None:
            raise OSError("no picture in it")
        if stream.width * stream.height > MOST:
            raise too_large(path)
        frame = next(container.decode(stream), None)
        if frame is None:
            raise OSError("no picture in it")
        frame.opaque = pixel_aspect(stream), None
        return to_srgb_from_hdr(to_rgb(frame), frame), side_data(frame, "ICC_PROFILE")


def to_srgb(image, profile):
    """A PIL picture of any mode -> RGB, by its colour profile (bytes or None): else colours are pale."""
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(to_8_bits(np.asarray(image, np.float64), image.mode == "F"))
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


def to_8_bits(levels, is_float):
    """Levels (H, W), which PIL would cut off at 255 -> uint8. White is 65535; of floats 1, 255 or that."""
    white = 65535
    if is_float:
        levels = np.nan_to_num(levels, posinf=0, neginf=0)
        bright = np.quantile(levels, 0.9)       # of the brightest, some can be beyond white
        white = 1 if bright <= 1.05 else 255 if bright <= 255 else white
    return (levels * (255 / white)).clip(0, 255).astype(np.uint8)


# ----------------------------------------------------------------------------------------------- raw files

# Canon's CR2, CR3 and CRW, Fujifilm's, Olympus', Panasonic's, Sigma's, Minolta's; all others are TIFFs
RAW = re.compile(rb"II.{6}CR|.{4}ftypcrx |.{6}HEAPCCDR|FUJIFILMCCD-RAW|IIR[OS]|MMOR|IIU\0|FOVb|\0MRM",
                 re.DOTALL)
KIND, PHOTOMETRIC, INNER, DNG = 254, 262, 330, 50706    # tags of a TIFF
SENSOR = (32803, 34892)     # as PHOTOMETRIC: not developed yet


def is_raw(path):
    """Whether PIL and FFmpeg would read a small preview instead of the photo: by content, not by name."""
    try:
        with warnings.catch_warnings(action="ignore"), open(path, "rb") as file:
            if RAW.match(file.read(16)):
                return True
            first, *others = tiff_directories(file)
    except Exception:   # no TIFF, or a damaged one, or no file at all: others will tell
        return False
    is_preview = bool(first.get(KIND, 0) & 1)
    return is_preview or DNG in first or any(tags.get(PHOTOMETRIC) in SENSOR for tags in (first, *others))


def tiff_directories(file, limit=20):
    """-> [the tags of each picture of a TIFF, and of those inside these], the first ones."""
    file.seek(0)
    header = file.read(8)
    header += file.read(8) if header[2] == 43 else b""      # a BigTIFF has more of it

    def read(at):
        tags = ImageFileDirectory_v2(header)
        file.seek(at)
        tags.load(file)
        return tags

    todo, found = [ImageFileDirectory_v2(header).next], {}
    while todo and len(found) < limit:
        at = todo.pop(0)
        if at and at not in found:
            found[at] = read(at)
            todo += [*found[at].get(INNER, ()), found[at].next]
    return list(found.values())
