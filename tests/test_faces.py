"""faces.py and photos: which face is meant, crops, pictures of every kind."""
import io

import av
import numpy as np
import pytest
from PIL import Image, ImageCms

import finetune
from conftest import PHOTO
from media import decode, faces, folders
from model import Config
from runtime.files import UserError


def test_crop_follows_its_definition(face):
    points = np.zeros((68, 2), np.float32)
    points[36:42], points[42:48], points[[48, 54]] = (100, 90), (140, 90), (120, 130)
    assert faces.face_box(points) == pytest.approx([120, 110, max(2 * 40, 1.8 * 40)])
    box = np.array([120.0, 100.0, 50.0])
    centre, corner = (120.0, 100.0), (70.0, 50.0)
    mapped = faces.to_crop(np.array([centre, corner]), box, 100)
    assert mapped == pytest.approx(np.array([[49.5, 49.5], [-.5, -.5]]))


def test_a_crop_stays_in_the_picture_where_it_fits():
    image = np.zeros((100, 200, 3), np.uint8)

    def edges(*box):
        x, y, half = faces.inside(np.array(box), image)
        return x + .5 - half, x + .5 + half, y + .5 - half, y + .5 + half
    assert edges(100.0, 50.0, 30.0) == pytest.approx((70.5, 130.5, 20.5, 80.5))     # as it was
    assert edges(10.0, 90.0, 30.0) == pytest.approx((0, 60, 40, 100))               # moved
    assert edges(10.0, 90.0, 70.0) == pytest.approx((0, 140, -20, 120))     # too high: in the middle


def test_points_stay_on_the_same_pixels_in_the_crop():
    image = np.zeros((120, 160, 3), np.uint8)
    image[61:64, 81:84] = 255                                                   # a dot around (82, 62)
    box = np.array([90.3, 55.7, 40.2])
    x, y = faces.to_crop(np.array([[82.0, 62.0]]), box, 256)[0]
    bright = np.argwhere(faces.crop(image, box, 256)[..., 0] > 128).mean(0)
    assert (y, x) == pytest.approx(tuple(bright), abs=0.6)


def test_crop_beyond_the_border_is_reflected():
    image = np.arange(100, dtype=np.uint8)[None, :, None].repeat(100, 0).repeat(3, 2) * 2
    out = faces.crop(image, np.array([0.0, 50.0, 20.0]), 40)[20, :, 0].astype(int)
    assert abs(out[:19][::-1] - out[20:39]).max() <= 3                           # a mirror, not a streak
    assert faces.crop(image[:1, :1], np.array([0.0, 0.0, 30.0]), 64).shape == (64, 64, 3)


def test_boxes_of_a_video_are_steady():
    rng = np.random.default_rng(0)
    face = np.zeros((68, 2))
    face[36:42], face[42:48], face[[48, 54]] = (100, 90), (140, 90), (120, 130)
    # jitter on a slow walk
    points = face + rng.normal(0, 3, (100, 1, 2)) + np.linspace(0, 50, 100)[:, None, None]
    boxes = faces.steady_boxes(points, np.arange(100) / 25)
    assert np.abs(np.diff(boxes[:, 0])).max() < 1.0 < np.abs(np.diff(faces.face_box(points)[:, 0])).max()
    assert np.abs(boxes[25:75, 0] - (120 + np.linspace(0, 50, 100)[25:75])).max() < 5       # but it follows


def test_dlib_finds_the_astronaut_and_nothing_in_the_dark(detect):
    points = detect(np.asarray(Image.open(PHOTO)))
    assert points.shape == (68, 2)
    assert points[30] == pytest.approx((224, 120), abs=12)      # the tip of her nose
    assert points[36, 0] < points[45, 0] and points[36:48, 1].max() < points[48:, 1].min()
    assert detect(np.zeros((300, 200, 3), np.uint8)) is None


def picture(path, image, **options):
    image.save(path, **options)
    return decode.read_photo(path)


def test_photos_of_every_kind(tmp_path):
    rgb = Image.new("RGB", (30, 20), (200, 100, 50))
    assert picture(tmp_path / "a.png", rgb).shape == (20, 30, 3)
    exif = Image.Exif()
    exif[0x0112] = 6                                                            # a phone held upright
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


CORNER = np.zeros((32, 64, 3), np.uint8)
CORNER[:16, :32] = 255      # top left


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_turns_a_photo_whoever_decodes_it(tmp_path, suffix):
    """PIL as a photo, FFmpeg as a driver of one frame."""
    seen = set()
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.{suffix}"
        Image.fromarray(CORNER).save(path, exif=exif, quality=95)
        photo = decode.read_photo(path)
        turned = orientation > 4
        assert photo.shape == ((64, 32, 3) if turned else (32, 64, 3))
        rows, columns = np.nonzero(photo[..., 0] > 128)
        seen.add((turned, rows.mean() < photo.shape[0] / 2, columns.mean() < photo.shape[1] / 2))
        frame = decode.to_rgb(next(decode.read_video(path)))
        assert frame.shape == photo.shape and np.abs(frame.astype(int) - photo).mean() < 4
    assert len(seen) == 8


