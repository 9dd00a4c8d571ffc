"""Puppeteering, Sec. 4 and Fig. 5: every held-out person is driven by clips of other people.

`evaluate.py --drivers DIR` runs it. Each person is learned once, from T frames, and then driven by every
driver with every motion of adapt.py. The results answer two questions: do they still show the person, and do
they follow the driver's movements? Drivers are ranked as in the paper, by the CSIM "between the original
image and the generated one".

It writes to --out: a folder per video, with a strip of frames per driver and motion, and with puppets.csv,
which is written last and marks the video as finished. For all videos together it writes puppets.csv,
puppets.md and puppets.png.
"""
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from beyond.adapt import adapt, describe
from beyond.face3d import load_face3d
from data import draw_landmarks
from evaluation.metrics import change, crossed, mean_people, movements, puppet_identity
from evaluation.protocol import find_videos, person_of
from evaluation.report import (SOURCE, as_numbers, csim_title, identity_score, markdown, mean, number,
                               per_cent, read_scores, read_strip, write_scores, write_sheet, write_strip)
from media.folders import CLIPS, Photo, evenly, is_system
from media.recognition import tell_apart
from media.tracking import Track, is_track, read_crops, read_driver
from runtime.files import UserError, atomic

MOTIONS = "paper", "absolute", "relative"
FRAMES = 20     # evenly spread frames of a driver, from which all columns but frame_changes are computed
RUN = 50        # consecutive frames of a driver, from which frame_changes is computed
SHOWN = 5       # frames in a strip
SAME_PERSON = 75    # a driver whose identity score with a person is higher is taken to be that person
COLUMNS = ["video", "driver", "motion", "csim", "csim_photo", "csim_driver", "nearer_driver", "nearest",
           "mouth_r", "mouth_ratio", "yaw_r", "roll_r", "landmark_error", "found", "crossed", "frame_changes"]


class Person(NamedTuple):
    """A video of a held-out person: real frames and their vectors of the recognition network."""
    name: str               # of the person: two videos may show the same one
    frames: np.ndarray      # uint8 (T, S, S, 3): to learn from; the first is the photo that is driven
    points: np.ndarray      # (T, 68, 2): their landmarks
    photo: np.ndarray       # (d,): the vector of the photo that is driven
    others: np.ndarray      # (h, d): the vectors of the hold-out frames


class Driver(NamedTuple):
    """A video or a saved track whose landmarks drive. A saved track has no frames."""
    name: str
    track: Track
    points: np.ndarray              # (n, 68, 2): the landmarks of the whole track, in crops
    chosen: list                    # the numbers of at most FRAMES frames with a face
    shown: list                     # uint8 (S, S, 3): SHOWN of these; for a saved track, drawn landmarks
    vectors: np.ndarray | None      # (m, d): recognition vectors of the chosen frames; None for a saved track
    moves: float                    # metrics.change() of the first RUN frames; NaN for a saved track


# -------------------------------------------------------------------------------------- who drives whom

def find_drivers(folder):
    """-> the paths of the videos and saved tracks in a folder. Raises UserError if there are none."""
    files = sorted(Path(folder).iterdir()) if Path(folder).is_dir() else []
    files = [path for path in files if path.suffix.lower() in CLIPS | {".npz"}]
    drivers = [str(path) for path in files if path.is_file() and not is_system(path.name)]
    if not drivers:
        raise UserError(f"no videos or saved tracks (.npz) in {folder}, which --drivers names")
    return drivers


def open_driver(path, setup):
    """A video or a saved track -> Driver. setup: evaluate.Setup."""
    config = setup.state["config"]
    size, track = config.image_size, read_driver(path, config.landmarks, setup.detect, tell_apart())
    points = track.in_crops(size)
    chosen = evenly(np.flatnonzero(track.found).tolist(), FRAMES)
    shown = [draw_landmarks(points[k], size) for k in evenly(chosen, SHOWN)]
    driver = Driver(Path(path).name, track, points, chosen, shown, None, np.nan)
    if is_track(path):
        return driver
    run = range(min(len(points), RUN))
    crops = read_crops(path, track, {*chosen, *run}, size)
    chosen, run = ([k for k in numbers if k in crops] for numbers in (chosen, run))
    vectors = np.stack([setup.recognise(crops[k], points[k]) for k in chosen])
    moves = change(np.stack([crops[k] for k in run]))
    shown = [crops[k] for k in evenly(chosen, SHOWN)]
    return driver._replace(chosen=chosen, shown=shown, vectors=vectors, moves=moves)


