"""Following one person through a video: which of the faces in each frame is that person's."""
import math
from collections import Counter

import numpy as np

from media.crops import crop, face_box, to_crop
from media.faces import NEARLY, SURE, overlap, where, which_face

LATER = 0.25    # the worth of a frame of anybody but the first person: others may be guests
PEOPLE = 20     # the number of people that are remembered


class Person:
    """Somebody who was followed for a while. worth: the weight of each frame."""

    def __init__(self, worth):
        self.worth, self.frames = worth, 0
        self.score, self.picture = 0.0, None    # the close-up with the highest score
        self.known = None                       # its recognition vector, once it was computed

    def weight(self):
        return self.worth * self.frames

    def followed(self, image, points, score):
        """Count a frame in which this person was followed."""
        self.frames += 1
        if score > self.score:
            self.score, self.picture = score, close_up(image, points)
            self.known = None

    def vector(self, recognition):
        if self.known is None:
            self.known = recognition.vector(*self.picture)
        return self.known


def remembered(people, new):
    """These people and a new one, at most PEOPLE in all: those who were followed least are left out."""
    return [*sorted(people, key=Person.weight)[1 - PEOPLE:], new]


def close_up(image, points, size=256):
    """-> the crop of a face uint8 (size, size, 3), and its landmarks (68, 2) in pixels of the crop."""
    box = face_box(points)
    return crop(image, box, size), to_crop(points, box, size)


