"""faces.py, crops.py and finetune.load_photos: the choice of a face, crops, and warnings about photos."""
import io

import numpy as np
import pytest
from PIL import Image

import finetune
from conftest import PHOTO
from media import crops, faces, folders
from model import Config
from runtime.files import UserError


def test_crop_follows_its_definition(face):
    points = np.zeros((68, 2), np.float32)
    points[36:42], points[42:48], points[[48, 54]] = (100, 90), (140, 90), (120, 130)
    assert crops.face_box(points) == pytest.approx([120, 110, max(2 * 40, 1.8 * 40)])
    box = np.array([120.0, 100.0, 50.0])
    centre, corner = (120.0, 100.0), (70.0, 50.0)
    mapped = crops.to_crop(np.array([centre, corner]), box, 100)
    assert mapped == pytest.approx(np.array([[49.5, 49.5], [-.5, -.5]]))


def test_a_crop_stays_in_the_picture_where_it_fits():
    image = np.zeros((100, 200, 3), np.uint8)

    def edges(*box):
        x, y, half = crops.inside(np.array(box), image)
        return x + .5 - half, x + .5 + half, y + .5 - half, y + .5 + half
    assert edges(100.0, 50.0, 30.0) == pytest.approx((70.5, 130.5, 20.5, 80.5))     # it stays where it is
    assert edges(10.0, 90.0, 30.0) == pytest.approx((0, 60, 40, 100))               # it is moved
    assert edges(10.0, 90.0, 70.0) == pytest.approx((0, 140, -20, 120))     # it is too high, so it is centred


def test_points_stay_on_the_same_pixels_in_the_crop():
    image = np.zeros((120, 160, 3), np.uint8)
    image[61:64, 81:84] = 255       # a dot around (82, 62)
    box = np.array([90.3, 55.7, 40.2])
    x, y = crops.to_crop(np.array([[82.0, 62.0]]), box, 256)[0]
    bright = np.argwhere(crops.crop(image, box, 256)[..., 0] > 128).mean(0)
    assert (y, x) == pytest.approx(tuple(bright), abs=0.6)


