"""The paper's Sec. 4, A.1 and A.2 on a checkpoint: how good, how fast, and what each part is worth.

    python evaluate.py --checkpoint FT.pt --data unseen --shots 1 8 32     # Table 1, a figure like Fig. 4
    python evaluate.py ... --ff-checkpoint FF.pt --ablation                # and the rows of A.2, Fig. 7
    python evaluate.py ... --recognition FILE --train-data DIR             # do they stay who they are?
    python evaluate.py ... --user-study study                              # study/index.html, to be clicked
    python evaluate.py --toy                                               # drawn heads, without any data
    python evaluate.py --toy --timing                                      # Table 2 instead
    python evaluate.py --data unseen --drivers DIR --shots 1               # Fig. 5 instead: evaluation.puppeteer

For every video of people that the checkpoint has not seen: learn from T frames, draw the 32 hold-out
frames from their own landmarks (infer.py's --motion paper), compare with the true ones. A prepared folder
with train/NAME and test/NAME keeps that split. Otherwise a video learns from its first part and holds out
its last, a second or more apart; photos, which have no time, are shuffled, and none is in both parts.

What is random. --seed chooses videos and frames, and what the user study shows, nothing else. Fine-tuning
shuffles, and draws other poses, by generators of its own with seed 0, for every video, T and row. The
rows of A.2 put in normal numbers of another such generator, with the mean and the deviation that the
elements of the replaced vector have: e_NEW's (cut at 0, as E ends in a ReLU; psi' and w' follow from
them), those of psi' = P e_NEW, or e_NEW's in w' = w0 + e_NEW. So a row is the same whichever others are made.

Writes to --out: protocol.json (who, which frames), a folder per video (a strip of frames per method,
scores.csv, vectors.npz), scores.csv with every frame of every video, table.md and figure.png. A
stopped run goes on where it was.
"""
import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from beyond.likeness import LIKENESS_WEIGHT, POSES
from beyond.toy import ToyHeads
from data import PreparedVideos, check_landmarks
from evaluation.metrics import (dlib_recognition, inception, landmark_error, mean_vector, ssim,
                                torchscript_recognition)
from evaluation.protocol import draw_protocol, find_videos, person
from evaluation.puppeteer import find_drivers, open_driver, puppeteer
from evaluation.report import (AFTER, BEFORE, COPY, FF, NEAREST, REAL, SOURCE, key, report, user_study,
                               write_scores, write_strip, write_vectors)
from evaluation.timing import timing
from finetune import (CHECKPOINT, EPOCHS, add_content_flags, content_loss, finetune, learn_person,
                      load_for_finetuning)
from infer import render
from losses import FACE_WEIGHT, ContentLoss
from media.faces import landmark_detector
from media.folders import evenly
from model import load_checkpoint, load_networks
from runtime.device import default_device, fast_dtype
from runtime.files import UserError, atomic, check_paths, make_parser, run, warn

ABLATION = {  # A.2: what finetune() is called with
    "without L'_ADV": {"adversarial": False},
    "random w'": {"random": "w"},
    "random psi'": {"random": "psi"},
    "random e_NEW": {"random": "e"}}
NO_MATCH = "without L_MCH, random w'"


# -------------------------------------------------------------------------------------- the methods

class Setup(NamedTuple):
    """What is the same for all videos."""
    state: dict             # the checkpoint
    ff_state: dict | None
    content: ContentLoss
    ablation: bool
    detect: object          # of faces.landmark_detector; None for drawn heads, which are no faces to it
    recognise: object       # frame, points -> vector of norm 1; None for drawn heads
    device: str


def learn(state, photos, setup, epochs, **switches):
    """Fine-tune a checkpoint on a person's photos -> draw(points), which makes frames of the person.

    photos, epochs, switches: as for learn_person().  draw: landmarks (n, 68, 2) -> uint8 (n, S, S, 3).
    """
    G, psi, _ = learn_person(state, photos, setup.content, epochs, setup.device, progress=False, **switches)
    size = state["config"].image_size
    return lambda points: np.stack(list(render(G, psi, points, size, progress=False)))


def methods(setup, T, source, truth):
    """Learn from the first T frames of `source`, then draw the n hold-out frames by every method.

    source, truth: (frames uint8, landmarks) of the learning and the hold-out part.
    Yields (method, frames uint8 (n, S, S, 3), where their faces are (n, 68, 2)).
    """
    # the controls
    frames, points = source[0][:T], source[1][:T]
    copied = np.zeros(len(truth[0]), int)
    yield COPY, frames[copied], points[copied]
    distance = np.linalg.norm(truth[1][:, None] - points[None], axis=-1).mean(-1)     # (n, T)
    nearest = distance.argmin(1)
    yield NEAREST, frames[nearest], points[nearest]

    # ours
    photos = list(zip(frames[:, None], points[:, None]))        # every frame counts as a photo

    def ours(state, epochs=EPOCHS, **switches):
        draw = learn(state, photos, setup, epochs, **switches)
        return draw(truth[1]), truth[1]

    if setup.ff_state:
        yield FF, *ours(setup.ff_state, epochs=0)
    yield BEFORE, *ours(setup.state, epochs=0)
    yield AFTER, *ours(setup.state)
    if setup.ablation:
        for name, switches in ABLATION.items():
            yield name, *ours(setup.state, **switches)
        if setup.ff_state:
            yield NO_MATCH, *ours(setup.ff_state, random="w")