class Follower:
    """Follows a face from frame to frame.

    Within a shot it stays with the same face. After a cut, or a second without that face, it chooses again.
    With a `recognition`, it then prefers the person who has been followed most, and it returns to that person
    as soon as they are seen again while somebody else is followed.
    """

    LOST = 1.0          # seconds without the followed face after which another one may be chosen
    PATIENCE = 0.5      # seconds between searches of large copies, or for the main person

    def __init__(self, detector, recognition=None, turns=0):
        """detector: a faces.Detector.  recognition: a recognition.Recognition, or None to do without.

        turns: the frames are rotated by this many times 90 degrees (np.rot90) before look() sees them.
        """
        self.detector, self.recognition, self.turns = detector, recognition, turns
        self.people, self.person = [], None     # all who were followed, and who is followed now
        self.scenes = []            # for report(): a Person for each time that a face was chosen
        self.compared = -math.inf   # when faces were last compared with the people, in seconds
        self.face = None            # the followed face as it was last seen
        self.seen = -math.inf       # the time of that, in seconds
        self.missed = 0             # the number of frames since then
        self.searched = -math.inf   # when large copies were last searched, in seconds
        self.thumbnail = None       # of the previous frame, by which cuts are detected
        self.looks = self.choices = self.returns = 0    # counts for report()
        self.places = Counter()     # the place, in words, of the followed face in frames with several
        self.turned = np.zeros(4, int)  # [k]: how many frames show a face when rotated by k * 90 degrees

    def is_cut(self, thumbnail):
        """Whether a new shot begins here. thumbnail: the frame in grey, uint8 (32, 32)."""
        before, self.thumbnail = self.thumbnail, thumbnail.astype(np.float32)
        return before is None or bool(np.abs(self.thumbnail - before).mean() > 20)

    def look(self, image, seconds, cut, following=None):
        """image uint8 (H, W, 3) -> landmarks (68, 2) of the followed face, or None if it is not visible.

        seconds: the frame's time.  cut: whether a new shot has begun since the last look.
        following: the image of the next look, or None. It is searched for faces while this one's landmarks
        are found.
        """
        self.looks += 1
        lost = self.missed >= 2 and seconds - self.seen > self.LOST
        if self.face is not None and not cut and not lost:
            faces, chosen = self.find_again(image)
            faces, chosen = self.return_to_person(faces, chosen, image, seconds)
        else:
            faces, chosen = self.choose(image, seconds, cut)
            if chosen is not None:
                self.scenes = remembered(self.scenes, Person(worth=1.0))
        if chosen is None:
            self.missed += 1
            return None
        others = [face for face in faces if face is not chosen and face.score >= SURE]
        if others:
            self.places[where(chosen, [chosen, *others])] += 1
        self.face, self.seen, self.missed = chosen, seconds, 0
        if following is not None:
            self.detector.begin(following, self.likely_sides(following)[0])
        points = self.detector.landmarks(image, chosen)
        self.person.followed(image, points, chosen.score)
        self.scenes[-1].followed(image, points, chosen.score)
        return points

    def find_again(self, image):
        """-> ([Face] in the frame, the followed one or None), near its last place and about as large."""
        faces, again, last = [], None, self.face
        for side in self.likely_sides(image):
            faces = self.detector.faces(image, (side,))
            near = [face for face in faces if is_near(face, last)]
            if near:
                again = max(near, key=lambda face: overlap(face.box, last.box))
                break
        surest = max(faces, key=lambda face: face.score, default=None)
        if surest and self.person.score < SURE <= surest.score:     # what was followed was probably no face
            again = surest
        return faces, again

    def likely_sides(self, image):
        """-> the sizes of one or two copies of the image on which the followed face is probably found."""
        sides = self.detector.sides
        at = sides.index(self.face.side)
        if at > 0 and self.face.width() * sides[at - 1] / max(image.shape[:2]) > 100:
            at -= 1                 # the face is large enough to be found on a smaller copy
        return sides[at:at + 2]     # a face that has become smaller is found on the next copy

    def choose(self, image, seconds, cut):
        """-> ([Face] in the frame, the one to follow from now on or None)."""
        thorough = cut or seconds - self.searched >= self.PATIENCE
        faces = self.detector.faces(image, None if thorough else self.detector.sides[:1])
        if thorough:
            self.searched = seconds
        if not faces:
            if thorough:
                self.look_turned(image)
            return [], None
        chosen = which_face(faces, image)
        if self.face is None:
            self.meet()
            return faces, chosen
        likely = [face for face in faces if face.score >= NEARLY * chosen.score]
        known, person = self.recognise(likely, image) if len(likely) > 1 else (None, None)
        if known:
            self.continue_with(person)
            return faces, known
        # If a face is where the followed one was, use it, because a flash looks like a cut.
        same = [face for face in likely if is_near(face, self.face)]
        if not same:
            self.choices += 1
            self.meet()
        return faces, max(same, key=lambda face: overlap(face.box, self.face.box), default=chosen)

    def look_turned(self, image):
        """Count the rotations in which this frame shows a face."""
        for k in (1, 2, 3):
            faces = self.detector.faces(np.ascontiguousarray(np.rot90(image, k)), self.detector.sides[:2])
            self.turned[k] += bool(faces and faces[0].score >= SURE)

    def meet(self):
        """Begin to follow somebody as a new Person, although it may be one of the earlier people."""
        self.person = Person(LATER if self.people else 1.0)
        self.people = remembered(self.people, self.person)

    def continue_with(self, person):
        self.returns += person is not self.person
        self.person = person

    def recognise(self, faces, image):
        """-> (the Face whose person was followed most, that Person), or (None, None) if all are strangers."""
        best, most = (None, None), 0
        if self.recognition is None:
            return best
        for face in faces:
            vector = self.recognition.vector(*close_up(image, self.detector.landmarks(image, face)))
            alike = [p for p in self.people if p.vector(self.recognition) @ vector > self.recognition.same]
            total = sum(person.weight() for person in alike)
            if total > most:
                best, most = (face, max(alike, key=Person.weight)), total
        return best

    def return_to_person(self, faces, chosen, image, seconds):
        """-> ([Face], chosen), with another face chosen if it is the person who was followed longest.

        That can be the person who is followed now, in another place, because some cuts are missed. The person
        may return smaller than the face that is followed meanwhile, so a larger copy is searched.
        """
        longest = max(self.people, key=Person.weight)
        if (self.recognition is None or (longest is self.person and chosen is not None)
                or seconds - self.compared < self.PATIENCE):
            return faces, chosen
        self.compared = seconds
        sides = self.detector.sides
        larger = sides[sides.index(self.face.side) + 1:][:1] or sides[-1:]
        sure = [face for face in self.detector.faces(image, larger) if face.score >= SURE]
        others = [face for face in sure if chosen is None or not is_near(face, chosen)]
        known, person = self.recognise(others, image) if others else (None, None)
        if known is None or person is not longest:
            return faces, chosen
        self.continue_with(person)
        return others + [chosen] * (chosen is not None), known

    def report(self, path):
        """-> a line for the user about whom the track shows, or None if that is plain."""
        words = []
        if self.places:
            (place, _), = self.places.most_common(1)
            words.append(f"{self.places.total()} of {self.looks} frames show several faces: followed the one "
                         f"{place}")
            if self.choices:
                words.append(f"chose again after a cut or a second without it (times: {self.choices})")
            if self.returns:
                words.append(f"returned to the same person (times: {self.returns})")
        others = self.frames_of_others()
        if others:
            words.append(f"{others} of {self.looks} frames follow somebody who looks unlike the person in "
                         "the others")
        return f"{path}: " + "; ".join(words) if words else None

    def frames_of_others(self):
        """The number of frames that follow somebody who looks unlike the person in the longest scene."""
        if self.recognition is None or len(self.scenes) < 2:
            return 0
        vectors = {scene: scene.vector(self.recognition) for scene in self.scenes}
        main = vectors[max(self.scenes, key=Person.weight)]
        return sum(s.frames for s, vector in vectors.items() if vector @ main < self.recognition.strangers)


def is_near(face, last):
    """Whether a face can be the `last` one, which was seen a moment ago: near it and about as large."""
    if overlap(face.box, last.box) > 0.2:
        return True
    distance = np.linalg.norm(face.centre() - last.centre())
    return distance < 0.7 * last.width() and 0.5 < face.width() / last.width() < 2