def test_odd_exif_costs_no_photo(tmp_path):
    """Phones write such tags: here a number as text."""
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0
    Image.fromarray(CORNER).save(tmp_path / "a.jpg", exif=exif)
    blob = (tmp_path / "a.jpg").read_bytes()
    at = blob.index(b"\x01\x1a\x00\x05")        # XResolution, a fraction: now it is text
    (tmp_path / "a.jpg").write_bytes(blob[:at + 3] + b"\x02" + blob[at + 4:])
    assert decode.read_photo(tmp_path / "a.jpg").shape == (64, 32, 3)


def test_nothing_is_averaged_across_a_cut():
    points = np.zeros((50, 68, 2))
    points[:, 36:42], points[:, 42:48], points[:, [48, 54]] = (100, 90), (140, 90), (120, 130)
    points[25:] += 300
    assert faces.steady_boxes(points, np.arange(50) / 25)[:, 0] == pytest.approx([120] * 25 + [420] * 25)


def test_a_download_with_a_wrong_hash_is_refused(tmp_path, monkeypatch):
    from face_alignment.detection.sfd import sfd_detector
    (tmp_path / "net-0123456789.pth").write_bytes(b"something else")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(sfd_detector.models_urls, "s3fd", (tmp_path / "net-0123456789.pth").as_uri())
    with pytest.raises(UserError, match="invalid hash value"):
        faces.landmark_detector("fan")
    assert not list((tmp_path / "home/hub/checkpoints").iterdir())


# ------------------------------------------------------------------------------------------ which face

EYES = (224, 110)      # between the astronaut's eyes, in the bundled photo


def saved_again(image, **options):
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, **options)
    return np.asarray(Image.open(buffer).convert("RGB"))


@pytest.mark.parametrize("quality", [95, 80, 60, 40])
@pytest.mark.parametrize("side", [512, 480, 640])
def test_the_face_is_taken_and_not_the_patch(detect, quality, side):
    """In ordinary re-savings her mission patch has the larger box, and a score of next to nothing."""
    image = Image.open(PHOTO).resize((side, side), Image.LANCZOS)
    points = detect(saved_again(image, format="JPEG", quality=quality))
    scale = side / 512
    assert np.linalg.norm(points[27] - np.array(EYES) * scale) < 25 * scale


def two_heads(face, gap=20, small=1.0):
    """The head, and beside it the mirrored one, `small` times as large: uint8 (200, W, 3)."""
    other = Image.fromarray(face[:, ::-1])
    other = np.asarray(other.resize((round(240 * small), round(200 * small)), Image.LANCZOS))
    canvas = np.full((200, 240 + gap + 240, 3), 128, np.uint8)
    canvas[:, :240] = face
    canvas[:other.shape[0], 240 + gap:240 + gap + other.shape[1]] = other
    return canvas


def test_which_face_and_the_words_on_it():
    image = np.zeros((200, 400, 3), np.uint8)
    box = lambda x, width: (x - width / 2, 100 - width / 2, x + width / 2, 100 + width / 2)
    left, right = faces.Face(box(100, 80), 2.0), faces.Face(box(300, 90), 1.9)
    patch = faces.Face(box(200, 150), 0.1)
    # the larger of two that are sure
    assert faces.which_face([left, right, patch], image) is right
    assert faces.which_face([left, patch], image) is left
    said = faces.words_on_choice([left, right, patch], right, "x.jpg")
    assert "2 faces in x.jpg: took the one on the right; crop the photo" in said
    assert faces.words_on_choice([left, patch], left, "x.jpg") is None           # that was no choice
    middle = faces.Face(box(210, 60), 2.0)
    assert faces.where(middle, [left, middle, right]) == "in the middle"
    beside = faces.Face(box(30, 70), 2.0)
    # nearly as large, and in the middle
    assert faces.which_face([beside, middle], image) is middle


def test_two_people_in_a_photo_are_told(tmp_path, face, detect):
    said = []
    Image.fromarray(two_heads(face, small=0.8)).save(tmp_path / "two.png")
    (_, points, _), = folders.faces_in(tmp_path / "two.png", detect, 128, complain=said.append)
    assert len(said) == 1 and "2 faces in" in said[0] and "on the left" in said[0]
    said.clear()
    list(folders.faces_in(PHOTO, detect, 128, complain=said.append))
    assert said == []