def score_video(folder, name, chosen, shots, source, truth, setup):
    """One video, into its folder: strips, vectors, and at last scores.csv, by which it is done.

    chosen: numbers of the hold-out frames.  source, truth: (frames, landmarks).
    """
    frames, points = truth
    rows, vectors = [], {}

    def score(T, method, results, faces):
        title = key({"T": T, "method": method})
        write_strip(f"{folder}/{title}.png", results)
        if setup.recognise:     # aligned by where the face is
            pairs = zip(results, faces)
            vectors[title] = np.array([setup.recognise(result, face) for result, face in pairs])
        for k, result in enumerate(results):
            row = {"video": name, "T": T, "method": method, "frame": chosen[k]}
            row["ssim"] = ssim(result, frames[k])
            if setup.detect:
                error = landmark_error(result, points[k], setup.detect)
                row |= {"landmark_error": error, "found": int(error is not None)}
            rows.append(row)

    write_strip(f"{folder}/T0 {SOURCE}.png", source[0])
    score(0, REAL, frames, points)
    for T in shots:
        for result in methods(setup, T, source, truth):
            score(T, *result)
    write_vectors(f"{folder}/vectors.npz", vectors)
    write_scores(f"{folder}/scores.csv", rows)


def training_people(data, recognise, kind, cache):
    """-> (m, d): everybody in a prepared folder, each the mean over 4 frames of all their sequences.

    kind: of the network. Vectors of the same data by the same network are kept in `cache`.
    """
    kind = f"{kind} {data.name} {data.image_size}"
    if cache.exists():
        kept = np.load(cache)
        if kept["kind"] == kind:
            return kept["vectors"]
    people = {}
    for i, file in enumerate(tqdm(data.files, "training people", unit=" sequences")):
        who = person(os.path.relpath(file, data.folder).removesuffix(".pt"))
        try:
            faces = zip(*data.load(i, lambda count: list(evenly(range(count), 4))))
        except UserError as e:      # one damaged file among thousands
            warn(e)
            continue
        people.setdefault(who, []).extend(recognise(frame, points) for frame, points in faces)
    vectors = np.stack([mean_vector(those) for those in people.values()])
    write_vectors(cache, {"kind": kind, "vectors": vectors})
    return vectors


# ------------------------------------------------------------------------------------------ command

def parse():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", help="a meta-learned one (default: the bundled one, with --toy weights/toy.pt)")
    add("--ff-checkpoint", metavar="FILE",
        help="of meta_train.py --no-match (for A.2 with --K 1), for the row Ours-FF")
    add("--data", default="prepared", metavar="DIR", help="folder that data.py prepared (default: prepared)")
    add("--train-data", metavar="DIR", help="the training's: are frames nearer to somebody there?")
    add("--toy", action="store_true", help="drawn heads that no training has seen, no --data")
    add("--shots", type=int, nargs="+", default=[1, 8, 32], metavar="T",
        help="frames to learn from (1 8 32)")
    add("--videos", type=int, default=50, help="at most so many, drawn uniformly (50)")
    add("--holdout", type=int, default=32, help="frames of each to compare (32)")
    add("--drivers", metavar="DIR", help="videos and saved tracks of others, who drive (smallest T)")
    add("--out", metavar="DIR", help="(runs/eval; with --drivers runs/puppets)")
    add("--seed", type=int, default=0, help="of the choice of videos and frames (0)")
    add("--recognition", metavar="FILE", help="ArcFace-like TorchScript network for CSIM (default: dlib's)")
    add("--inception", metavar="FILE", help="weights of FID's network, from torch-fidelity's releases")
    add("--ablation", action="store_true", help="add the rows of A.2")
    add("--user-study", metavar="DIR", help="write a page with the triplets of Sec. 4")
    add("--timing", action="store_true", help="print Table 2 and nothing else")
    add_content_flags(parser)
    args = parser.parse_args()
    bundled = Path(CHECKPOINT).with_name("toy.pt") if args.toy else CHECKPOINT
    args.checkpoint = args.checkpoint or str(bundled)
    if min(*args.shots, args.videos, args.holdout) < 1 or args.seed < 0:
        raise UserError("--shots, --videos and --holdout must be at least 1, --seed at least 0")
    tables_only = (args.toy, args.ff_checkpoint, args.ablation, args.train_data, args.user_study,
                   args.timing, args.inception)
    if args.drivers and any(tables_only):
        raise UserError("--drivers drives real faces, and that is all: leave out --toy, --ff-checkpoint, "
                        "--ablation, --train-data, --user-study, --timing and --inception")
    if args.train_data and args.toy and not args.recognition:
        raise UserError("--train-data compares faces: with --toy it needs a --recognition network")
    check_paths([args.checkpoint, args.ff_checkpoint, args.recognition, args.inception,
                 args.vgg19, args.vggface])
    args.shots.sort()
    args.out = args.out or ("runs/puppets" if args.drivers else "runs/eval")
    if args.drivers:
        args.drivers, args.shots = find_drivers(args.drivers), args.shots[:1]
    return args


