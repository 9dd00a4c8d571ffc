"""The picture at the top of the README: python assets/strip.py"""
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ASSETS = Path(__file__).resolve().parent
sys.path.insert(0, str(ASSETS.parent))

from faces import landmark_detector  # noqa: E402  (the project's own modules, from wherever this is run)
from files import atomic  # noqa: E402
from device import default_device  # noqa: E402
from finetune import CHECKPOINT, EPOCHS, learn_person, load_faces  # noqa: E402
from infer import render  # noqa: E402
from losses import FACE_WEIGHT, ContentLoss  # noqa: E402
from model import load_checkpoint  # noqa: E402
from video import load_track  # noqa: E402

PHOTOS, POSES, CELL = ("astronaut.jpg", "mona_lisa.jpg"), (0, 40, 90, 120, 160, 180), 128

device = default_device()
state = load_checkpoint(CHECKPOINT, device)
config, rows = state["config"], []
content, detect = ContentLoss(config.content, face=FACE_WEIGHT), landmark_detector(config.landmarks)
points = load_track(str(ASSETS / "speech.npz")).in_crops(config.image_size)[list(POSES)]
for photo in PHOTOS:
    x, y = load_faces([ASSETS / photo], config, detect)
    pictures = []
    for epochs in (0, EPOCHS):      # feed-forward, fine-tuned
        _, G, psi, source = learn_person(state, x, y, content, epochs, device)
        pictures.append([np.split(picture, 3, axis=1) for picture in render(G, psi, points, config.image_size, source)])
    (source, _, _), blank = pictures[0][0], np.full_like(pictures[0][0][0], 255)
    rows += [[source, *(landmarks for _, landmarks, _ in pictures[0])]]
    rows += [[blank, *(result for _, _, result in drawn)] for drawn in pictures]
cells = [[np.asarray(Image.fromarray(cell).resize((CELL, CELL), Image.BICUBIC)) for cell in row] for row in rows]
with atomic(ASSETS / "strip.png") as temporary:
    Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in cells])).save(temporary, "PNG")
