"""Drawn heads with known landmarks, for learning and tests: `python meta_train.py --toy`."""
import numpy as np
from PIL import Image, ImageDraw


class ToyHeads:
    """Drawn heads with known landmarks, for learning and tests: needs no files, no detector and no download.

    Head i has a face shape, skin, hair, eyes and a background of its own; its frame t a pose: yaw, pitch, roll, blink,
    mouth. The same interface as PreparedVideos: `heads` heads from number `first` on, each with 64 frames.
    """
    detector, name = "dlib", "toy"

    def __init__(self, heads, image_size=64, first=0):
        self.heads, self.image_size, self.first = heads, image_size, first

    def __len__(self):
        return self.heads

    def count(self, i):
        return 64

    def load(self, i, choose):
        pairs = [self.draw(self.first + i, t) for t in choose(self.count(i))]
        return np.stack([f for f, _ in pairs]), np.stack([p for _, p in pairs])

    def draw(self, i, t):
        """Frame t of head i -> uint8 (S, S, 3), points (68, 2) in pixels."""
        who, pose = np.random.default_rng((1, i)), np.random.default_rng((2, i, t))
        width, chin, eye, gap, lip, fringe, long = who.uniform((.85, 1.0, .13, .38, .05, -.2, .0), (1.1, 1.3, .19, .46, .1, .25, 1.6))
        skin = np.array((255, 214, 180)) * who.uniform(.35, 1) * who.uniform(.92, 1.08, 3)
        hair, iris, wall, shirt = who.uniform(15, 200, 3), who.uniform(20, 170, 3), who.uniform(40, 240, (2, 3)), who.uniform(20, 235, 3)
        yaw, pitch, roll = pose.uniform((-.6, -.25, -.2), (.6, .25, .2))
        blink, smile, mouth, shift = pose.uniform() ** .5, pose.uniform(-.05, .06), max(0, pose.uniform(-.1, .25)), pose.uniform(-.12, .12, 2)

        # the 68 points in 3D: x to the right of the picture, y down, z towards the viewer; the jaw is about 1 wide
        def arc(n, x, y, z):  # over the jaw (y > 0) or the forehead (y < 0), from ear to ear; z: how far the middle stands out
            a = np.linspace(-1.6, 1.6, n)
            return np.stack([x * np.sin(a), y * np.cos(a) - .05, z * np.cos(a) - .7], 1)

        def ring(n, w, h, drop):  # lips, from the left corner over the upper one and back; drop: how far the jaw is open
            c = np.linspace(np.pi, -np.pi, n, endpoint=False)
            y = .66 - (h + drop * (np.sin(c) < 0)) * np.sin(c) - smile * np.cos(c) ** 2
            return np.stack([w * np.cos(c), y, .25 - .15 * np.cos(c) ** 2], 1)

        b, c, flip = np.linspace(0, 1, 5), np.radians([180, 120, 60, 0, -60, -120]), (-1, 1, 1)
        brow = np.stack([-.72 + .5 * b, -.42 - .1 * np.sin(np.pi * b), .1 + .1 * b], 1)
        bridge = np.linspace((0, -.2, .2), (0, .22, .55), 4)
        base = np.stack([-.2 + .4 * b, .34 + .05 * np.sin(np.pi * b), .25 + .1 * np.sin(np.pi * b)], 1)
        lid = np.stack([-gap + eye * np.cos(c), -.18 - .55 * eye * blink * np.sin(c), .1 + 0 * c], 1)
        points = np.concatenate([arc(17, width, chin, .8), brow, (brow * flip)[::-1], bridge, base, lid,
                                 (lid * flip)[[3, 2, 1, 0, 5, 4]], ring(12, .32, lip, mouth), ring(8, .26, .3 * lip, mouth)])

        (cy, cp, cr), (sy, sp, sr) = np.cos((yaw, pitch, roll)), np.sin((yaw, pitch, roll))
        turn = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]]) @ [[1, 0, 0], [0, cp, -sp], [0, sp, cp]] @ [[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]]
        S = 2 * self.image_size                                                 # drawn twice as large, then averaged
        still = lambda p: np.asarray(p) * (S / 3.9) + S / 2                     # neck and shirt do not turn with the head
        place = lambda p: still((p @ turn.T)[:, :2] + shift + (0, .12))
        image = Image.new("RGB", (S, S), tuple(wall[0].astype(int)))
        pen, k = ImageDraw.Draw(image), np.linspace(0, 2 * np.pi, 24)
        fill = lambda p, colour: pen.polygon([tuple(q) for q in p], fill=tuple(np.clip(colour, 0, 255).astype(int)))
        line = lambda p, colour, width: pen.line([tuple(q) for q in p], fill=tuple(colour.astype(int)), width=width)
        blob = lambda x, y, z, rx, ry: place(np.stack([x + rx * np.cos(k), y + ry * np.sin(k), z + 0 * k], 1))
        fill([(0, S * .62), (S, S * .5), (S, S), (0, S)], wall[1])
        fill(blob(0, .1 + long / 2, -.9, width * 1.15, 1.25 + long / 2), hair * .8)                 # the hair behind
        fill(still([(-.45, .6), (.45, .6), (.5, 2), (-.5, 2)]), skin * .8)                          # neck
        fill(still([(-1.6, 2), (-1.2, 1.55), (-.45, 1.35), (0, 1.5), (.45, 1.35), (1.2, 1.55), (1.6, 2)]), shirt)
        q, skull = place(points), place(arc(15, width, -1.1, .6))
        fill(np.concatenate([q[:17], skull[::-1]]), skin)
        fill(np.concatenate([skull + (skull - S / 2) * .12, place(arc(15, width, fringe - .75, .75))[::-1]]), hair)
        for outline, x in ((q[36:42], -gap), (q[42:48], gap)):
            fill(outline, (245, 245, 245))
            if blink > .35:
                fill(blob(x, -.18, .1, eye * .4, eye * .5 * blink), iris)
        line(q[17:22], hair * .7, S // 40), line(q[22:27], hair * .7, S // 40)
        line(q[[27, 30, 33]], skin * .8, S // 60), line(q[31:36], skin * .65, S // 60)
        fill(q[48:60], skin * (.8, .5, .5))
        fill(q[60:68], (60, 15, 20))
        return np.asarray(image.reduce(2)), ((q + .5) / 2 - .5).astype(np.float32)
