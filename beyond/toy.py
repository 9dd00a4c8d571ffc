"""Ours: cartoon heads with known landmarks, for training without data (`meta_train.py --toy`) and tests."""
import numpy as np
from PIL import Image, ImageDraw


class ToyHeads:
    """Videos of cartoon heads, which need no files, no detector and no download.

    The interface is that of data.PreparedVideos. There are `heads` videos, each of one head and with 64
    frames of image_size x image_size pixels. Video i shows head number first + i. Each head has its own face
    shape, skin, hair, eyes and background, and each frame its own yaw, pitch, roll, blink and mouth.
    """
    detector, name = "dlib", "toy"

    def __init__(self, heads, image_size=64, first=0):
        self.heads, self.image_size, self.first = heads, image_size, first

    def __len__(self):
        return self.heads

    def count(self, i):
        """The number of frames of video i."""
        return 64

    def usable(self, i):
        """The numbers of the frames of video i that training may use: all of them."""
        return np.arange(self.count(i))

    def load(self, i, ts):
        """Frames ts (k,) of video i -> uint8 (k, S, S, 3), and their landmarks (k, 68, 2) in pixels."""
        frames, points = zip(*(self.draw(self.first + i, t) for t in ts))
        return np.stack(frames), np.stack(points)

    def draw(self, i, t):
        """Frame t of head number i -> uint8 (S, S, 3), and its landmarks (68, 2) in pixels."""
        head, pose = Head(i), Pose(i, t)
        points = landmarks(head, pose)
        S = 2 * self.image_size                                 # drawn at twice the size, then averaged
        image, placed = paint(head, pose, points, S)
        return np.asarray(image.reduce(2)), ((placed + .5) / 2 - .5).astype(np.float32)


class Head:
    """The identity of head number i. Lengths are in units of half a typical jaw width, colours in 0-255."""

    def __init__(self, i):
        random = np.random.default_rng((1, i))
        low = (.85, 1.0, .13, .38, .05, -.2, .0)
        high = (1.1, 1.3, .19, .46, .1, .25, 1.6)
        lengths = random.uniform(low, high)
        # gap: from the middle to an eye; fringe: where the hair begins; long: the length of the hair
        self.width, self.chin, self.eye, self.gap, self.lip, self.fringe, self.long = lengths
        self.skin = np.array((255, 214, 180)) * random.uniform(.35, 1) * random.uniform(.92, 1.08, 3)
        self.hair = random.uniform(15, 200, 3)
        self.iris = random.uniform(20, 170, 3)
        self.wall = random.uniform(40, 240, (2, 3))
        self.shirt = random.uniform(20, 235, 3)


class Pose:
    """The pose and expression of head number i in frame t. Angles are in radians, lengths in Head's units.

    blink is 1 for open eyes and 0 for closed ones.
    """

    def __init__(self, i, t):
        random = np.random.default_rng((2, i, t))
        yaw, pitch, roll = random.uniform((-.6, -.25, -.2), (.6, .25, .2))
        self.blink = random.uniform() ** .5
        self.smile = random.uniform(-.05, .06)
        self.mouth = max(0, random.uniform(-.1, .25))
        self.shift = random.uniform(-.12, .12, 2)

        (cy, cp, cr), (sy, sp, sr) = np.cos((yaw, pitch, roll)), np.sin((yaw, pitch, roll))
        tilt = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
        nod = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
        turn = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
        self.rotation = tilt @ nod @ turn


def arc(n, x, y, z):
    """n points from ear to ear along the jaw (y > 0) or the forehead (y < 0) -> (n, 3).

    x: half the width.  y: the height of its middle.  z: how far its middle stands out.
    """
    a = np.linspace(-1.6, 1.6, n)
    return np.stack([x * np.sin(a), y * np.cos(a) - .05, z * np.cos(a) - .7], 1)