def test_fan_weighs_its_scores_too(face):
    """The FAN branch, with a stand-in for its networks: they take a download."""
    class Fan:
        face_detector = type("SFD", (), {"detect_from_image": staticmethod(lambda image: [
            np.array([10, 10, 190, 190, 0.55]), np.array([60, 40, 120, 110, 0.999])])})

        def get_landmarks_from_image(self, image, detected_faces):
            left, top, right, bottom, _ = detected_faces[0]
            return [np.tile([(left + right) / 2, (top + bottom) / 2, 0], (68, 1))]
    detect = faces.FanDetector.__new__(faces.FanDetector)
    detect.fan = Fan()
    assert detect(face)[0] == pytest.approx([90, 75]) and detect(face).dtype == np.float32


@pytest.mark.parametrize("k,words", [(1, "lies on its side"), (2, "is upside down"), (3, "lies on its side")])
def test_a_photo_that_lies_on_its_side_is_turned(tmp_path, face, detect, k, words):
    said = []
    Image.fromarray(np.rot90(face, k)).save(tmp_path / "lying.png")
    Image.fromarray(face).save(tmp_path / "upright.png")
    (lying, points, _), = folders.faces_in(tmp_path / "lying.png", detect, 128, complain=said.append)
    (upright, expected, _), = folders.faces_in(tmp_path / "upright.png", detect, 128)
    assert words in said[0] and points == pytest.approx(expected, abs=1e-3) and np.array_equal(lying, upright)


def test_no_face_is_said_with_advice_that_fits(tmp_path, detect):
    Image.new("RGB", (200, 200)).save(tmp_path / "dark.png")
    with pytest.raises(UserError, match="no face found in .*dark.png, however turned"):
        list(folders.faces_in(tmp_path / "dark.png", detect, 128))


def test_all_photos_without_a_face_are_named_at_once(tmp_path, detect):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    (tmp_path / "c.jpg").write_text("no picture")
    config = Config(64, landmarks="dlib")
    photos = [tmp_path / "a.png", PHOTO, tmp_path / "b.png", tmp_path / "c.jpg"]
    with pytest.raises(UserError) as e:
        finetune.load_parts(photos, config, detect)
    assert all(name in str(e.value) for name in ("a.png", "b.png", "c.jpg")) and "\n" not in str(e.value)


def test_several_people_in_the_photos_are_told(tmp_path, face, detect, capsys):
    config = Config(64, landmarks="dlib")
    Image.fromarray(face).save(tmp_path / "her.png")
    assert len(finetune.load_parts([PHOTO, tmp_path / "her.png"], config, detect)) == 2
    assert capsys.readouterr().err == ""
    finetune.load_parts([PHOTO, PHOTO.with_name("mona_lisa.jpg")], config, detect)
    assert "mona_lisa.jpg may show somebody else" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- photos

def wide_gamut():
    """A profile whose red, green and blue are those of sRGB with the channels changed about: easy to tell."""
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
        assert decode.read_photo(tmp_path / name)[4, 4] == pytest.approx([20, 220, 20], abs=6)
    red.convert("RGBA").save(tmp_path / "c.png", icc_profile=wide_gamut())
    assert decode.read_photo(tmp_path / "c.png")[4, 4] == pytest.approx([20, 220, 20], abs=6)
    red.save(tmp_path / "d.png", icc_profile=b"damaged")
    assert decode.read_photo(tmp_path / "d.png")[4, 4].tolist() == [220, 20, 20]
    # of another mode than the picture
    red.convert("L").save(tmp_path / "e.png", icc_profile=wide_gamut())
    assert np.ptp(decode.read_photo(tmp_path / "e.png")[4, 4]) == 0


def test_jfif_and_pictures_that_only_ffmpeg_reads(tmp_path, face):
    Image.fromarray(face).save(tmp_path / "a.jfif", "JPEG", quality=95)
    assert np.abs(decode.read_photo(tmp_path / "a.jfif").astype(int) - face).mean() < 3
    # as a phone's: one HEVC or H.264 picture
    with av.open(str(tmp_path / "a.heic"), "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=1, options={"crf": "5"})
        stream.height, stream.width, stream.pix_fmt = *face.shape[:2], "yuv420p"
        out.mux(stream.encode(av.VideoFrame.from_ndarray(face, format="rgb24")))
        out.mux(stream.encode())
    assert np.abs(decode.read_photo(tmp_path / "a.heic").astype(int) - face).mean() < 4
    exif = Image.Exif()
    exif[0x0112] = 6
    with open(tmp_path / "b.heic", "wb") as file:       # with EXIF, of which PyAV knows nothing
        Image.fromarray(face).save(file, "AVIF", quality=95, exif=exif)
    turned, profile = decode.read_still(tmp_path / "b.heic")
    assert turned.shape == (face.shape[1], face.shape[0], 3) and profile is None
    assert np.abs(turned.astype(int) - np.rot90(face, -1)).mean() < 6
    with pytest.raises(UserError, match="is a folder, and a photo is wanted"):
        decode.read_photo(tmp_path)
    with pytest.raises(UserError, match="no file"):
        decode.read_photo(tmp_path / "none.heic")
