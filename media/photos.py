"""Reading photos as a viewer sees them: upright, in sRGB.

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
from runtime.files import UserError, raise_if_out_of_memory

MOST = 300_000_000      # larger photos (in pixels) are refused; phones have up to 200 million
LARGE = 90_000_000      # larger ones are read at a quarter of their width and height, enough for a face
Image.MAX_IMAGE_PIXELS = MOST       # PIL's default is about LARGE

TURNS = {2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM,
         5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE,
         8: Transpose.ROTATE_90}    # by EXIF's orientation


def read_photo(path):
    """-> uint8 (H, W, 3) in sRGB, upright by EXIF. Alpha is blended with white.

    An animation gives its first picture. A photo with more than LARGE pixels is reduced to a quarter of
    its width and height. Raises UserError if the photo cannot be read, is a raw file or has more than MOST
    pixels.
    """
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder, but a photo file is needed")
    if is_raw(path):
        raise UserError(f"{path} is a camera's raw file, or begins with a small preview: export the photo as "
                        "JPEG or PNG")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # about oddities that do not keep PIL from reading the file
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return np.asarray(to_srgb(upright_by_exif(image), image.info.get("icc_profile")))
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except UnidentifiedImageError as e:
        problem = e
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise too_large(path) from None
    except Exception as e:      # PIL raises a dozen types for damaged files
        raise_if_out_of_memory(e)
        raise UserError(f"{path} is not a picture that can be read ({e}): save it again as JPEG or "
                        "PNG") from None
    try:    # formats that PIL does not know, such as .heic
        image, profile = read_still(path)
    except UserError:
        raise
    except Exception:       # FFmpeg raises many types for files that are not media; PIL's message is clearer
        raise UserError(f"{path} is not a picture that can be read ({problem}): save it again as JPEG or "
                        "PNG") from None
    return np.asarray(to_srgb(shrunk(Image.fromarray(image)), profile))


def too_large(path):
    return UserError(f"{path} has more than {MOST / 1e6:.0f} megapixels: save a smaller copy and use that")


def shrunk(image):
    """Load a PIL picture, and reduce one of more than LARGE pixels to a quarter of its width and height."""
    quarter = image.width // 4, image.height // 4
    if image.width * image.height > LARGE:
        image.draft(None, quarter)      # decodes a JPEG at this size, and does nothing for other files
    image.load()
    if image.width * image.height > LARGE:
        image.thumbnail(quarter, reducing_gap=None)
    return image


def upright_by_exif(image):
    """A PIL picture -> the same, upright by its EXIF, and shrunk() if it is large.

    ImageOps.exif_transpose would do this, but fails if any other EXIF tag is invalid.
    """
    shrunk(image)       # loads the picture, and PIL makes a TIFF upright when it loads it
    try:
        turn = TURNS.get(image.getexif().get(0x0112))
    except Exception:   # damaged EXIF is ignored
        turn = None
    return image if turn is None else image.transpose(turn)


def read_still(path):
    """Read a file such as .heic with FFmpeg -> uint8 (H, W, 3), upright, and its colour profile or None.

    Raises OSError or av.FFmpegError if the file holds no picture, and UserError if it has more than MOST
    pixels or is stored in tiles.
    """
    from av.stream import Disposition
    with open_media(path) as container:
        if any(s.disposition & Disposition.dependent for s in container.streams.video):
            raise UserError(f"{path} is stored in tiles, which this program cannot join: save it as JPEG")
        stream = main_video(container)
        if stream is None:
            raise OSError("no picture in it")
        if stream.width * stream.height > MOST:
            raise too_large(path)
        frame = next(container.decode(stream), None)
        if frame is None:
            raise OSError("no picture in it")
        frame.opaque = pixel_aspect(stream), None, False
        return to_srgb_from_hdr(to_rgb(frame), frame), side_data(frame, "ICC_PROFILE")


def to_srgb(image, profile):
    """A PIL picture of any mode, and its colour profile (bytes or None) -> a PIL picture in sRGB.

    Without their profile, photos with a wide gamut would look pale.
    """
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
            pass    # ignore a profile that is damaged or for another mode than the picture's
    return image.convert("RGB")


def to_8_bits(levels, is_float):
    """Levels (H, W) of a picture with more than 8 bits, which PIL would clip at 255 -> uint8 (H, W).

    Integers have white at 65535. Floats can have it at 1, 255 or 65535; the levels tell which.
    """
    white = 65535
    if is_float:
        levels = np.nan_to_num(levels, posinf=0, neginf=0)
        bright = np.quantile(levels, 0.9)       # not the maximum, because highlights can be above white
        white = 1 if bright <= 1.05 else 255 if bright <= 255 else white
    return (levels * (255 / white)).clip(0, 255).astype(np.uint8)


# ----------------------------------------------------------------------------------------------- raw files

# How the raw files of Canon (CR2, CR3, CRW), Fujifilm, Olympus, Panasonic, Sigma and Minolta begin. All
# other raw files are TIFFs.
RAW = re.compile(rb"II.{6}CR|.{4}ftypcrx |.{6}HEAPCCDR|FUJIFILMCCD-RAW|IIR[OS]|MMOR|IIU\0|FOVb|\0MRM",
                 re.DOTALL)
SUBFILE_TYPE, PHOTOMETRIC, SUB_IFDS, DNG_VERSION = 254, 262, 330, 50706     # TIFF tags
SENSOR = (32803, 34892)     # values of PHOTOMETRIC for sensor data, which is not developed yet


def is_raw(path):
    """Whether PIL and FFmpeg would read a small preview instead of the photo, judged by its content."""
    try:
        with warnings.catch_warnings(action="ignore"), open(path, "rb") as file:
            if RAW.match(file.read(16)):
                return True
            first, *others = tiff_directories(file)
    except Exception:   # not a TIFF, a damaged one, or no file: read_photo() will tell
        return False
    is_preview = bool(first.get(SUBFILE_TYPE, 0) & 1)
    return (is_preview or DNG_VERSION in first
            or any(tags.get(PHOTOMETRIC) in SENSOR for tags in (first, *others)))


def tiff_directories(file, limit=20):
    """-> a list of the tags of each picture in a TIFF, including nested ones; at most `limit` of them."""
    file.seek(0)
    header = file.read(8)
    header += file.read(8) if header[2] == 43 else b""      # a BigTIFF has a longer header

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
            todo += [*found[at].get(SUB_IFDS, ()), found[at].next]
    return list(found.values())
