"""Puppeteering, Sec. 4 and Fig. 5: every held-out person is driven by clips of others.

`evaluate.py --drivers DIR` calls it. A person is learned once, from T frames, and driven by every driver
with every motion of adapt.py. Of each result: is it still the person, and did it take over the movements?
Drivers are ranked as in the paper: by CSIM "between the original image and the generated one".

Writes to --out: a folder per person (a strip of frames per driver and motion, puppets.csv, by which the
person is done), puppets.csv of all people, puppets.md and puppets.png.
"""
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from beyond.adapt import adapt, describe
from beyond.face3d import load_face3d
from data import draw_landmarks
from evaluation.metrics import change, crossed, likeness, mean_people, movements
from evaluation.protocol import find_videos, person
from evaluation.report import (SOURCE, as_numbers, csim_title, markdown, mean, number, of_the_way,
                               read_scores, read_strip, share, write_scores, write_sheet, write_strip)
from media.folders import CLIPS, evenly, is_system
from media.tracking import Track, is_track, read_crops, read_driver
from runtime.files import UserError, atomic

MOTIONS = "paper", "absolute", "relative"
FRAMES = 20     # of a driver, evenly spread: for all figures but steadiness
RUN = 50        # of a driver, one after the other: for steadiness
SHOWN = 5       # of the FRAMES, in the sheet
ITSELF = 0.75   # of the way from strangers to the same person: a driver beyond it is that person
COLUMNS = ["video", "driver", "motion", "csim", "csim_photo", "csim_driver", "nearer_driver", "first",
           "mouth_r", "mouth_ratio", "yaw_r", "roll_r", "landmark_error", "found", "crossed", "steadiness"]


class Person(NamedTuple):
    """A held-out one, in real frames."""
    who: str                # two videos may show the same person
    frames: np.ndarray      # uint8 (T, S, S, 3): to learn from; the first is the photo that is driven
    points: np.ndarray      # (T, 68, 2)
    photo: np.ndarray       # (d,): the recognition network's vector of that photo
    others: np.ndarray      # (h, d): of the hold-out frames


class Driver(NamedTuple):
    name: str
    track: Track
    points: np.ndarray              # (n, 68, 2): of the whole track, in crops
    chosen: list                    # numbers of at most FRAMES frames with a face
    shown: list                     # uint8 (S, S, 3): SHOWN of these; of a saved track its landmarks
    vectors: np.ndarray | None      # (m, d): of the chosen frames; None of a saved track
    moves: float                    # metrics.change() of the first RUN frames; NaN of a saved track


# -------------------------------------------------------------------------------------- who drives whom

def find_drivers(folder):
    """-> the paths of the videos and saved tracks in a folder. UserError if there are none."""
    files = sorted(Path(folder).iterdir()) if Path(folder).is_dir() else []
    files = [path for path in files if path.suffix.lower() in CLIPS | {".npz"}]
    drivers = [str(path) for path in files if path.is_file() and not is_system(path.name)]
    if not drivers:
        raise UserError(f"no videos or saved tracks (.npz) in {folder}, which --drivers names")
    return drivers


def open_driver(path, setup):
    """A video or a saved track -> Driver."""
    config = setup.state["config"]
    size, track = config.image_size, read_driver(path, config.landmarks, setup.detect)
    points = track.in_crops(size)
    chosen = evenly(np.flatnonzero(track.found).tolist(), FRAMES)
    shown = [draw_landmarks(points[k], size) for k in evenly(chosen, SHOWN)]
    driver = Driver(Path(path).name, track, points, chosen, shown, None, np.nan)
    if is_track(path):
        return driver
    run = range(min(len(points), RUN))
    crops = read_crops(path, track, {*chosen, *run}, size)
    vectors = np.stack([setup.recognise(crops[k], points[k]) for k in chosen])
    moves = change(np.stack([crops[k] for k in run]))
    return driver._replace(shown=[crops[k] for k in evenly(chosen, SHOWN)], vectors=vectors, moves=moves)