def open_people(data, chosen, recognise):
    """-> {video: Person}. chosen: the videos and their frames, from protocol.draw_protocol()."""
    people, videos = {}, find_videos(data)
    for video, numbers in chosen.items():
        frames, points = data.load(videos[video][0], numbers["learn"])
        holdout = data.load(videos[video][1], numbers["holdout"])
        others = np.stack([recognise(*pair) for pair in zip(*holdout)])
        people[video] = Person(person_of(video), frames, points, recognise(frames[0], points[0]), others)
    return people


def anchors(people):
    """The mean CSIM of strangers and of the same person, between photos and hold-out frames.

    They are 0 and 100 on the scale of the identity score. The first is NaN if all videos show one person.
    people: {video: Person}.
    """
    strangers, same = [], []
    for a in people.values():
        same.append((a.others @ a.photo).mean())
        strangers += [(b.others @ a.photo).mean() for b in people.values() if b.name != a.name]
    return np.mean(strangers or [np.nan]), np.mean(same)


def other_drivers(drivers, video, person, strangers, same):
    """The drivers who are not this Person according to the recognition network, and all saved tracks."""
    others = []
    for driver in drivers:
        csim = np.nan if driver.vectors is None else (person.others @ driver.vectors.T).mean()
        if identity_score(csim, strangers, same) > SAME_PERSON:
            tqdm.write(f"{driver.name} is left out for {video}: it seems to be the same person")
        else:
            others.append(driver)
    return others


# ----------------------------------------------------------------------------------------- one person

def drive(folder, video, person, drivers, everyone, setup, learn):
    """Drive one person by every driver with every motion. Writes the strips, then puppets.csv, to `folder`.

    everyone: {name of a person: (d,), the mean vector of their hold-out frames}.
    setup, learn: as in puppeteer().
    """
    # (1) the person is learned once
    config, model = setup.state["config"], load_face3d()
    photos = [Photo(*pair) for pair in zip(person.frames[:, None], person.points[:, None])]
    draw = learn(photos)
    source = describe([photo.points for photo in photos], model)

    # (2) and driven by everybody
    k, mean_vectors = list(everyone).index(person.name), np.stack(list(everyone.values()))
    rows = []
    for driver in drivers:
        for motion in MOTIONS:
            points = adapt(driver.track, source, motion, config.image_size, model, config.lips)
            chosen = points[driver.chosen]
            results = draw(chosen)                                                          # (m, S, S, 3)
            vectors = np.stack([setup.recognise(*pair) for pair in zip(results, chosen)])
            row = {"video": video, "driver": driver.name, "motion": motion}
            row |= puppet_identity(vectors, person.photo, person.others, driver.vectors, mean_vectors, k)
            row |= movements(results, chosen, driver.points[driver.chosen], setup.detect, model)
            row["crossed"] = crossed(chosen, model)
            if driver.moves > 0:        # not for a saved track, which has NaN
                row["frame_changes"] = change(draw(points[:RUN])) / driver.moves
            rows.append(row)
            write_strip(f"{folder}/{driver.name} {motion}.png", evenly(list(results), SHOWN))
    write_scores(f"{folder}/puppets.csv", rows, COLUMNS)


# -------------------------------------------------------------------------------------------- everybody

def puppeteer(out, data, chosen, drivers, setup, learn, judge, trained_on):
    """The whole experiment. A stopped one goes on with the people who are not finished.

    chosen: the videos and their frames, from protocol.draw_protocol().  drivers: [Driver].
    setup: evaluate.Setup.  judge, trained_on: as in report.table().
    learn(photos): fine-tunes on a person's photos, and returns draw(points), a function that turns landmarks
    (n, 68, 2) into frames of the person, uint8 (n, S, S, 3).
    """
    people = open_people(data, chosen, setup.recognise)
    strangers, same = anchors(people)
    names = {video: person.name for video, person in people.items()}
    everyone = mean_people({video: person.others for video, person in people.items()}, names)   # {name: (d,)}
    rows = []
    for video, person in tqdm(people.items(), "puppeteering", unit=" videos"):
        if not (out / video / "puppets.csv").exists():
            others = other_drivers(drivers, video, person, strangers, same)
            drive(out / video, video, person, others, everyone, setup, learn)
        rows += read_scores(out / video / "puppets.csv")
    if not rows:
        raise UserError("every driver seems to be the person to be driven: --drivers needs clips of others")
    write_scores(out / "puppets.csv", rows, COLUMNS)

    rows = [as_numbers(row) for row in rows]
    best = best_drivers(rows)
    texts = [table(rows, len(everyone), judge, trained_on, strangers, same),
             caption(len(people), len(drivers), judge, strangers, same), ranking(rows, best)]
    with atomic(out / "puppets.md") as temporary:
        Path(temporary).write_text("\n\n".join(texts) + "\n")
    print(*texts, sep="\n\n")
    sheet(out, people, best, drivers)
    print(f"wrote {out}/puppets.md, {out}/puppets.csv and {out}/puppets.png")


