"""Make the README's pictures from the bundled files: demo.webp and strip.png.

    python assets/pictures.py        # two or three minutes on two cores

Two people are fine-tuned on one picture each, and driven by the bundled track of somebody else's face.
"""
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ASSETS = Path(__file__).resolve().parent
sys.path.insert(0, str(ASSETS.parent))
from beyond.adapt import adapt, describe  # noqa: E402  (the project's own modules, from wherever this is run)
from beyond.face3d import load_face3d  # noqa: E402
from beyond.recognition import FaceTerm  # noqa: E402
from data import draw_landmarks  # noqa: E402
from finetune import CHECKPOINT, EPOCHS, learn_person, load_photos  # noqa: E402
from infer import render  # noqa: E402
from losses import ContentLoss  # noqa: E402
from media.faces import landmark_detector  # noqa: E402
from media.tracking import load_track  # noqa: E402
from runtime.checkpoint import load_checkpoint  # noqa: E402
from runtime.device import default_device  # noqa: E402
from runtime.files import atomic  # noqa: E402

PEOPLE = ("astronaut.jpg", "mona_lisa.jpg")
SHOWN = range(0, 160, 2)                        # frames of the moving picture: 6.4 s at 12.5 a second
POSES, CELL = (0, 40, 90, 120, 160, 180), 192   # frames of the strip, and the pixels of each


def main():
    device, face3d = default_device(), load_face3d()
    state = load_checkpoint(CHECKPOINT, device)
    config, size = state["config"], state["config"].image_size
    content, detect = ContentLoss(config.content, extra=FaceTerm()), landmark_detector(config.landmarks)
    track = load_track(str(ASSETS / "speech.npz"))
    drawings = np.stack([draw_landmarks(p, size) for p in track.in_crops(size)])
    blank = np.full((size, size, 3), 255, np.uint8)
    columns, rows = [drawings[SHOWN]], [[blank, *drawings[list(POSES)]]]
    for name in PEOPLE:
        photos = load_photos([str(ASSETS / name)], config, detect)
        source = describe([photo.points for photo in photos], face3d)
        G, psi, _ = learn_person(state, photos, content, EPOCHS, device)
        for motion in ("paper", "absolute", "relative"):
            points = adapt(track, source, motion, size, face3d, config.lips)
            first = photos[0].frames[0] if motion == "paper" else blank
            rows.append([first, *render(G, psi, points[list(POSES)], size)])
        columns.append(np.stack(list(render(G, psi, points[SHOWN], size))))     # relative, the default
    write_strip(rows)
    write_movie(np.concatenate(columns, axis=2))                                # (n, S, 3 S, 3)


def write_strip(rows):
    small = lambda cell: np.asarray(Image.fromarray(cell).resize((CELL, CELL), Image.BICUBIC))
    picture = np.concatenate([np.concatenate([small(cell) for cell in row], axis=1) for row in rows])
    with atomic(ASSETS / "strip.png") as temporary:
        Image.fromarray(picture).save(temporary, "PNG")


def write_movie(frames):
    first, *others = [Image.fromarray(frame) for frame in frames]
    with atomic(ASSETS / "demo.webp") as temporary:
        first.save(temporary, "WEBP", save_all=True, append_images=others, duration=80, loop=0, quality=75)


if __name__ == "__main__":
    main()
