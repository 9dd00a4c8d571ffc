"""tracking.py and following.py: which face of a video is followed, and tracks."""
import numpy as np
import pytest
from PIL import Image

from conftest import PHOTO, moving, write_clip
from media import faces, folders, photos, tracking
from media.crops import face_box
from media.recognition import Recognition, tell_apart
from runtime.files import UserError


def test_tracks_repeat_the_landmarks_of_faceless_frames(clip, detect, tmp_path):
    track = tracking.track_video(clip, detect)
    assert len(track.pts) == 20 and np.flatnonzero(~track.found).tolist() == [7, 8]
    assert (track.points[7] == track.points[6]).all() and (track.points[8] == track.points[6]).all()
    tracking.save_track(tmp_path / "t.npz", track)
    back = tracking.load_track(tmp_path / "t.npz")
    assert all(np.array_equal(a, b) for a, b in zip(track, back))
    assert track.seconds()[-1] == pytest.approx((9 * 512 + 10 * 768) / 12800)
    tracking.save_track(tmp_path / "still.npz", track._replace(pts=np.zeros(20, np.int64)))
    with pytest.raises(UserError, match="is not a landmark track"):
        tracking.load_track(tmp_path / "still.npz")


def two_people(face, n, hidden=()):
    """-> n frames of 200 x 500 pixels with two heads that move. The left one is missing in `hidden`."""
    frames = []
    for k in range(n):
        frame = np.full((200, 500, 3), 128, np.uint8)
        if k not in hidden:
            frame[:180, 5 + k % 5:225 + k % 5] = face[20:, 10:230]
        # the right one changes its size, so that it sometimes has the larger box and sometimes not
        size = 1.0 + 0.12 * np.sin(k)
        mirrored = Image.fromarray(face[20:, 10:230][:, ::-1])
        other = np.asarray(mirrored.resize((round(200 * size), round(164 * size))))
        frame[:other.shape[0], 260:260 + other.shape[1]] = other
        frames.append(frame)
    return frames


def side(track):
    """-> for each frame of a track, 0 if the left person was followed and 1 for the right one."""
    return (track.points[:, :, 0].mean(1) > 240).astype(int)


def test_the_track_stays_with_one_of_two_people(tmp_path, face, detect):
    said = []
    hidden = range(20, 30)      # 0.4 s, after which it does not choose again yet
    write_clip(tmp_path / "two.mp4", two_people(face, 50, hidden), np.arange(50) * 512, sound=False)
    track = tracking.track_video(tmp_path / "two.mp4", detect, complain=said.append)
    first = side(track)[0]
    assert (side(track) == first).all()
    assert track.found.sum() >= (50 if first else 38)
    assert len(said) == 1 and "show several faces" in said[0] and ("left", "right")[first] in said[0]
    prepared = list(folders.faces_in(tmp_path / "two.mp4", detect, 64, complain=said.append))
    assert len(prepared) == track.found.sum()


def test_another_is_chosen_after_a_second_without_the_first(tmp_path, face, detect):
    frames = two_people(face, 70, range(20, 70))
    for frame in frames[:20]:
        frame[:, 240:] = 128        # at first only the left one is visible
    write_clip(tmp_path / "two.mp4", frames, np.arange(70) * 512, sound=False)
    follower = tracking.Follower(detect)
    track = tracking.follow_face(tmp_path / "two.mp4", follower, lambda k: True, False, lambda line: None)
    assert track.found[:20].all() and (side(track)[:20] == 0).all()
    assert track.found[50:].all() and (side(track)[50:] == 1).all()


def two_who_differ(n, away, left, right):
    """-> n frames of 220 x 500 pixels with two different people. The left one is not in the frames `away`."""
    frames = []
    for k in range(n):
        frame = np.full((220, 500, 3), 128, np.uint8)
        far = min((abs(k - m) for m in away), default=n)        # the number of frames before or after `away`
        out = np.clip(24 * (11 - far), 0, 240)                  # the pixels by which the head is outside
        frame[:200, k % 3:240 - out + k % 3] = left[:, out:]
        frame[10:210, 255 + k % 2:495 + k % 2] = right
        frames.append(frame)
    return frames