def best_drivers(rows):
    """-> {video: the driver with the highest CSIM to its photo}, for the motion "paper", as in the paper."""
    as_in_paper = [row for row in rows if row["motion"] == "paper"]
    ordered = sorted(as_in_paper, key=lambda row: row["csim_photo"])
    return {row["video"]: row["driver"] for row in ordered}     # the last driver of a video, its best, stays


def table(rows, people, judge, trained_on, strangers, same):
    """A markdown table with a line for each motion.

    rows: the rows of puppets.csv, as numbers.  people: the number of people.
    judge, trained_on: as in report.table().  strangers, same: from anchors().
    """
    paper = {(row["video"], row["driver"]): row["csim"] for row in rows if row["motion"] == "paper"}
    lines = []
    for motion in MOTIONS:
        group = [row for row in rows if row["motion"] == motion]
        csim = mean(group, "csim")
        better = [row["csim"] > paper[row["video"], row["driver"]] for row in group]
        share = lambda column: per_cent([row[column] for row in group])
        plain = lambda column: number(mean(group, column)[:1], 2)
        lines.append({
            "motion": motion, csim_title(judge, trained_on): number(csim, 3),
            "identity score ↑": number([identity_score(csim[0], strangers, same)], 0),
            "CSIM to the photo": number(mean(group, "csim_photo"), 3),
            "CSIM to the driver ↓": number(mean(group, "csim_driver"), 3),
            "nearer to the driver ↓": share("nearer_driver"),
            "better than paper": per_cent(better) if motion != "paper" else "",
            f"nearest of {people} ↑": share("nearest"),
            "mouth r": plain("mouth_r"), "mouth amplitude": plain("mouth_ratio"),
            "yaw r": plain("yaw_r"), "roll r": plain("roll_r"),
            "landmarks ↓": number(mean(group, "landmark_error"), 1), "face found": share("found"),
            "crossed lips ↓": share("crossed"), "frame changes": plain("frame_changes")})
    return markdown(lines)


def caption(videos, drivers, judge, strangers, same):
    """The explanation below the table. videos, drivers: how many.  The others: as in table()."""
    return (
        f"Means over {videos} videos ± standard error, each driven by up to {drivers} others. CSIM is "
        f"computed with {judge}, against other photos of the person. Between real photos it is "
        f"{number([strangers], 3)} for strangers and {number([same], 3)} for the same person, which are 0 "
        "and 100 on the scale of the identity score. Nearer to the driver: the share of frames that are "
        "nearer to the driver than to these photos. Better than paper: the share of pairs of a person and a "
        "driver whose CSIM is higher than with --motion paper. Nearest: the share of frames that are nearest "
        "to the person. Mouth r, yaw r, roll r: correlations with the driver. Mouth amplitude: the standard "
        "deviation of the mouth's opening, divided by the driver's. Landmarks: their error in % of the "
        "distance between the outer eye corners. CSIM to the photo and to the driver: with the photo that is "
        "driven, and with the driver's frames. Crossed lips: the share of frames whose input landmarks "
        "have the upper lip below the lower one. Frame changes: the mean change from one frame to the next, "
        "divided by the driver's.")


def ranking(rows, best):
    """A markdown table of the drivers, the best first.

    It has their mean CSIM to the photo by motion, and for how many videos each is the best.
    rows: as in table().  best: from best_drivers().
    """
    csim = lambda driver, motion: np.mean([row["csim_photo"] for row in rows
                                           if (row["driver"], row["motion"]) == (driver, motion)])
    drivers = sorted({row["driver"] for row in rows}, key=lambda driver: -csim(driver, "paper"))
    lines = []
    for driver in drivers:
        csims = {motion: f"{csim(driver, motion):.3f}" for motion in MOTIONS}
        count = list(best.values()).count(driver)
        lines.append({"driver": driver, **csims, "best for": f"{count} of {len(best)}"})
    return "CSIM to the photo, by driver and motion:\n\n" + markdown(lines)


def sheet(out, people, best, drivers, limit=6):
    """A picture like Fig. 5: the first people, each driven by their best driver, whose frames are on top."""
    shown, rows = {driver.name: driver.shown for driver in drivers}, []
    videos = [video for video in people if video in best]
    for video in videos[:limit]:
        driver, photo = best[video], people[video].frames[0]
        rows.append((driver, [None, *shown[driver]]))
        for motion in MOTIONS:
            results = read_strip(f"{out}/{video}/{driver} {motion}.png")
            rows.append((f"{video}\n{motion}", [photo, *results]))
    write_sheet(out / "puppets.png", [SOURCE, "driver; results"], rows, left=180)
