"""photos.py: photos of every kind are read as a viewer sees them."""
import struct
import warnings

import av
import numpy as np
import pytest
from PIL import Image, ImageCms, TiffTags
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from media import decode, photos
from runtime.files import UserError


def picture(path, image, **options):
    """Save a PIL picture and read it as a photo -> uint8 (H, W, 3)."""
    image.save(path, **options)
    return photos.read_photo(path)


def test_photos_of_every_kind(tmp_path):
    rgb = Image.new("RGB", (30, 20), (200, 100, 50))
    assert picture(tmp_path / "a.png", rgb).shape == (20, 30, 3)
    exif = Image.Exif()
    exif[0x0112] = 6        # of a phone that was held upright
    assert picture(tmp_path / "b.jpg", rgb, exif=exif).shape == (30, 20, 3)
    assert picture(tmp_path / "c.png", Image.new("L", (30, 20), 77))[0, 0].tolist() == [77] * 3
    assert picture(tmp_path / "d.png", Image.new("RGBA", (30, 20), (9, 9, 9, 0)))[0, 0].tolist() == [255] * 3
    deep = lambda level: Image.fromarray(np.full((4, 4), level, np.uint16))
    assert picture(tmp_path / "e.png", deep(65535))[0, 0].tolist() == [255] * 3
    assert picture(tmp_path / "f.png", deep(32768)).max() < 140
    assert picture(tmp_path / "g.jpg", Image.new("CMYK", (30, 20))).shape == (20, 30, 3)
    animated = dict(save_all=True, append_images=[rgb.convert("P")])
    assert picture(tmp_path / "h.gif", rgb.convert("P"), **animated).shape == (20, 30, 3)
    assert picture(tmp_path / "i.png", Image.new("LA", (30, 20), (0, 0)))[0, 0].tolist() == [255] * 3


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_float_tiffs_are_read_for_any_level_of_white(tmp_path, white):
    levels = np.linspace(0, white, 1000, dtype=np.float32).reshape(20, 50)
    levels[0, :3] = np.nan, np.inf, 1.5 * white
    photo = picture(tmp_path / "a.tif", Image.fromarray(levels))
    expected = np.linspace(0, 255, 1000).reshape(20, 50)
    expected[0, :3] = 0, 0, 255
    assert photo.shape == (20, 50, 3) and np.abs(photo - expected[..., None]).max() <= 1


CORNER = np.zeros((32, 64, 3), np.uint8)
CORNER[:16, :32] = 255      # the top left corner is white


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_rotates_a_photo_for_both_decoders(tmp_path, suffix):
    """PIL decodes it as a photo, and FFmpeg as a driver with one frame."""
    seen = set()
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.{suffix}"
        Image.fromarray(CORNER).save(path, exif=exif, quality=95)
        photo = photos.read_photo(path)
        turned = orientation > 4
        assert photo.shape == ((64, 32, 3) if turned else (32, 64, 3))
        rows, columns = np.nonzero(photo[..., 0] > 128)
        seen.add((turned, rows.mean() < photo.shape[0] / 2, columns.mean() < photo.shape[1] / 2))
        frame = decode.to_rgb(next(decode.read_video(path)))
        assert frame.shape == photo.shape and np.abs(frame.astype(int) - photo).mean() < 4
    assert len(seen) == 8


def test_a_photo_with_an_invalid_exif_tag_is_read(tmp_path):
    """Some phones write such tags. Here a number is stored as text."""
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0
    Image.fromarray(CORNER).save(tmp_path / "a.jpg", exif=exif)
    blob = (tmp_path / "a.jpg").read_bytes()
    at = blob.index(b"\x01\x1a\x00\x05")        # XResolution, whose type is changed from fraction to text
    (tmp_path / "a.jpg").write_bytes(blob[:at + 3] + b"\x02" + blob[at + 4:])
    assert photos.read_photo(tmp_path / "a.jpg").shape == (64, 32, 3)