@pytest.fixture(scope="module")
def other(detect):
    """Another person's head, as large as `face`, uint8 (200, 240, 3)."""
    image = photos.read_photo(PHOTO.with_name("mona_lisa.jpg"))
    x, y, half = face_box(detect(image))
    part = Image.fromarray(image).crop((round(x - 1.5 * half), round(y - 1.25 * half), round(x + 1.5 * half),
                                        round(y + 1.25 * half)))
    return np.asarray(part.resize((240, 200), Image.LANCZOS))


@pytest.mark.parametrize("abrupt", [False, True])
def test_a_person_who_returns_is_followed_again(tmp_path, face, other, detect, abrupt):
    said, asked = [], []
    frames = two_who_differ(140, () if abrupt else range(50, 100), face, other)
    for frame in frames[:5]:
        frame[:, 250:] = 128        # so that the left one is chosen first
    for frame in frames[50:100] if abrupt else ():
        frame[:, :250] = 128
    write_clip(tmp_path / "a.mp4", frames, np.arange(140) * 512)
    first = side(tracking.track_video(tmp_path / "a.mp4", detect))
    assert (first[:45] == 0).all() and (first[-30:] == 1).all()     # without recognition it does not return
    recognition = tell_apart()
    counted = recognition._replace(vector=lambda *shot: asked.append(1) or recognition.vector(*shot))
    again = side(tracking.track_video(tmp_path / "a.mp4", detect, complain=said.append, recognition=counted))
    assert (again[:45] == 0).all() and (again[-25:] == 0).all()
    assert "returned to the same person (times: 1)" in said[0] and len(asked) < 20


def test_a_person_who_returns_smaller_is_followed_again(tmp_path, face, other, detect):
    """On the small copy on which the other face is found, the returning one is not."""
    frames = two_who_differ(140, (), face, other)
    for k, frame in enumerate(frames):
        left = frame[:200, :240].copy()
        frame[:, 250:] = 128 if k < 60 else frame[:, 250:]
        frame[:, :250] = 128 if k >= 50 else frame[:, :250]
        if k >= 70:
            frame[20:130, 20:152] = np.asarray(Image.fromarray(left).resize((132, 110), Image.LANCZOS))
    large = [frame.repeat(2, axis=0).repeat(2, axis=1) for frame in frames]
    write_clip(tmp_path / "a.mp4", large, np.arange(140) * 512)
    track = tracking.track_video(tmp_path / "a.mp4", detect, recognition=tell_apart())
    of_left = track.points[:, :, 0].mean(1) < 480
    assert of_left[:50].all() and not of_left[60:70].any() and of_left[-40:].all()


def test_a_face_that_is_suddenly_elsewhere_is_followed_at_once(tmp_path, face, detect):
    """The cut is not detected, because the thumbnails hardly differ."""
    alone = two_who_differ(50, (), face, np.full_like(face, 128))
    frames = []
    for k, small in enumerate(alone):
        frame = np.full((660, 1500, 3), 128, np.uint8)
        frame[:220, :500] = small
        frames.append(frame if k < 25 else frame[:, ::-1])
    write_clip(tmp_path / "a.mp4", frames, np.arange(50) * 512, sound=False)
    track = tracking.track_video(tmp_path / "a.mp4", detect, recognition=tell_apart())
    assert track.found.all() and not track.cuts.any()
    assert (track.points[:, :, 0].mean(1) > 750).tolist() == [False] * 25 + [True] * 25