def landmarks(head, pose):
    """The 68 landmarks in 3-D before rotation, (68, 3): x to the picture's right, y down, z to the viewer."""
    def ring(n, w, h):  # n points of the lips: from the left corner along the upper lip, back along the lower
        c = np.linspace(np.pi, -np.pi, n, endpoint=False)
        opening = h + pose.mouth * (np.sin(c) < 0)
        y = .66 - opening * np.sin(c) - pose.smile * np.cos(c) ** 2
        return np.stack([w * np.cos(c), y, .25 - .15 * np.cos(c) ** 2], 1)

    b, c, flip = np.linspace(0, 1, 5), np.radians([180, 120, 60, 0, -60, -120]), (-1, 1, 1)
    brow = np.stack([-.72 + .5 * b, -.42 - .1 * np.sin(np.pi * b), .1 + .1 * b], 1)
    bridge = np.linspace((0, -.2, .2), (0, .22, .55), 4)
    base = np.stack([-.2 + .4 * b, .34 + .05 * np.sin(np.pi * b), .25 + .1 * np.sin(np.pi * b)], 1)
    lid_y = -.18 - .55 * head.eye * pose.blink * np.sin(c)
    lid = np.stack([-head.gap + head.eye * np.cos(c), lid_y, .1 + 0 * c], 1)
    other_lid = (lid * flip)[[3, 2, 1, 0, 5, 4]]
    return np.concatenate([arc(17, head.width, head.chin, .8), brow, (brow * flip)[::-1], bridge, base, lid,
                           other_lid, ring(12, .32, head.lip), ring(8, .26, .3 * head.lip)])


def paint(head, pose, points, S):
    """Draw a head with 3-D landmarks (68, 3) -> a PIL image of S x S pixels, its landmarks in it (68, 2)."""
    # (1) positions in the picture; neck and shirt do not move with the head
    still = lambda p: np.asarray(p) * (S / 3.9) + S / 2
    place = lambda p: still((p @ pose.rotation.T)[:, :2] + pose.shift + (0, .12))
    around = np.linspace(0, 2 * np.pi, 24)

    def blob(x, y, z, rx, ry):
        return place(np.stack([x + rx * np.cos(around), y + ry * np.sin(around), z + 0 * around], 1))

    # (2) how filled shapes and lines are drawn
    image = Image.new("RGB", (S, S), tuple(head.wall[0].astype(int)))
    pen = ImageDraw.Draw(image)

    def fill(p, colour):
        pen.polygon([tuple(q) for q in p], fill=tuple(np.clip(colour, 0, 255).astype(int)))

    def line(p, colour, width):
        pen.line([tuple(q) for q in p], fill=tuple(colour.astype(int)), width=width)

    # (3) everything, from the back to the front
    fill([(0, S * .62), (S, S * .5), (S, S), (0, S)], head.wall[1])
    fill(blob(0, .1 + head.long / 2, -.9, head.width * 1.15, 1.25 + head.long / 2), head.hair * .8)
    neck = [(-.45, .6), (.45, .6), (.5, 2), (-.5, 2)]
    shirt = [(-1.6, 2), (-1.2, 1.55), (-.45, 1.35), (0, 1.5), (.45, 1.35), (1.2, 1.55), (1.6, 2)]
    fill(still(neck), head.skin * .8)
    fill(still(shirt), head.shirt)
    q, skull = place(points), place(arc(15, head.width, -1.1, .6))
    fill(np.concatenate([q[:17], skull[::-1]]), head.skin)
    fringe = place(arc(15, head.width, head.fringe - .75, .75))
    fill(np.concatenate([skull + (skull - S / 2) * .12, fringe[::-1]]), head.hair)
    for outline, x in ((q[36:42], -head.gap), (q[42:48], head.gap)):
        fill(outline, (245, 245, 245))
        if pose.blink > .35:
            fill(blob(x, -.18, .1, head.eye * .4, head.eye * .5 * pose.blink), head.iris)
    line(q[17:22], head.hair * .7, S // 40)
    line(q[22:27], head.hair * .7, S // 40)
    line(q[[27, 30, 33]], head.skin * .8, S // 60)
    line(q[31:36], head.skin * .65, S // 60)
    fill(q[48:60], head.skin * (.8, .5, .5))
    fill(q[60:68], (60, 15, 20))
    return image, q