def test_a_crop_beyond_the_border_continues_its_colours_and_shows_no_face(face, detect):
    out = crops.crop(face, np.array([115.5, -20.5, 64.0]), 256)         # its upper 84 of 128 rows are made up
    inside = crops.crop(face, np.array([115.5, 63.5, 64.0]), 256)       # its first row is the picture's
    edge, known = 168, 88
    assert np.abs(out[edge + 2:].astype(int) - inside[2:known]).mean() < 2      # the known part is unchanged
    border = out[edge + 2].astype(int)
    assert np.abs(out[edge - 2] - border).mean() < 12                   # the border's colours continue ...
    detail = lambda rows: np.abs(np.diff(rows.astype(int), axis=1)).mean()
    assert detail(out[:edge // 2]) < 0.15 * detail(out[edge:])          # ... and become blurred
    assert detect(np.ascontiguousarray(out[:edge])) is None
    assert crops.crop(face[:1, :1], np.array([0.0, 0.0, 30.0]), 64).shape == (64, 64, 3)


def test_the_share_of_a_crop_that_is_made_up():
    image = np.zeros((100, 200, 3), np.uint8)
    assert crops.made_up(np.array([99.5, 49.5, 50.0]), image) == pytest.approx(0)       # exactly as high
    assert crops.made_up(np.array([99.5, 49.5, 100.0]), image) == pytest.approx(0.5)
    assert crops.made_up(np.array([-0.5, -0.5, 10.0]), image) == pytest.approx(0.75)


def test_landmarks_are_finer_than_a_pixel(detect):
    """On a picture of a quarter of the size, they are closer to those of the full size than dlib's own."""
    image = np.asarray(Image.open(PHOTO))
    expected = detect(image)
    small = np.asarray(Image.fromarray(image).resize((128, 128), Image.LANCZOS))
    found = faces.Face(tuple((np.array(detect.faces(image)[0].box) + 0.5) / 4 - 0.5), 1.0)
    points = (detect.landmarks(small, found) + 0.5) * 4 - 0.5
    rounded = (np.array(detect.predict(small, np.array(found.box))) + 0.5) * 4 - 0.5
    eyes = np.linalg.norm(expected[36] - expected[45])
    error = lambda p: np.linalg.norm(p - expected, axis=1).mean() / eyes
    assert error(points) < 0.7 * error(rounded) and (points % 1).std() > 0.1
    assert points.dtype == np.float32


def test_small_and_tight_photos_get_a_warning(tmp_path, face, detect, capsys):
    config = Config(64, (8, 16, 16), landmarks="dlib")
    tiny = Image.fromarray(face).resize((84, 70), Image.LANCZOS)
    tight = face[25:170, 50:175]
    Image.fromarray(tight).resize((500, 580)).save(tmp_path / "tight.png")
    tiny.save(tmp_path / "tiny.png")
    finetune.load_photos([PHOTO], config, detect)
    assert capsys.readouterr().err == ""
    finetune.load_photos([tmp_path / "tight.png"], config, detect)
    line, = capsys.readouterr().err.splitlines()
    assert "tight.png is cut tight" in line and "% of the crop lies outside the picture" in line
    finetune.load_photos([tmp_path / "tiny.png"], config, detect)
    line, = capsys.readouterr().err.splitlines()
    assert "tiny.png is only" in line and "pixels wide" in line


def test_boxes_of_a_video_are_steady():
    rng = np.random.default_rng(0)
    face = np.zeros((68, 2))
    face[36:42], face[42:48], face[[48, 54]] = (100, 90), (140, 90), (120, 130)
    # a slow motion with jitter
    points = face + rng.normal(0, 3, (100, 1, 2)) + np.linspace(0, 50, 100)[:, None, None]
    boxes = crops.steady_boxes(points, np.arange(100) / 25, np.zeros(100))
    assert np.abs(np.diff(boxes[:, 0])).max() < 1.0 < np.abs(np.diff(crops.face_box(points)[:, 0])).max()
    assert np.abs(boxes[25:75, 0] - (120 + np.linspace(0, 50, 100)[25:75])).max() < 5   # it follows the face


def test_a_face_that_walks_stays_in_its_crop():
    """By six times its width in a second, between two seconds at rest: the mean over time is late."""
    x = np.interp(np.arange(125), [50, 75], [120, 600])
    points = np.stack([head(1, (at, 110)) for at in x])
    boxes = crops.steady_boxes(points, np.arange(125) / 25, np.zeros(125))
    assert np.abs(boxes[:, 0] - x).max() == pytest.approx(0.3 * 80)
    inside = crops.to_crop(points, boxes, 256)
    assert inside.min() > 0 and inside.max() < 255


def test_dlib_finds_the_astronaut_and_nothing_in_the_dark(detect):
    points = detect(np.asarray(Image.open(PHOTO)))
    assert points.shape == (68, 2)
    assert points[30] == pytest.approx((224, 120), abs=12)      # the tip of her nose
    assert points[36, 0] < points[45, 0] and points[36:48, 1].max() < points[48:, 1].min()
    assert detect(np.zeros((300, 200, 3), np.uint8)) is None


def head(size, at=(120, 110)):
    """Landmarks (68, 2) of a head, on a circle except for eyes and mouth, `size` times as large."""
    angle = np.linspace(0, 2 * np.pi, 68)
    points = 40 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    points[36:42], points[42:48], points[[48, 54]] = (-20, -20), (20, -20), (0, 20)
    return size * points + at


def shots_of(sizes, found=None, cuts=None, at=(120, 110)):
    """crops.shots() of a video in which the head has these sizes. By default it is found in every frame."""
    points = np.stack([head(size, at) for size in sizes])
    points += np.random.default_rng(0).normal(0, 0.5, points.shape)
    none = np.zeros(len(sizes), bool)
    return crops.shots(points, ~none if found is None else found, none if cuts is None else cuts)


def test_nothing_is_averaged_across_a_cut():
    points = np.stack([head(1)] * 25 + [head(1, (420, 110))] * 25)
    shot = crops.shots(points, np.ones(50, bool), np.zeros(50, bool))
    centres = crops.steady_boxes(points, np.arange(50) / 25, shot)[:, 0]
    assert centres == pytest.approx([120] * 25 + [420] * 25)
    points = np.stack([head(1)] * 25 + [head(1.2)] * 25)
    shot = crops.shots(points, np.ones(50, bool), np.zeros(50, bool))
    sizes = crops.steady_boxes(points, np.arange(50) / 25, shot)[:, 2]
    assert sizes == pytest.approx([80] * 25 + [96] * 25)


@pytest.mark.parametrize("zoom", [1.1, 1.2, 1.35, 1.5, 1 / 1.1, 1 / 1.35])
def test_a_sudden_change_of_size_is_a_cut(zoom):
    assert (shots_of([1] * 20 + [zoom] * 20) == np.repeat([0, 1], 20)).all()
    there_and_back = [1] * 20 + [zoom] * 8 + [1] * 20
    assert (shots_of(there_and_back) == np.repeat([0, 1, 2], [20, 8, 20])).all()


def test_leaning_forward_and_errors_of_the_detector_are_no_cuts():
    lean = np.exp(np.log(1.5) * np.clip(np.linspace(-1, 2, 15), 0, 1))      # within five frames
    assert (shots_of([1] * 20 + list(lean) + [1.5] * 20) == 0).all()
    error = [1] * 20 + [1.3] + [1] * 20
    assert (shots_of(error) == 0).all()
    assert (shots_of([1] * 20 + [1.3, 1.35] + [1] * 20) == 0).all()
    found = np.arange(40) // 5 != 4             # not from 20 to 24, while the head may have come closer
    assert (shots_of([1] * 25 + [1.2] * 15, found) == 0).all()


def test_a_visible_cut_counts_if_the_face_moves():
    points, cuts = np.stack([head(1)] * 30 + [head(1, (140, 110))] * 10), np.arange(40) % 30 == 10
    cuts[30] = True
    assert (crops.shots(points, np.ones(40, bool), cuts) == np.repeat([0, 1], [30, 10])).all()
    assert (crops.shots(points, np.ones(40, bool), np.zeros(40, bool)) == 0).all()      # a quick movement
    assert (shots_of([1] * 40, cuts=cuts) == 0).all()


def test_a_download_with_a_wrong_hash_is_refused(tmp_path, monkeypatch):
    from face_alignment.detection.sfd import sfd_detector
    (tmp_path / "net-0123456789.pth").write_bytes(b"something else")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(sfd_detector.models_urls, "s3fd", (tmp_path / "net-0123456789.pth").as_uri())
    with pytest.raises(UserError, match="invalid hash value"):
        faces.landmark_detector("fan")
    assert not list((tmp_path / "home/hub/checkpoints").iterdir())


# ------------------------------------------------------------------------------------------ which face

EYES = (224, 110)       # the point between the astronaut's eyes, in the bundled photo


def saved_again(image, **options):
    """Save a PIL picture with these options and read it again -> uint8 (H, W, 3)."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, **options)
    return np.asarray(Image.open(buffer).convert("RGB"))


@pytest.mark.parametrize("quality", [95, 80, 60, 40])
@pytest.mark.parametrize("side", [512, 480, 640])
def test_the_face_is_used_and_not_the_mission_patch(detect, quality, side):
    """In many copies of the photo, her mission patch has the larger box, but a score of nearly 0."""
    image = Image.open(PHOTO).resize((side, side), Image.LANCZOS)
    points = detect(saved_again(image, format="JPEG", quality=quality))
    scale = side / 512
    assert np.linalg.norm(points[27] - np.array(EYES) * scale) < 25 * scale


def two_heads(face, gap=20, small=1.0):
    """The head, and to its right the mirrored head, `small` times as large: uint8 (200, W, 3)."""
    other = Image.fromarray(face[:, ::-1])
    other = np.asarray(other.resize((round(240 * small), round(200 * small)), Image.LANCZOS))
    canvas = np.full((200, 240 + gap + 240, 3), 128, np.uint8)
    canvas[:, :240] = face
    canvas[:other.shape[0], 240 + gap:240 + gap + other.shape[1]] = other
    return canvas


def test_the_choice_of_a_face_and_the_line_about_it():
    image = np.zeros((200, 400, 3), np.uint8)
    box = lambda x, width: (x - width / 2, 100 - width / 2, x + width / 2, 100 + width / 2)
    left, right = faces.Face(box(100, 80), 2.0), faces.Face(box(300, 90), 1.9)
    patch = faces.Face(box(200, 150), 0.1)
    # the larger one of two with high scores
    assert faces.which_face([left, right, patch], image) is right
    assert faces.which_face([left, patch], image) is left
    said = faces.words_on_choice([left, right, patch], right, "x.jpg")
    assert "2 faces in x.jpg: used the one on the right; crop the photo" in said
    assert faces.words_on_choice([left, patch], left, "x.jpg") is None      # the patch is no face
    middle = faces.Face(box(210, 60), 2.0)
    assert faces.where(middle, [left, middle, right]) == "in the middle"
    edge = faces.Face(box(30, 70), 2.0)
    # nearly as large, and in the middle
    assert faces.which_face([edge, middle], image) is middle


def test_two_people_in_a_photo_are_reported(tmp_path, face, detect):
    said = []
    Image.fromarray(two_heads(face, small=0.8)).save(tmp_path / "two.png")
    shot, = folders.faces_in(tmp_path / "two.png", detect, 128, complain=said.append)
    assert shot.image.shape == (128, 128, 3)
    assert len(said) == 1 and "2 faces in" in said[0] and "on the left" in said[0]
    said.clear()
    list(folders.faces_in(PHOTO, detect, 128, complain=said.append))
    assert said == []


def test_the_fan_detector_chooses_by_score_too(face):
    """Uses a replacement for the networks, which would have to be downloaded."""
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
def test_a_photo_that_lies_on_its_side_is_rotated(tmp_path, face, detect, k, words):
    said = []
    Image.fromarray(np.rot90(face, k)).save(tmp_path / "lying.png")
    Image.fromarray(face).save(tmp_path / "upright.png")
    lying, = folders.faces_in(tmp_path / "lying.png", detect, 128, complain=said.append)
    upright, = folders.faces_in(tmp_path / "upright.png", detect, 128)
    assert words in said[0] and lying.points == pytest.approx(upright.points, abs=1e-3)
    assert np.array_equal(lying.image, upright.image)


def test_a_photo_without_a_face_is_refused(tmp_path, detect):
    Image.new("RGB", (200, 200)).save(tmp_path / "dark.png")
    with pytest.raises(UserError, match="no face found in .*dark.png, not even with the photo rotated"):
        list(folders.faces_in(tmp_path / "dark.png", detect, 128))


def test_all_photos_without_a_face_are_named_in_one_message(tmp_path, detect):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    (tmp_path / "c.jpg").write_text("no picture")
    config = Config(64, (8, 16, 16), landmarks="dlib")
    photos = [tmp_path / "a.png", PHOTO, tmp_path / "b.png", tmp_path / "c.jpg"]
    with pytest.raises(UserError) as e:
        finetune.load_photos(photos, config, detect)
    assert all(name in str(e.value) for name in ("a.png", "b.png", "c.jpg")) and "\n" not in str(e.value)


def test_photos_of_several_people_get_a_warning(tmp_path, face, detect, capsys):
    config = Config(64, (8, 16, 16), landmarks="dlib")
    Image.fromarray(face).save(tmp_path / "her.png")
    assert len(finetune.load_photos([PHOTO, tmp_path / "her.png"], config, detect)) == 2
    assert capsys.readouterr().err == ""
    finetune.load_photos([PHOTO, PHOTO.with_name("mona_lisa.jpg")], config, detect)
    assert "mona_lisa.jpg may not show the same person" in capsys.readouterr().err


def blink(points, opening):
    """-> landmarks (68, 2) in which each eye is open by `opening` of its width."""
    points = points.copy()
    for upper, lower, ends in (([37, 38], [41, 40], [36, 39]), ([43, 44], [47, 46], [42, 45])):
        width = np.linalg.norm(np.subtract(*points[ends]))
        points[lower] = points[upper] + (0, opening * width)
    return points


def test_shut_eyes_get_a_warning_and_open_ones_come_first(detect, monkeypatch, capsys):
    shot, = folders.faces_in(PHOTO, detect, 64)
    assert finetune.eye_opening(shot.points) == pytest.approx(0.33, abs=0.03)
    assert finetune.eye_opening(blink(shot.points, 0.2)) == pytest.approx(0.2, abs=1e-3)
    openings = {"a.jpg": [0.1], "b.jpg": [0.3], "c.jpg": [0.25],
                "d.mp4": [0.1, 0.2, 0.3, 0.3], "e.mp4": [0.1, 0.1]}

    def faces_in(path, *_, **named):
        return [shot._replace(points=blink(shot.points, opening)) for opening in openings[path]]
    monkeypatch.setattr(finetune, "faces_in", faces_in)

    def load(*paths):
        photos = finetune.load_photos(paths, Config(64, (8, 16, 16), landmarks="dlib"), detect)
        found = [[round(float(o), 2) for o in finetune.eye_opening(photo.points)] for photo in photos]
        return found, capsys.readouterr().err.splitlines()
    shut = "warning: the eyes in {} are shut, or nearly so; a photo with open eyes looks better".format
    first = "warning: pose and expression are taken from {}, because the eyes in a.jpg are shut".format
    assert load("b.jpg", "c.jpg") == ([[0.3], [0.25]], [])              # in the user's order if that is good
    assert load("a.jpg") == ([[0.1]], [shut("a.jpg")])
    assert load("a.jpg", "b.jpg", "c.jpg") == ([[0.3], [0.1], [0.25]], [shut("a.jpg"), first("b.jpg")])
    assert load("d.mp4") == ([[0.3, 0.1, 0.2, 0.3]], [])                # blinking in a clip is no problem
    assert load("a.jpg", "d.mp4") == ([[0.3, 0.1, 0.2, 0.3], [0.1]], [shut("a.jpg"), first("d.mp4")])
    assert load("a.jpg", "e.mp4") == ([[0.1], [0.1, 0.1]], [shut("a.jpg"), shut("e.mp4")])