def open_people(data, chosen, recognise):
    """-> {video: Person}. chosen: of protocol.draw_protocol, for T frames to learn from."""
    people, videos = {}, find_videos(data)
    for name, numbers in chosen.items():
        frames, points = data.load(videos[name][0], lambda count: numbers["learn"])
        holdout = data.load(videos[name][1], lambda count: numbers["holdout"])
        others = np.stack([recognise(*face) for face in zip(*holdout)])
        people[name] = Person(person(name), frames, points, recognise(frames[0], points[0]), others)
    return people


def anchors(people):
    """-> CSIM of strangers (NaN: there are none) and of the same person, by photos and hold-out frames."""
    strangers, same = [], []
    for a in people.values():
        same.append((a.others @ a.photo).mean())
        strangers += [(b.others @ a.photo).mean() for b in people.values() if b.who != a.who]
    return np.mean(strangers or [np.nan]), np.mean(same)


def other_drivers(drivers, name, someone, strangers, same):
    """Those that are not this Person by the recognition network; a saved track shows nobody."""
    others = []
    for driver in drivers:
        csim = np.nan if driver.vectors is None else (someone.others @ driver.vectors.T).mean()
        if of_the_way(csim, strangers, same) > ITSELF:
            tqdm.write(f"{driver.name} is left out for {name}: it seems to be the same person")
        else:
            others.append(driver)
    return others


# ----------------------------------------------------------------------------------------- one person

def drive(folder, name, someone, drivers, everyone, setup, learn):
    """One person, driven by every driver with every motion, into its folder; at last puppets.csv."""
    # (1) the person is learned once
    config, face = setup.state["config"], load_face3d()
    photos = list(zip(someone.frames[:, None], someone.points[:, None]))    # every frame counts as one
    draw = learn(photos)
    source = describe([points for _, points in photos], face)

    # (2) and driven
    k, faces = list(everyone).index(someone.who), np.stack(list(everyone.values()))
    rows = []
    for driver in drivers:
        for motion in MOTIONS:
            points = adapt(driver.track, source, motion, config.image_size, face, config.lips)  # (n, 68, 2)
            chosen = points[driver.chosen]
            results = draw(chosen)                                                      # (m, S, S, 3)
            vectors = np.stack([setup.recognise(*pair) for pair in zip(results, chosen)])
            row = {"video": name, "driver": driver.name, "motion": motion}
            row |= likeness(vectors, someone.photo, someone.others, driver.vectors, faces, k)
            row |= movements(results, chosen, driver.points[driver.chosen], setup.detect, face)
            row["crossed"] = crossed(chosen, face)
            if driver.moves > 0:        # NaN of a saved track
                row["steadiness"] = change(draw(points[:RUN])) / driver.moves
            rows.append(row)
            write_strip(f"{folder}/{driver.name} {motion}.png", evenly(list(results), SHOWN))
    write_scores(f"{folder}/puppets.csv", rows, COLUMNS)


# ------------------------------------------------------------------------------------------ all of them

def puppeteer(out, data, chosen, drivers, setup, learn, judge, trained_on):
    """The whole experiment. chosen: of protocol.draw_protocol.  drivers: [Driver].

    setup: evaluate.Setup.  judge, trained_on: as in report.table().
    learn(photos): fine-tunes on a person's photos, and returns draw(points), a function that turns landmarks
    (n, 68, 2) into frames of the person, uint8 (n, S, S, 3).
    """
    people = open_people(data, chosen, setup.recognise)
    strangers, same = anchors(people)
    who = {name: someone.who for name, someone in people.items()}
    everyone = mean_people({name: someone.others for name, someone in people.items()}, who)  # {who: (d,)}
    rows = []
    for name, someone in tqdm(people.items(), "puppeteering", unit=" people"):
        if not (out / name / "puppets.csv").exists():
            others = other_drivers(drivers, name, someone, strangers, same)
            drive(out / name, name, someone, others, everyone, setup, learn)
        rows += read_scores(out / name / "puppets.csv")
    if not rows:
        raise UserError("every driver seems to be the person whom it drives: name clips of others")
    write_scores(out / "puppets.csv", rows, COLUMNS)

    rows = [as_numbers(row) for row in rows]
    best = best_drivers(rows)
    parts = [table(rows, len(everyone), judge, trained_on, strangers, same),
             caption(len(people), len(drivers), judge, strangers, same), ranking(rows, best)]
    with atomic(out / "puppets.md") as temporary:
        Path(temporary).write_text("\n\n".join(parts) + "\n")
    print(*parts, sep="\n\n")
    sheet(out, people, best, drivers)
    print(f"wrote {out}/puppets.md, {out}/puppets.csv and {out}/puppets.png")


