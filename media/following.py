"""Which face of a video is looked at, and who that is."""
import math

import numpy as np

from media.crops import crop, face_box, to_crop
from media.faces import NEARLY, SURE, overlap, where, which_face

LATER = 0.25    # the weight of a frame of anybody but the first person: others may stand in for a while
PEOPLE = 20     # are remembered


class Person:
    """Somebody who was followed for a while. worth: the weight of a frame."""

    def __init__(self, worth):
        self.worth, self.frames = worth, 0
        self.score, self.picture = 0.0, None    # the close-up of the surest one

    def weight(self):
        return self.worth * self.frames

    def followed(self, image, points, score):
        self.frames += 1
        if score > self.score:
            self.score, self.picture = score, close_up(image, points)
            self.known = None

    def vector(self, recognition):
        if self.known is None:
            self.known = recognition.vector(*self.picture)
        return self.known


def close_up(image, points, size=256):
    """-> the face's crop uint8 (size, size, 3) and the landmarks (68, 2) in it."""
    box = face_box(points)
    return crop(image, box, size), to_crop(points, box, size)


class Follower:
    """Which face of a video is looked at: within a shot the one that was followed.

    It is chosen anew only after a cut, or a second without it. With a `recognition`, whoever was followed
    most is then preferred, and is gone back to where somebody else has been followed meanwhile.
    """

    LOST = 1.0          # seconds without the followed face, after which another one may be chosen
    PATIENCE = 0.5      # seconds between two looks at what takes long: large copies, who the others are

    def __init__(self, detector, recognition=None, turns=0):
        self.detector, self.recognition, self.turns = detector, recognition, turns
        self.people, self.person = [], None     # those who were followed, and the one who is now
        self.compared = -math.inf   # when the faces beside a substitute were looked at last, in seconds
        self.face = None            # the followed one, where it was seen last
        self.seen = -math.inf       # when, in seconds
        self.missed = 0             # looks since then
        self.searched = -math.inf   # when the large copies were looked at last
        self.thumbnail = None       # of the frame before, to tell a cut
        self.looks = self.with_others = self.choices = self.returns = 0
        self.place = None           # of the face that was chosen first among others, in words
        self.turned = np.zeros(4, int)  # how many of the searches showed a face with the frame turned so

    def is_cut(self, thumbnail):
        """Whether a new shot begins: this small copy (32, 32) has little in common with the one before."""
        before, self.thumbnail = self.thumbnail, thumbnail.astype(np.float32)
        return before is None or bool(np.abs(self.thumbnail - before).mean() > 20)

    def look(self, image, seconds, cut):
        """image uint8 (H, W, 3) -> points (68, 2) of the followed face, None where it is not to be seen."""
        self.looks += 1
        lost = self.missed >= 2 and seconds - self.seen > self.LOST
        if self.face is not None and not cut and not lost:
            faces, chosen = self.find_again(image)
            chosen = self.back_to_the_person(faces, chosen, image, seconds)
        else:
            faces, chosen = self.choose(image, seconds, cut)
        if chosen is None:
            self.missed += 1
            return None
        others = [face for face in faces if face is not chosen and face.score >= SURE]
        self.with_others += bool(others)
        if others and self.place is None:
            self.place = where(chosen, [chosen, *others])
        self.face, self.seen, self.missed = chosen, seconds, 0
        points = self.detector.landmarks(image, chosen)
        self.person.followed(image, points, chosen.score)
        return points

    def find_again(self, image):
        """-> ([Face] of the frame, the followed one or None): where it was, about as large."""
        sides, last = self.detector.sides, self.face
        at = sides.index(last.side)
        if at > 0 and last.width() * sides[at - 1] / max(image.shape[:2]) > 100:
            at -= 1                         # it is large enough to be found on a smaller copy
        faces, again = [], None
        for side in sides[at:at + 2]:       # a face that grows smaller is found on the next one
            faces = self.detector.faces(image, (side,))
            near = [face for face in faces if is_near(face, last)]
            if near:
                again = max(near, key=lambda face: overlap(face.box, last.box))
                break
        surest = max(faces, key=lambda face: face.score, default=None)
        if surest and self.person.score < SURE <= surest.score:     # what was followed was hardly a face
            again = surest
        return faces, again

    def choose(self, image, seconds, cut):
        """-> ([Face] of the frame, the one to follow from here on or None)."""
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
            self.go_on_with(person)
            return faces, known
        # a flash is no cut: rather the same face, if it is where it was
        same = [face for face in likely if is_near(face, self.face)]
        if not same:
            self.choices += 1
            self.meet()
        return faces, max(same, key=lambda face: overlap(face.box, self.face.box), default=chosen)

    def look_turned(self, image):
        for k in (1, 2, 3):
            faces = self.detector.faces(np.ascontiguousarray(np.rot90(image, k)), self.detector.sides[:2])
            self.turned[k] += bool(faces and faces[0].score >= SURE)

    def meet(self):
        """Somebody begins to be followed, who may be one of the people before."""
        self.person = Person(LATER if self.people else 1.0)
        self.people = [*sorted(self.people, key=Person.weight)[1 - PEOPLE:], self.person]

    def go_on_with(self, person):
        self.returns += person is not self.person
        self.person = person

    def recognise(self, faces, image):
        """-> (Face, Person): the one who was followed most, and as whom; (None, None) of strangers."""
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

    def back_to_the_person(self, faces, chosen, image, seconds):
        """-> chosen, or another of the faces where that is somebody who was followed longer."""
        sure = [face for face in faces if face is chosen or face.score >= SURE]
        longest = max(self.people, key=Person.weight)
        if (longest is self.person or all(face is chosen for face in sure)
                or seconds - self.compared < self.PATIENCE):
            return chosen
        self.compared = seconds
        known, person = self.recognise(sure, image)
        if known is None or known is chosen:
            return chosen
        self.go_on_with(person)
        return known

    def report(self, path):
        """One line on what was chosen, None where there was no choice."""
        if not self.with_others:
            return None
        count = f"{self.with_others} of {self.looks} frames"
        words = f"{path}: {count} show others too: followed the face {self.place}"
        if self.choices:
            words += f", and chose anew {self.choices} times, after a cut or a second without it"
        if self.returns:
            words += f"; went back to the same person {self.returns} times"
        return words


def is_near(face, last):
    """Whether a face can be the one that was `last` a moment ago: it overlaps, or is close and as large."""
    if overlap(face.box, last.box) > 0.2:
        return True
    distance = np.linalg.norm(face.centre() - last.centre())
    return distance < 0.7 * last.width() and 0.5 < face.width() / last.width() < 2
