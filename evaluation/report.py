"""What evaluate.py left in its folder, told: Table 1, a figure like Fig. 4, the page of the user study.

Every video has a folder there: a strip of frames per method ("T8 Ours-FT.png"), scores.csv with a row
for every frame, and vectors.npz with the recognition network's vectors of these frames in this order.
"""
import base64
import csv
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from evaluation.metrics import fid, fid_statistics, frechet, mean_people, rank
from runtime.files import UserError, atomic

SOURCE, REAL, COPY, NEAREST = "source", "real frame", "copy of the source", "nearest source frame"
FF, BEFORE, AFTER = "Ours-FF", "Ours-FT before fine-tuning", "Ours-FT"
COLUMNS = ["video", "T", "method", "frame", "ssim", "csim", "csim_stranger", "rank", "nearer_training",
           "landmark_error", "found"]
TEXTS = "video", "method", "driver", "motion"       # columns that hold no numbers


# -------------------------------------------------------------------------------------------- files

def key(row):
    """What a method's strip and vectors are called."""
    return f"T{int(row['T'])} {row['method']}"


def write_strip(path, frames):
    with atomic(path) as temporary:
        Image.fromarray(np.concatenate(list(frames), axis=1)).save(temporary, "PNG")


def read_strip(path):
    strip = np.asarray(Image.open(path))
    return np.split(strip, strip.shape[1] // len(strip), axis=1)


def write_scores(path, rows, columns=COLUMNS):
    with atomic(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def read_scores(path):
    """-> a dict per row, of texts."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_vectors(path, vectors):
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **vectors)


def read_vectors(path):
    """-> {"T8 Ours-FT": (n, d)}; {} where there was no recognition network."""
    return dict(np.load(path)) if Path(path).exists() else {}


# ----------------------------------------------------------------------------------- whom they show

def add_identity(rows, vectors, people, training=None):
    """Fill in what recognition says of every frame: csim, csim_stranger, rank, nearer_training.

    rows, vectors: {video: what its folder holds}.  people: {video: who it shows}.
    training: (m, d), a vector for everybody in the training.
    A held-out person is the mean of their hold-out frames.
    """
    if not all(vectors.values()):
        return
    names, real = list(people), key({"T": 0, "method": REAL})
    persons = mean_people({name: vectors[name][real] for name in names}, people)
    everyone = np.stack(list(persons.values()))                         # (P, d)

    for n, name in enumerate(names):
        person, truth = persons[people[name]], vectors[name][real]      # (d,), (n, d)
        k = list(persons).index(people[name])
        others = [other for other in names[n + 1:] + names[:n] if people[other] != people[name]]
        for method, found in vectors[name].items():
            scores = {"csim": (found * truth).sum(axis=1)}
            if others:
                scores["csim_stranger"] = (found * vectors[others[0]][real]).sum(axis=1)
                scores["rank"] = rank(found, everyone, k)
            if training is not None:
                nearest = (found @ training.T).max(axis=1)
                scores["nearer_training"] = (nearest > found @ person).astype(int)
            frames = [row for row in rows[name] if key(row) == method]
            for t, row in enumerate(frames):
                row |= {column: values[t] for column, values in scores.items()}


def distances(out, rows, vectors, network=None):
    """-> {"T8 Ours-FT": {"fid": ..., "frechet": ...}}, between all frames of a method and all real ones.

    FID where its network is at hand, the Frechet distance of the recognition vectors where these are;
    neither of a single frame.
    """
    found, real = {}, {}
    keys = [key(row) for name in rows for row in rows[name]]
    for method in dict.fromkeys(keys):      # the real frames come first
        result, frames = found.setdefault(method, {}), keys.count(method)
        if network and frames > 1:
            strips = [read_strip(out / name / f"{method}.png") for name in rows]
            statistics = fid_statistics(sum(strips, []), network)
            result["fid"] = fid(real.setdefault("fid", statistics), statistics)
        if frames > 1 and all(vectors.values()):
            those = np.concatenate([vectors[name][method] for name in rows])
            result["frechet"] = frechet(real.setdefault("frechet", those), those)
    return found


# ------------------------------------------------------------------------------------------ Table 1

def as_numbers(row):
    """NaN where there is none."""
    number = lambda v: float("nan" if v in ("", None) else v)
    return {column: v if column in TEXTS else number(v) for column, v in row.items()}


def mean(rows, column):
    """The mean over the videos of the means over their frames, and its standard error; NaN for none."""
    videos = {}
    for row in rows:
        if np.isfinite(row[column]):
            videos.setdefault(row["video"], []).append(row[column])
    means = [np.mean(values) for values in videos.values()] or [np.nan]
    error = np.std(means, ddof=1) / len(means) ** .5 if len(means) > 1 else np.nan
    return np.mean(means), error


def number(mean_and_error, digits):
    texts = [f"{v:.{digits}f}" for v in mean_and_error if np.isfinite(v)]
    return " ± ".join(texts) or "n/a"


def share(values):
    """The mean of yes and no, over all frames."""
    values = [v for v in np.atleast_1d(values) if np.isfinite(v)]
    return f"{100 * np.mean(values):.0f} %" if values else "n/a"


def of_the_way(csim, strangers, same):
    """How far a CSIM is from strangers (0) to the same person (1); NaN where these cannot be told apart."""
    return (csim - strangers) / (same - strangers) if same > strangers else np.nan


def csim_title(judge, trained_on):
    return f"CSIM ({judge}{', trained on' if trained_on else ''}) ↑"


def markdown(rows):
    """[{title: cell}], all with the same titles -> a table."""
    head = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    return "\n".join(head + ["| " + " | ".join(row.values()) + " |" for row in rows])


def table(rows, found, judge, held_out, trained_on=False):
    """Table 1 in markdown, and CSIM's two anchors.

    rows: of every scores.csv, as numbers.  found: of distances().
    judge: the name of the recognition network.  trained_on: it was part of a loss.
    held_out: how many people.
    """
    groups = {}
    for row in sorted(rows, key=lambda row: row["T"]):      # the methods of a T stay in their order
        groups.setdefault(key(row), []).append(row)
    strangers = mean(groups[f"T0 {REAL}"], "csim_stranger")[0]
    same = next(mean(group, "csim")[0] for group in groups.values() if group[0]["method"] == COPY)
    with_training = any(np.isfinite(row["nearer_training"]) for row in rows)

    lines = []
    for name, group in groups.items():
        T, method = int(group[0]["T"]), group[0]["method"]
        column = lambda c: np.array([row[c] for row in group])
        csim = mean(group, "csim")
        way = of_the_way(csim[0], strangers, same) if T else np.nan
        known = np.isfinite(column("csim_stranger"))
        distance = lambda kind, digits: number([found[name].get(kind, np.nan)] if T else [], digits)
        cells = {
            "method (T)": f"{method} ({T})" if T else method,
            "FID ↓": distance("fid", 1),
            f"Fréchet ({judge}) ↓": distance("frechet", 3),
            "SSIM ↑": number(mean(group, "ssim"), 3),
            csim_title(judge, trained_on): number(csim, 3),
            "of the way": share(way),
            "right person": share((column("csim") > column("csim_stranger"))[known]),
            f"nearest of {held_out}": share((column("rank") == 1)[np.isfinite(column("rank"))]),
            "nearer to training ↓": share(column("nearer_training")),
            "landmarks ↓": number(mean(group, "landmark_error"), 1),
            "face found": share(mean(group, "found")[0])}
        if not with_training:
            del cells["nearer to training ↓"]
        lines.append(cells)
    return markdown(lines), strangers, same


def caption(judge, strangers, same, videos, holdout, trained_on=False, training=False):
    """What stands below the table."""
    frames = "1 hold-out frame" if holdout == 1 else f"{holdout} hold-out frames"
    text = f"Means over {videos} videos ± standard error, {frames} each."
    if not np.isfinite(same):
        return text
    network = "the face-recognition network of dlib" if judge == "dlib" else judge
    sentences = [
        f"CSIM by {network}: strangers {strangers:.3f}, the same person {same:.3f}, both of real "
        "frames; of the way: (CSIM - strangers) / (same person - strangers).",
        "It was part of the loss, so it flatters: name another with --recognition." * trained_on,
        "Right person: frames nearer to the person than to somebody else; nearest: nearer to the mean "
        "of the person's hold-out frames than to anybody else's.",
        "Nearer to training: nearer to somebody of the training than to that mean." * training,
        "Fréchet: distance between the same network's vectors of all generated and all real frames; "
        "no FID, and comparable only over the same number of frames.",
        "Landmarks: error in % of the distance between the outer eye corners."]
    return " ".join([text, *filter(None, sentences)])


def report(out, people, shots, holdout, judge, trained_on=False, training=None, network=None):
    """From the videos' folders: scores.csv, table.md, which is printed too, and figure.png.

    people: {video: who it shows}.  training: as in add_identity().  judge, trained_on: as in table().
    network: FID's.
    """
    rows = {name: read_scores(out / name / "scores.csv") for name in people}
    vectors = {name: read_vectors(out / name / "vectors.npz") for name in people}
    add_identity(rows, vectors, people, training)
    write_scores(out / "scores.csv", [row for name in people for row in rows[name]])
    numbers = [as_numbers(row) for name in people for row in rows[name]]

    found = distances(out, rows, vectors, network)
    held_out = len(set(people.values()))
    text, strangers, same = table(numbers, found, judge=judge, held_out=held_out, trained_on=trained_on)
    text += "\n\n" + caption(judge=judge, strangers=strangers, same=same, videos=len(people),
                             holdout=holdout, trained_on=trained_on, training=training is not None)
    with atomic(out / "table.md") as temporary:
        Path(temporary).write_text(text + "\n")
    print(text)
    if not network:
        print("FID: n/a, its network is a download; get weights-inception-2015-12-05-6726825d.pth from "
              "torch-fidelity's releases and name it with --inception")
    figure(out, list(people), shots, list(dict.fromkeys(row["method"] for row in numbers if row["T"])))
    print(f"wrote {out}/table.md, {out}/scores.csv and {out}/figure.png")


# ------------------------------------------------------------------------------- figure, user study

def figure(out, videos, shots, columns, limit=3):
    """Fig. 4: rows T of some videos; columns source, ground truth, every method."""
    rows = []
    for name in videos[:limit]:
        for T in shots:
            files = [f"T0 {SOURCE}", f"T0 {REAL}", *(f"T{T} {method}" for method in columns)]
            rows.append((f"T = {T}", [read_strip(f"{out}/{name}/{file}.png")[0] for file in files]))
    write_sheet(f"{out}/figure.png", [SOURCE, "ground truth", *columns], rows)


def write_sheet(path, titles, rows, left=40):
    """A picture of rows: (text, [uint8 (S, S, 3), or None for an empty place]), below the columns' titles.

    left: the width of the texts, in pixels.
    """
    S = len(rows[0][1][-1])
    cell, top, width = max(S, 128), 30, max(len(frames) for _, frames in rows)
    picture = Image.new("RGB", (left + cell * width, top + cell * len(rows)), "white")
    pen = ImageDraw.Draw(picture)
    for c, title in enumerate(titles):
        title = title.replace(" ", "\n", 1) if len(title) > 16 else title
        pen.multiline_text((left + 4 + cell * c, 2), title, "black")
    for r, (text, frames) in enumerate(rows):
        pen.multiline_text((4, top + cell * r + cell // 2), text, "black")
        for c, frame in enumerate(frames):
            if frame is not None:
                frame = Image.fromarray(frame).resize((cell, cell), Image.BICUBIC)
                picture.paste(frame, (left + cell * c, top + cell * r))
    with atomic(path) as temporary:
        picture.save(temporary, "PNG")


def user_study(folder, out, people, shots, seed):
    """Sec. 4: triplets of two real frames and a fake one of the same person, as a page of its own.

    people: {video: who it shows}.  The page needs no server.
    """
    rng, triplets = np.random.default_rng(seed), []
    draw = lambda items, n: [items[k] for k in rng.choice(len(items), n, replace=False)]
    for name in people:
        others = [other for other in people if other != name and people[other] == people[name]]
        elsewhere = [read_strip(f"{out}/{other}/T0 {REAL}.png") for other in others]
        holdout, learning = (read_strip(f"{out}/{name}/T0 {part}.png") for part in (REAL, SOURCE))
        for T in shots:
            for method in (FF, BEFORE, AFTER):
                file = out / name / f"T{T} {method}.png"
                if not file.exists():
                    continue
                fakes = read_strip(file)
                k = int(rng.integers(len(fakes)))
                moments = holdout[:k] + holdout[k + 1:] + learning[1:]
                if len(elsewhere) >= 2:         # three different sequences, as in the paper
                    real = [draw(strip, 1)[0] for strip in draw(elsewhere, 2)]
                elif len(moments) >= 2:
                    real = draw(moments, 2)
                else:
                    continue
                order = rng.permutation(3).tolist()
                pictures = [as_url([fakes[k], *real][j]) for j in order]
                triplets.append({"method": f"{method} ({T})", "video": name,
                                 "fake": order.index(0), "pictures": pictures})
    if not triplets:
        raise UserError("a user study needs 3 frames of a person: ask for more with --holdout or --shots")
    rng.shuffle(triplets)
    page = (Path(__file__).parent.parent / "assets" / "user_study.html").read_text()
    with atomic(f"{folder}/index.html") as temporary:
        Path(temporary).write_text(page.replace("/*TRIPLETS*/", json.dumps(triplets)))
    print(f"wrote {folder}/index.html: {len(triplets)} triplets; open it in a browser")


def as_url(frame):
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
