"""Table 1 and a figure like Fig. 4, made from the files that evaluate.py wrote.

Every video has a folder with a strip of frames per method ("T8 Ours-FT.png"), scores.csv with a row for every
frame, and vectors.npz with the recognition network's vectors of these frames in the same order.
"""
import csv
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from evaluation.metrics import fid, fid_statistics, frechet, mean_people, rank
from runtime.files import atomic

SOURCE, REAL, COPY, NEAREST = "source", "real frame", "copy of the source", "nearest source frame"
FF, BEFORE, AFTER, AS_PAPER = "Ours-FF", "Ours-FT before fine-tuning", "Ours-FT", "Ours-FT, as in the paper"
COLUMNS = ["video", "T", "method", "frame", "ssim", "csim", "csim_stranger", "rank", "nearer_training",
           "landmark_error", "found"]
TEXTS = "video", "method", "driver", "motion"       # the columns that hold texts, not numbers


# -------------------------------------------------------------------------------------------- files

def key(row):
    """The name of a method's strip and vectors for a row's T: "T8 Ours-FT"."""
    return f"T{int(row['T'])} {row['method']}"


def write_strip(path, frames):
    """Write frames uint8 (S, S, 3) side by side as a PNG."""
    with atomic(path) as temporary:
        Image.fromarray(np.concatenate(list(frames), axis=1)).save(temporary, "PNG")


