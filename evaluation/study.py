"""The user study of Sec. 4: a web page that asks which of three pictures is fake. It needs no server."""
import base64
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from evaluation.report import AFTER, BEFORE, FF, REAL, SOURCE, read_strip
from runtime.files import UserError, atomic


def user_study(folder, out, people, shots, seed):
    """Write folder/index.html: triplets of two real frames of a person and a fake one, which viewers click.

    The frames are those of the strips in `out`, for each T in `shots`. They are from three different videos
    where the person has more than two, as in the paper. Raises UserError if there are too few frames.
    people: {video: the person it shows}.
    """
    rng, triplets = np.random.default_rng(seed), []
    draw = lambda items, n: [items[k] for k in rng.choice(len(items), n, replace=False)]
    for name in people:
        others = [other for other in people if other != name and people[other] == people[name]]
        other_videos = [read_strip(f"{out}/{other}/T0 {REAL}.png") for other in others]
        holdout, learning = (read_strip(f"{out}/{name}/T0 {frames}.png") for frames in (REAL, SOURCE))
        for T in shots:
            for method in (FF, BEFORE, AFTER):
                file = out / name / f"T{T} {method}.png"
                if not file.exists():
                    continue
                fakes = read_strip(file)
                k = int(rng.integers(len(fakes)))
                same_video = holdout[:k] + holdout[k + 1:] + learning[1:]
                if len(other_videos) >= 2:
                    real = [draw(strip, 1)[0] for strip in draw(other_videos, 2)]
                elif len(same_video) >= 2:
                    real = draw(same_video, 2)
                else:
                    continue
                order = rng.permutation(3).tolist()
                pictures = [as_url([fakes[k], *real][j]) for j in order]
                triplets.append({"method": f"{method} ({T})", "video": name,
                                 "fake": order.index(0), "pictures": pictures})
    if not triplets:
        raise UserError("the user study needs 3 frames of a person: ask for more with --holdout or --shots")
    rng.shuffle(triplets)
    page = (Path(__file__).parent.parent / "assets" / "user_study.html").read_text()
    with atomic(f"{folder}/index.html") as temporary:
        Path(temporary).write_text(page.replace("/*TRIPLETS*/", json.dumps(triplets)))
    print(f"wrote {folder}/index.html: {len(triplets)} triplets; open it in a browser")


def as_url(frame):
    """A frame uint8 (S, S, 3) as a PNG in a data: URL."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