def wide_gamut():
    """-> a colour profile (bytes) like sRGB, but with red and green swapped, which is easy to see."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = int.from_bytes(profile[128:132], "big")
    tags = {bytes(profile[132 + 12 * k:136 + 12 * k]): 132 + 12 * k for k in range(count)}
    red, green = (slice(tags[tag] + 4, tags[tag] + 12) for tag in (b"rXYZ", b"gXYZ"))
    profile[red], profile[green] = profile[green], profile[red]
    return bytes(profile)


def test_colour_profiles_are_obeyed(tmp_path):
    red = Image.new("RGB", (8, 8), (220, 20, 20))
    for name in ("a.png", "b.jpg"):
        red.save(tmp_path / name, icc_profile=wide_gamut())
        assert photos.read_photo(tmp_path / name)[4, 4] == pytest.approx([20, 220, 20], abs=6)
    red.convert("RGBA").save(tmp_path / "c.png", icc_profile=wide_gamut())
    assert photos.read_photo(tmp_path / "c.png")[4, 4] == pytest.approx([20, 220, 20], abs=6)
    red.save(tmp_path / "d.png", icc_profile=b"damaged")
    assert photos.read_photo(tmp_path / "d.png")[4, 4].tolist() == [220, 20, 20]
    # a profile for another mode than the picture's
    red.convert("L").save(tmp_path / "e.png", icc_profile=wide_gamut())
    assert np.ptp(photos.read_photo(tmp_path / "e.png")[4, 4]) == 0


def test_jfif_and_pictures_that_only_ffmpeg_reads(tmp_path, face):
    Image.fromarray(face).save(tmp_path / "a.jfif", "JPEG", quality=95)
    assert np.abs(photos.read_photo(tmp_path / "a.jfif").astype(int) - face).mean() < 3
    # like a phone's file: one picture in HEVC or H.264
    with av.open(str(tmp_path / "a.heic"), "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=1, options={"crf": "5"})
        stream.height, stream.width, stream.pix_fmt = *face.shape[:2], "yuv420p"
        out.mux(stream.encode(av.VideoFrame.from_ndarray(face, format="rgb24")))
        out.mux(stream.encode())
    assert np.abs(photos.read_photo(tmp_path / "a.heic").astype(int) - face).mean() < 4
    exif = Image.Exif()
    exif[0x0112] = 6
    with open(tmp_path / "b.heic", "wb") as file:       # with EXIF as side data, which PyAV does not know
        Image.fromarray(face).save(file, "AVIF", quality=95, exif=exif)
    turned, profile = photos.read_still(tmp_path / "b.heic")
    assert turned.shape == (face.shape[1], face.shape[0], 3) and profile is None
    assert np.abs(turned.astype(int) - np.rot90(face, -1)).mean() < 6
    with pytest.raises(UserError, match="is a folder, but a photo file is needed"):
        photos.read_photo(tmp_path)
    with pytest.raises(UserError, match="no file"):
        photos.read_photo(tmp_path / "none.heic")


# -------------------------------------------------------------------------------------------- large photos

def test_a_photo_of_200_megapixels_is_read(tmp_path):
    Image.new("L", (16320, 12240), 90).save(tmp_path / "large.jpg")
    photo = photos.read_photo(tmp_path / "large.jpg")
    assert photo.shape == (3060, 4080, 3) and np.abs(photo[::100, ::100].astype(int) - 90).max() < 3


@pytest.mark.parametrize("kind,mode", [
    ("JPEG", "RGB"), ("JPEG", "CMYK"), ("MPO", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "I;16"),
    ("PNG", "1"), ("TIFF", "RGB"), ("WEBP", "RGB"), ("AVIF", "RGB")])
def test_large_photos_of_all_kinds_are_shrunk_and_upright(tmp_path, monkeypatch, kind, mode):
    """A JPEG is shrunk by its decoder and others afterwards, which gives the same picture."""
    monkeypatch.setattr(photos, "LARGE", 10_000)
    small = Image.fromarray(CORNER).resize((66, 35), Image.NEAREST)
    large = small.resize((264, 140), Image.NEAREST)
    deep = Image.fromarray(np.asarray(large.convert("L")).astype(np.uint16) * 257)
    large = deep if mode == "I;16" else large.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    large.save(tmp_path / "large", kind, exif=exif)
    photo = photos.read_photo(tmp_path / "large")
    assert photo.shape == (66, 35, 3)
    assert np.abs(np.rot90(photo).astype(int) - np.asarray(small)).mean() < 6


def test_photos_that_are_too_large_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    monkeypatch.setattr(photos, "MOST", 5000)
    Image.new("RGB", (80, 80)).save(tmp_path / "a.png")
    Image.new("RGB", (200, 100)).save(tmp_path / "b.jpg")
    with av.open(str(tmp_path / "c.heic"), "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=1)
        stream.width, stream.height, stream.pix_fmt = 200, 100, "yuv420p"
        out.mux(stream.encode(av.VideoFrame(200, 100, "yuv420p")))
        out.mux(stream.encode())
    for name in ("a.png", "b.jpg", "c.heic"):
        with pytest.raises(UserError, match=f"{name} has more than 0 megapixels: save a smaller copy"):
            photos.read_photo(tmp_path / name)


# ------------------------------------------------------------------------------------------- raw files

def tiff(path, tags=(), inner=None, **options):
    """Write a TIFF with one picture, with additional tags {number: value} and a nested directory of tags."""
    picture = ImageFileDirectory_v2()
    if inner:
        picture.tagtype[330] = TiffTags.LONG
        picture[330] = 0x01020304
    for tag, value in dict(tags).items():
        picture.tagtype[tag] = TiffTags.BYTE if isinstance(value, bytes) else TiffTags.LONG
        picture[tag] = value
    Image.new("RGB", (40, 30), "red").save(path, "TIFF", tiffinfo=picture, **options)
    if inner:
        blob = path.read_bytes()
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in inner.items())
        place = struct.pack("<I", 0x01020304), struct.pack("<I", len(blob))
        path.write_bytes(blob.replace(*place) + struct.pack("<H", len(inner)) + entries + bytes(4))
    return path


def test_raw_files_are_refused(tmp_path):
    raw = [tiff(tmp_path / "dng.tif", {50706: b"\1\4\0\0"}),
           tiff(tmp_path / "preview.jpg", {254: 1}),
           tiff(tmp_path / "nef.nef", inner={254: 0, 262: 32803}),
           tiff(tmp_path / "linear.dng", inner={262: 34892})]
    for name, start in (("a.cr2", b"II*\0\x10\0\0\0CR\2\0"), ("a.cr3", b"\0\0\0\x18ftypcrx \0\0\0\1"),
                        ("a.raf", b"FUJIFILMCCD-RAW 0201"), ("a.orf", b"IIRO\x08\0\0\0"),
                        ("a.rw2", b"IIU\0\x18\0\0\0"), ("a.crw", b"II\x1a\0\0\0HEAPCCDR")):
        (tmp_path / name).write_bytes(start + bytes(100))
        raw.append(tmp_path / name)
    for path in raw:
        with pytest.raises(UserError, match="raw file, or begins with a small preview: export .* as JPEG"):
            photos.read_photo(path)


def test_other_tiffs_are_read(tmp_path):
    """With a small copy inside, with several pages, or as a BigTIFF; and without warnings."""
    smaller = Image.new("RGB", (20, 15), "blue")
    for path in (tiff(tmp_path / "plain.tif"), tiff(tmp_path / "pyramid.tif", inner={254: 1, 262: 2}),
                 tiff(tmp_path / "pages.tif", save_all=True, append_images=[smaller]),
                 tiff(tmp_path / "big.tif", big_tiff=True)):
        photo = photos.read_photo(path)
        assert photo[0, 0].tolist() == [255, 0, 0] and photo.shape == (30, 40, 3)
    (tmp_path / "cut.tif").write_bytes(tiff(tmp_path / "a.tif").read_bytes()[:60])
    with warnings.catch_warnings(action="error"), pytest.raises(UserError, match="cut.tif is not a picture"):
        photos.read_photo(tmp_path / "cut.tif")
