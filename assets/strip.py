"""Make strip.png: two people, driven by the track's landmarks as the paper does, absolute and relative.

    python assets/strip.py        # a minute or two on two cores
"""
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ASSETS = Path(__file__).resolve().parent
sys.path.insert(0, str(ASSETS.parent))
# the project's own modules, from wherever this is run
from beyond.adapt import adapt, describe  # noqa: E402
from beyond.face3d import load_face3d  # noqa: E402
from data import draw_landmarks  # noqa: E402
from finetune import CHECKPOINT, EPOCHS, learn_person, load_parts  # noqa: E402
from infer import render  # noqa: E402
from losses import FACE_WEIGHT, ContentLoss  # noqa: E402
from media.faces import landmark_detector  # noqa: E402
from media.tracking import load_track  # noqa: E402
from model import load_checkpoint  # noqa: E402
from runtime.device import default_device  # noqa: E402
from runtime.files import atomic  # noqa: E402

PHOTOS, POSES, CELL = ("astronaut.jpg", "mona_lisa.jpg"), [0, 40, 90, 120, 160, 180], 128

device = default_device()
state = load_checkpoint(CHECKPOINT, device)
config, face = state["config"], load_face3d()
size = config.image_size
content, detect = ContentLoss(config.content, face=FACE_WEIGHT), landmark_detector(config.landmarks)
track = load_track(str(ASSETS / "speech.npz"))
blank = np.full((size, size, 3), 255, np.uint8)
rows = [[blank, *(draw_landmarks(p, size) for p in track.in_crops(size)[POSES])]]
for photo in PHOTOS:
    parts = load_parts([str(ASSETS / photo)], config, detect)
    source = describe([points for _, points in parts], face)
    G, psi, _ = learn_person(state, parts, content, EPOCHS, device)
    for motion in ("paper", "absolute", "relative"):
        points = adapt(track, source, motion, size, face, config.lips)[POSES]
        first = parts[0][0][0] if motion == "paper" else blank
        rows.append([first, *render(G, psi, points, size)])
cells = [[np.asarray(Image.fromarray(cell).resize((CELL, CELL), Image.BICUBIC)) for cell in row]
         for row in rows]
with atomic(ASSETS / "strip.png") as temporary:
    Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in cells])).save(temporary, "PNG")