def test_the_user_hears_of_somebody_else_who_is_followed(tmp_path, face, other, detect):
    """There are never two faces in a frame: the one person leaves, and another comes."""
    said = []
    for name, second in (("two.mp4", other), ("one.mp4", face)):
        frames = two_who_differ(100, (), face, second)
        for k, frame in enumerate(frames):
            frame[:, 250:] = 128 if k < 60 else frame[:, 250:]
            frame[:, :250] = 128 if k >= 60 else frame[:, :250]
        write_clip(tmp_path / name, frames, np.arange(100) * 512)
        tracking.track_video(tmp_path / name, detect, complain=said.append, recognition=tell_apart())
    line, = said
    assert "two.mp4: 4" in line and "of 100 frames follow somebody who looks unlike" in line


def test_a_cut_to_somebody_at_the_same_place_is_told(tmp_path, face, other, detect):
    """A flash looks like a cut, too, but after it the same person is there."""
    said, dark = [], [np.zeros((220, 500, 3), np.uint8)]
    for name, second in (("two.mp4", other), ("flash.mp4", face)):
        alone = [two_who_differ(30, (), head, np.full_like(face, 128)) for head in (face, second)]
        write_clip(tmp_path / name, alone[0] + dark * (name == "flash.mp4") + alone[1], np.arange(61) * 512)
        tracking.track_video(tmp_path / name, detect, complain=said.append, recognition=tell_apart())
    line, = said
    assert "two.mp4: 30 of 60 frames follow somebody who looks unlike" in line


def test_recognition_is_not_used_without_a_choice(tmp_path, face, detect):
    """Only at the end, to see whether the one who came after a while is the one who left."""
    asked = []

    def vector(frame, points):
        asked.append(frame)
        return np.ones(1)
    frames = two_who_differ(75, range(20, 50), face, np.full_like(face, 128))
    write_clip(tmp_path / "a.mp4", frames, np.arange(75) * 512, sound=False)
    track = tracking.track_video(tmp_path / "a.mp4", detect, recognition=Recognition(vector, 0.9, 0.8))
    assert track.found[:10].all() and not track.found[30:45].any() and track.found[-10:].all()
    assert len(asked) == 2