def best_drivers(rows):
    """-> {video: the driver of the highest CSIM to its photo}, by landmarks as they are: the paper's."""
    as_in_paper = [row for row in rows if row["motion"] == "paper"]
    ordered = sorted(as_in_paper, key=lambda row: row["csim_photo"])
    return {row["video"]: row["driver"] for row in ordered}     # the last one of a video stays


def table(rows, people, judge, trained_on, strangers, same):
    """A line a motion, in markdown. rows: of puppets.csv, as numbers.  people: how many."""
    paper = {(row["video"], row["driver"]): row["csim"] for row in rows if row["motion"] == "paper"}
    lines = []
    for motion in MOTIONS:
        group = [row for row in rows if row["motion"] == motion]
        csim = mean(group, "csim")
        better = [row["csim"] > paper[row["video"], row["driver"]] for row in group]
        percent = lambda column: share([row[column] for row in group])
        plain = lambda column: number(mean(group, column)[:1], 2)
        lines.append({
            "motion": motion, csim_title(judge, trained_on): number(csim, 3),
            "of the way": share(of_the_way(csim[0], strangers, same)),
            "CSIM to the photo": number(mean(group, "csim_photo"), 3),
            "CSIM to the driver ↓": number(mean(group, "csim_driver"), 3),
            "nearer to the driver ↓": percent("nearer_driver"),
            "better than paper": share(better) if motion != "paper" else "",
            f"first of {people} ↑": percent("first"),
            "mouth r": plain("mouth_r"), "mouth amplitude": plain("mouth_ratio"),
            "yaw r": plain("yaw_r"), "roll r": plain("roll_r"),
            "landmarks ↓": number(mean(group, "landmark_error"), 1), "face found": percent("found"),
            "crossed lips ↓": percent("crossed"), "changes": plain("steadiness")})
    return markdown(lines)


def caption(people, drivers, judge, strangers, same):
    return (
        f"Means over {people} people ± standard error, each driven by up to {drivers} others. "
        f"CSIM by {judge}, to other photos: strangers {number([strangers], 3)}, the same person "
        f"{number([same], 3)}. Nearer to the driver: than to these photos. Better than paper: pairs of "
        "person and driver with a higher CSIM. First: frames nearest to the person. Mouth, yaw, roll: "
        "correlation with the driver's; amplitude: deviation over his. Landmarks: error in % of the "
        "distance between the outer eye corners. Changes: from frame to frame, over the driver's own.")


def ranking(rows, best):
    """The drivers, the best first: mean CSIM to the photo, and for how many people each is the best."""
    csim = lambda driver, motion: np.mean([row["csim_photo"] for row in rows
                                           if (row["driver"], row["motion"]) == (driver, motion)])
    drivers = sorted({row["driver"] for row in rows}, key=lambda driver: -csim(driver, "paper"))
    lines = []
    for driver in drivers:
        csims = {motion: f"{csim(driver, motion):.3f}" for motion in MOTIONS}
        count = list(best.values()).count(driver)
        lines.append({"CSIM to the photo": driver, **csims, "best for": f"{count} of {len(best)}"})
    return markdown(lines)


def sheet(out, people, best, drivers, limit=6):
    """Fig. 5: some people, each driven by the driver that is best for them, whose frames are on top."""
    shown, rows = {driver.name: driver.shown for driver in drivers}, []
    names = [name for name in people if name in best]
    for name in names[:limit]:
        driver, photo = best[name], people[name].frames[0]
        rows.append((driver, [None, *shown[driver]]))
        for motion in MOTIONS:
            results = read_strip(f"{out}/{name}/{driver} {motion}.png")
            rows.append((f"{name}\n{motion}", [photo, *results]))
    write_sheet(out / "puppets.png", [SOURCE, "driver; results"], rows, left=180)