def read_strip(path):
    """-> the frames that write_strip() wrote, uint8 (S, S, 3) each."""
    strip = np.asarray(Image.open(path))
    return np.split(strip, strip.shape[1] // len(strip), axis=1)


def write_scores(path, rows, columns=COLUMNS):
    """Write rows, each a dict with some of the columns, as a CSV file. The other cells stay empty."""
    with atomic(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def read_scores(path):
    """-> a dict of texts per row."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_vectors(path, vectors):
    """Write arrays by their names as an .npz file."""
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **vectors)


def read_vectors(path):
    """-> {"T8 Ours-FT": (n, d)}, empty if there was no recognition network."""
    return dict(np.load(path)) if Path(path).exists() else {}


# ------------------------------------------------------------------ identity, and Fréchet distances

def add_identity(rows, vectors, people, training=None):
    """Add the columns that say whom a frame shows: csim, csim_stranger, rank and nearer_training.

    rows, vectors: {video: the contents of its scores.csv, and of its vectors.npz}.
    people: {video: the person it shows}.
    training: (m, d), the mean vector of each person in the training data.
    A held-out person is represented by the mean vector of their hold-out frames.
    """
    if not all(vectors.values()):
        return
    names, real = list(people), key({"T": 0, "method": REAL})
    means = mean_people({name: vectors[name][real] for name in names}, people)
    everyone = np.stack(list(means.values()))                           # (P, d)

    for n, name in enumerate(names):
        person, truth = means[people[name]], vectors[name][real]        # (d,), (n, d)
        k = list(means).index(people[name])
        strangers = [other for other in names[n + 1:] + names[:n] if people[other] != people[name]]
        for method, generated in vectors[name].items():
            scores = {"csim": (generated * truth).sum(axis=1)}
            if strangers:
                scores["csim_stranger"] = (generated * vectors[strangers[0]][real]).sum(axis=1)
                scores["rank"] = rank(generated, everyone, k)
            if training is not None:
                nearest = (generated @ training.T).max(axis=1)
                scores["nearer_training"] = (nearest > generated @ person).astype(int)
            frames = [row for row in rows[name] if key(row) == method]
            for t, row in enumerate(frames):
                row |= {column: values[t] for column, values in scores.items()}


def frechet_distances(out, rows, vectors, inception=None):
    """The distances between all frames of a method and all real ones -> {"T8 Ours-FT": {"fid", "frechet"}}.

    "fid" is there if `inception`, the FID's network, is given, and "frechet" (the same distance between the
    recognition network's vectors) if there are vectors. A single frame has neither.
    """
    distances, real = {}, {}
    keys = [key(row) for name in rows for row in rows[name]]
    for method in dict.fromkeys(keys):      # the real frames come first
        own, frames = distances.setdefault(method, {}), keys.count(method)
        if inception and frames > 1:
            strips = [read_strip(out / name / f"{method}.png") for name in rows]
            statistics = fid_statistics(sum(strips, []), inception)
            own["fid"] = fid(real.setdefault("fid", statistics), statistics)
        if frames > 1 and all(vectors.values()):
            generated = np.concatenate([vectors[name][method] for name in rows])
            own["frechet"] = frechet(real.setdefault("frechet", generated), generated)
    return distances


# ------------------------------------------------------------------------------------------ Table 1

def as_numbers(row):
    """A row of scores.csv or puppets.csv with numbers instead of texts, and NaN instead of empty cells."""
    to_float = lambda v: float("nan" if v in ("", None) else v)
    return {column: v if column in TEXTS else to_float(v) for column, v in row.items()}


def mean(rows, column):
    """The mean over videos of the means over their frames, and its standard error. NaN without values."""
    videos = {}
    for row in rows:
        if np.isfinite(row[column]):
            videos.setdefault(row["video"], []).append(row[column])
    means = [np.mean(values) for values in videos.values()] or [np.nan]
    error = np.std(means, ddof=1) / len(means) ** .5 if len(means) > 1 else np.nan
    return np.mean(means), error


def number(mean_and_error, digits):
    """Format the result of mean(), or a list of one number: "0.300 ± 0.100", "0.300", or "n/a" for NaN."""
    texts = [f"{v:.{digits}f}" for v in mean_and_error if np.isfinite(v)]
    return " ± ".join(texts) or "n/a"


def per_cent(values):
    """Format the mean of values from 0 to 1, leaving out NaN: "54 %", or "n/a" if there are none."""
    values = [v for v in np.atleast_1d(values) if np.isfinite(v)]
    return f"{100 * np.mean(values):.0f} %" if values else "n/a"


def identity_score(csim, strangers, same):
    """A CSIM on a scale from 0 (strangers) to 100 (another photo of the same person).

    strangers, same: the mean CSIM of real frames of two people, and of one. NaN if the first is no smaller.
    """
    return 100 * (csim - strangers) / (same - strangers) if same > strangers else np.nan


def csim_title(judge, trained_on):
    """The title of the CSIM column. judge, trained_on: as in table()."""
    return f"CSIM ({judge}{', trained on' if trained_on else ''}) ↑"


def markdown(rows):
    """[{title: cell}], all with the same titles -> a markdown table."""
    head = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    return "\n".join(head + ["| " + " | ".join(row.values()) + " |" for row in rows])


def table(rows, distances, judge, held_out, trained_on=False):
    """Table 1 in markdown, and the mean CSIM of strangers and of the same person, both of real frames.

    rows: the rows of every scores.csv, as numbers.  distances: from frechet_distances().
    judge: the name of the recognition network that CSIM is computed with.
    trained_on: whether that network was part of a loss, so that CSIM flatters.
    held_out: the number of held-out people.
    """
    groups = {}
    for row in sorted(rows, key=lambda row: row["T"]):      # stable: the methods of a T keep their order
        groups.setdefault(key(row), []).append(row)
    strangers = mean(groups[f"T0 {REAL}"], "csim_stranger")[0]
    same = next(mean(group, "csim")[0] for group in groups.values() if group[0]["method"] == COPY)
    with_training = any(np.isfinite(row["nearer_training"]) for row in rows)

    lines = []
    for name, group in groups.items():
        T, method = int(group[0]["T"]), group[0]["method"]
        column = lambda c: np.array([row[c] for row in group])
        csim = mean(group, "csim")
        score = identity_score(csim[0], strangers, same) if T else np.nan
        distance = lambda kind, digits: number([distances[name].get(kind, np.nan)] if T else [], digits)
        cells = {
            "method (T)": f"{method} ({T})" if T else method,
            "FID ↓": distance("fid", 1),
            f"Fréchet ({judge}) ↓": distance("frechet", 3),
            "SSIM ↑": number(mean(group, "ssim"), 3),
            csim_title(judge, trained_on): number(csim, 3),
            "identity score ↑": number([score], 0),
            f"nearest of {held_out}": per_cent((column("rank") == 1)[np.isfinite(column("rank"))]),
            "nearer to training ↓": per_cent(column("nearer_training")),
            "landmarks ↓": number(mean(group, "landmark_error"), 1),
            "face found": per_cent(mean(group, "found")[0])}
        if not with_training:
            del cells["nearer to training ↓"]
        lines.append(cells)
    return markdown(lines), strangers, same


def caption(judge, strangers, same, videos, holdout, trained_on=False, training=False):
    """The explanation below the table. strangers, same: as table() returns them.  videos: how many.

    judge, trained_on: as in table().  training: whether the people of the training data were given.
    """
    frames = "1 hold-out frame" if holdout == 1 else f"{holdout} hold-out frames"
    text = f"Means over {videos} videos ± standard error, {frames} each."
    if not np.isfinite(same):
        return text
    network = "dlib's face recognition network" if judge == "dlib" else judge
    sentences = [
        f"CSIM is computed with {network}. Between real frames it is {number([strangers], 3)} for strangers "
        f"and {same:.3f} for the same person, which are 0 and 100 on the scale of the identity score.",
        "The network was part of a loss, so CSIM is too favourable: name another with --recognition."
        * trained_on,
        "Nearest: the share of frames that are nearer to the mean of the person's hold-out frames than to "
        "that of any other person.",
        "Nearer to training: the share that are nearer to someone in the training data than to the mean of "
        "the person's hold-out frames." * training,
        "Fréchet: the distance between the network's vectors of all generated and all real frames. It is not "
        "the FID, and only comparable for the same number of frames.",
        "Landmarks: their error in % of the distance between the outer eye corners."]
    return " ".join([text, *filter(None, sentences)])


def report(out, people, shots, holdout, judge, trained_on=False, training=None, inception=None):
    """Write scores.csv, table.md (which is printed too) and figure.png from the folders of the videos.

    people: {video: the person it shows}.  shots: every T.  holdout: the number of hold-out frames of a video.
    judge, trained_on: as in table().  training: as in add_identity().  inception: as in frechet_distances().
    """
    rows = {name: read_scores(out / name / "scores.csv") for name in people}
    vectors = {name: read_vectors(out / name / "vectors.npz") for name in people}
    add_identity(rows, vectors, people, training)
    write_scores(out / "scores.csv", [row for name in people for row in rows[name]])
    numbers = [as_numbers(row) for name in people for row in rows[name]]

    distances = frechet_distances(out, rows, vectors, inception)
    text, strangers, same = table(numbers, distances, judge, len(set(people.values())), trained_on)
    text += "\n\n" + caption(judge=judge, strangers=strangers, same=same, videos=len(people),
                             holdout=holdout, trained_on=trained_on, training=training is not None)
    with atomic(out / "table.md") as temporary:
        Path(temporary).write_text(text + "\n")
    print(text)
    if not inception:
        print("FID: n/a, because its network has to be downloaded: get torch-fidelity's release "
              "weights-inception-2015-12-05-6726825d.pth and name it with --inception")
    figure(out, list(people), shots, list(dict.fromkeys(row["method"] for row in numbers if row["T"])))
    print(f"wrote {out}/table.md, {out}/scores.csv and {out}/figure.png")


# ------------------------------------------------------------------------------------------- figures

def figure(out, videos, shots, methods, limit=3):
    """A figure like Fig. 4, with a row for each T of the first videos, and columns for the methods."""
    rows = []
    for name in videos[:limit]:
        for T in shots:
            files = [f"T0 {SOURCE}", f"T0 {REAL}", *(f"T{T} {method}" for method in methods)]
            rows.append((f"T = {T}", [read_strip(f"{out}/{name}/{file}.png")[0] for file in files]))
    write_sheet(f"{out}/figure.png", [SOURCE, "ground truth", *methods], rows)


def write_sheet(path, titles, rows, left=40):
    """Write a picture with rows of frames below the titles of the columns.

    rows: [(text, [uint8 (S, S, 3), or None for an empty cell])].  left: the width of the texts in pixels.
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