def test_after_a_cut_the_person_who_was_followed_most_is_preferred(tmp_path, face, other, detect):
    grey = np.full_like(face, 128)
    alone = two_who_differ(40, (), face, grey)
    cutaway = [frame[:, ::-1] // 2 for frame in two_who_differ(20, (), other, grey)]
    both = [255 - np.full_like(frame, 100) if (k < 1) else frame
            for k, frame in enumerate(two_who_differ(30, (), other, face))]
    write_clip(tmp_path / "a.mp4", alone + cutaway + both, np.arange(90) * 512, sound=False)
    track = tracking.track_video(tmp_path / "a.mp4", detect, recognition=tell_apart())
    assert (side(track)[62:] == 1).all()


def test_after_a_cut_a_face_is_chosen_at_once(tmp_path, face, detect):
    left = [f.copy() for f in two_people(face, 20)]
    for frame in left:
        frame[:, 240:] = 128
    right = [255 - np.full_like(f, 128) // 2 for f in left]
    for frame in right:
        frame[:180, 270:490] = face[20:, 10:230]
    write_clip(tmp_path / "cut.mp4", left + right, np.arange(40) * 512, sound=False)
    track = tracking.track_video(tmp_path / "cut.mp4", detect)
    assert track.found.all() and side(track).tolist() == [0] * 20 + [1] * 20
    assert np.flatnonzero(track.cuts).tolist() == [20]


def test_a_cut_is_stored_with_the_first_face_after_it(tmp_path, face, detect):
    """Black frames, the face, a title without a face, the face a little larger, and within it a flash."""
    title = np.random.default_rng(0).integers(0, 255, (160, 200, 3), np.uint8)
    before = [face[20 + k % 3:180 + k % 3, 20:220] for k in range(30)]
    larger = [np.asarray(Image.fromarray(f).resize((200, 160), box=(10, 8, 190, 152))) for f in before]
    larger[20] = np.full_like(title, 255)
    frames = [np.zeros_like(title)] * 5 + before[:20] + [title] * 5 + larger
    write_clip(tmp_path / "a.mp4", frames, np.arange(60) * 512, sound=False)
    track = tracking.track_video(tmp_path / "a.mp4", detect)
    assert (~track.found).sum() == 11 and np.flatnonzero(track.cuts).tolist() == [30, 51]
    assert (track.shots() == np.repeat([0, 1], 30)).all()       # the flash is not a cut
    tracking.save_track(tmp_path / "t.npz", track)
    assert (tracking.load_track(tmp_path / "t.npz").cuts == track.cuts).all()
    tracking.save_track(tmp_path / "t.npz", track._replace(cuts=~track.found))
    with pytest.raises(UserError, match="is not a landmark track"):
        tracking.load_track(tmp_path / "t.npz")


def test_a_video_that_lies_on_its_side_is_rotated(tmp_path, face, detect):
    said = []
    write_clip(tmp_path / "a.mp4", [np.rot90(f) for f in moving(face, 20)], np.arange(20) * 512, sound=False)
    track = tracking.track_video(tmp_path / "a.mp4", detect, complain=said.append)
    assert track.found.all() and track.turns == 3 and "lies on its side" in said[0]
    assert len(list(folders.faces_in(tmp_path / "a.mp4", detect, 64, complain=said.append))) == 20
    tracking.save_track(tmp_path / "t.npz", track)
    assert np.array_equal(tracking.load_track(tmp_path / "t.npz").points, track.points)


def test_large_copies_are_searched_rarely_in_an_intro_without_faces(tmp_path, face, detect):
    intro = [np.random.default_rng(0).integers(0, 255, (160, 200, 3), np.uint8)] * 50
    write_clip(tmp_path / "a.mp4", intro + moving(face, 10), np.arange(60) * 512, sound=False)
    looked = []

    class Counting(faces.DlibDetector):
        def faces_at(self, image, side):
            looked.append(side)
            return super().faces_at(image, side)
    track = tracking.track_video(tmp_path / "a.mp4", Counting())
    # it is found from the first frame with a face on
    assert track.found.tolist() == [False] * 50 + [True] * 10
    assert looked.count(1024) <= 5


def test_the_next_frame_is_searched_ahead_and_only_once(tmp_path, face, detect, monkeypatch):
    write_clip(tmp_path / "a.mp4", moving(face, 10), np.arange(10) * 512, sound=False)
    called = []

    def noted(name):
        original = getattr(detect, name)
        return lambda *arguments: called.append(name) or original(*arguments)
    for name in ("begin", "search", "landmarks"):
        monkeypatch.setattr(detect, name, noted(name))
    track = tracking.track_video(tmp_path / "a.mp4", detect)
    assert called == ["search", *["begin", "search", "landmarks"] * 9, "landmarks"]
    monkeypatch.setattr(detect, "begin", lambda image, side: None)
    assert np.array_equal(track.points, tracking.track_video(tmp_path / "a.mp4", detect).points)


def test_what_was_begun_for_another_picture_or_size_is_not_used(face, detect):
    mirrored = np.ascontiguousarray(face[:, ::-1])
    right, large = detect.faces_at(mirrored, 256), detect.faces_at(face, 512)
    detect.begin(face, 256)
    assert detect.faces_at(mirrored, 256) == right and detect.faces_at(face, 512) == large
    assert right and large and right != detect.faces_at(face, 256)


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.7])
def test_pictures_are_rescaled_as_by_pil(face, scale):
    large = faces.rescaled(face, scale)
    height, width = large.shape[:2]
    assert large.flags.c_contiguous     # otherwise, dlib would copy it
    expected = np.asarray(Image.fromarray(face).resize((width, height), Image.BILINEAR)).astype(int)
    assert np.abs(large - expected).max() <= 2 and (large == expected).mean() > 0.98
    assert (height, width) == tuple(round(side * scale) for side in face.shape[:2])