def load_checkpoints(args, device):
    """-> state, and that of the FF variant or None; UserError if they don't go together."""
    state = load_for_finetuning(args.checkpoint, device)
    ff_state = load_checkpoint(args.ff_checkpoint, device) if args.ff_checkpoint else None
    if ff_state:
        ours, ff = state["config"], ff_state["config"]
        if ff.match:
            raise UserError(f"{args.ff_checkpoint} was trained with the match loss: the FF variant comes "
                            "from meta_train.py --no-match")
        if (ff.image_size, ff.landmarks) != (ours.image_size, ours.landmarks):
            raise UserError(f"{args.ff_checkpoint} has another image size or other landmarks "
                            f"than {args.checkpoint}")
    for checkpoint in filter(None, (state, ff_state)):
        load_networks(checkpoint)       # refused now, if it is not whole
    return state, ff_state


def digest(path):
    return path and hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]


def write_protocol(args, data, content, device):
    """-> {name: frames} of the videos to evaluate, now in protocol.json. UserError if --out has another."""
    chosen = draw_protocol(data, args.shots, args.holdout, args.videos, args.seed)
    if isinstance(data, PreparedVideos):        # the folder may have been prepared anew
        for name in chosen:
            chosen[name]["files"] = [digest(data.files[i]) for i in find_videos(data)[name]]
    protocol = {
        "checkpoint": digest(args.checkpoint), "ff_checkpoint": digest(args.ff_checkpoint),
        "content": [content.kind, content.face_weight, digest(args.vgg19), digest(args.vggface)],
        "likeness": [LIKENESS_WEIGHT, POSES] if content.face else None,
        "recognition": digest(args.recognition), "drawn": f"folded, {fast_dtype(device)}",
        "data": data.name, "ablation": args.ablation, "shots": args.shots, "seed": args.seed,
        "videos": chosen}
    if args.drivers:
        protocol["drivers"] = {os.path.basename(path): digest(path) for path in args.drivers}
    path = Path(args.out) / "protocol.json"
    if path.exists() and json.loads(path.read_text()) != protocol:
        raise UserError(f"{args.out} holds an evaluation of something else: name another --out")
    with atomic(path) as temporary:
        Path(temporary).write_text(json.dumps(protocol, indent=1))
    return chosen


def main():
    args = parse()
    device, out = default_device(), Path(args.out)

    # (1) everything is read, and refused, before anything long begins
    state, ff_state = load_checkpoints(args, device)
    config = state["config"]
    size = config.image_size
    data = ToyHeads(args.videos, size, first=1000) if args.toy else PreparedVideos(args.data, size)
    check_landmarks(data, args.data, config, args.checkpoint)
    train_data = PreparedVideos(args.train_data, size) if args.train_data else None
    content = content_loss(args, config, face=0.0 if args.toy else FACE_WEIGHT).to(device)
    if args.timing:
        frames, points = data.load(0, lambda count: range(min(count, max(args.shots))))
        print(timing(state, content, frames, points, args.shots, device, finetune, EPOCHS))
        return
    network = inception(args.inception, device) if args.inception else None
    if args.recognition:
        recognise = torchscript_recognition(args.recognition, device)
    else:
        recognise = None if args.toy else dlib_recognition()
    detect = None if args.toy else landmark_detector(config.landmarks)
    setup = Setup(state=state, ff_state=ff_state, content=content, ablation=args.ablation,
                  detect=detect, recognise=recognise, device=device)
    drivers = [open_driver(path, setup) for path in args.drivers or []]
    judge = os.path.basename(args.recognition or "dlib")
    # the face term of content losses is dlib's network: where there is one, dlib judges what it has trained
    trained_on = judge == "dlib" and bool(config.face or content.face)

    # (2) the videos, one by one
    chosen, videos = write_protocol(args, data, content, device), find_videos(data)
    if drivers:
        fine_tuned = lambda photos: learn(state, photos, setup, EPOCHS)
        puppeteer(out, data, chosen, drivers, setup, fine_tuned, judge, trained_on)
        return
    for name in tqdm(chosen, "evaluating", unit=" videos"):
        if not (out / name / "scores.csv").exists():
            source = data.load(videos[name][0], lambda count: chosen[name]["learn"])
            truth = data.load(videos[name][1], lambda count: chosen[name]["holdout"])
            score_video(out / name, name=name, chosen=chosen[name]["holdout"], shots=args.shots,
                        source=source, truth=truth, setup=setup)

    # (3) what they say together
    training = None
    if train_data:
        kind = digest(args.recognition) or judge
        training = training_people(train_data, recognise, kind, out / "training.npz")
    people = {name: person(name) for name in chosen}
    report(out, people=people, shots=args.shots, holdout=args.holdout, judge=judge,
           trained_on=trained_on, training=training, network=network)
    if args.user_study:
        user_study(args.user_study, out, people, args.shots, args.seed)


if __name__ == "__main__":
    run(main)
