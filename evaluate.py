"""Evaluate a checkpoint as in the paper's Sec. 4, A.1 and A.2.

    python evaluate.py --checkpoint FT.pt --data unseen --shots 1 8 32     # Table 1, and a figure like Fig. 4
    python evaluate.py ... --ff-checkpoint FF.pt --ablation                # more rows: the ablations of A.2
    python evaluate.py ... --recognition FILE --train-data DIR             # is the identity preserved?
    python evaluate.py ... --user-study study                              # writes study/index.html
    python evaluate.py --toy                                               # cartoon heads, which need no data
    python evaluate.py --toy --timing                                      # Table 2 instead
    python evaluate.py --data unseen --drivers DIR --shots 1               # Fig. 5 instead

The videos should show people whom the checkpoint was not trained on. Each person is learned from T frames.
Then 32 hold-out frames are generated from their own landmarks (as with infer.py's --motion paper) and
compared with the real ones. If the prepared folder has train/NAME and test/NAME, the frames to learn from are
drawn from the first and the hold-out frames from the second. Otherwise they are drawn from the first and
from the last part of a video, at least a second apart. Photos, which have no times, are divided at random.
No frame is in both parts.

Randomness: --seed chooses the videos and frames, and the triplets of the user study, and nothing else.
Fine-tuning has its own generators with seed 0, the same for every video, T and method. So no row of a table
depends on which other rows are computed. Each random start of A.2 replaces one vector by normal noise of the
same mean and standard deviation, from another generator with seed 0. The vector is e_NEW (then the noise is
cut off at 0, as by E's ReLU, and psi' and w' follow from it), or psi' = P e_NEW, or e_NEW in w' = w0 + e_NEW
alone. Compare these rows with "Ours-FT, as in the paper".

It writes to --out: protocol.json (which videos and frames), a folder per video (a strip of frames per method,
scores.csv, vectors.npz), scores.csv with every frame of every video, table.md and figure.png. Started again
after a stop, it goes on with the videos that are missing.
"""
import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from beyond.toy import ToyHeads
from data import PreparedVideos, check_landmarks
from evaluation.metrics import inception, landmark_error, mean_vector, ssim, torchscript_recognition
from evaluation.protocol import draw_protocol, find_videos, person_of
from evaluation.puppeteer import find_drivers, open_driver, puppeteer
from evaluation.report import (AFTER, AS_PAPER, BEFORE, COPY, FF, NEAREST, REAL, SOURCE, key, report,
                               write_scores, write_strip, write_vectors)
from evaluation.study import user_study
from evaluation.timing import timing
from finetune import (CHECKPOINT, EPOCHS, add_content_flags, content_loss, finetune, learn_person,
                      load_for_finetuning)
from infer import render
from losses import ContentLoss
from media.faces import landmark_detector
from media.folders import Photo, evenly
from media.recognition import dlib_recognition
from runtime.checkpoint import load_checkpoint, load_networks
from runtime.device import default_device
from runtime.files import UserError, atomic, check_idle, check_paths, make_parser, run, warn

ABLATION = {  # A.2: the arguments of finetune(). The paper randomises w' only after training without L_MCH.
    "without L'_ADV": {"adversarial": False},
    "random w'": {"random": "w"},
    "random psi'": {"random": "psi"},
    "random e_NEW": {"random": "e"}}
NO_MATCH = "without L_MCH, random w'"


# -------------------------------------------------------------------------------------- the methods

class Setup(NamedTuple):
    """What all videos have in common."""
    state: dict             # the checkpoint
    ff_state: dict | None   # the checkpoint of the FF variant
    content: ContentLoss
    ablation: bool          # whether to compute the rows of A.2
    detect: object          # a faces.Detector; None for cartoon heads, in which it would find no face
    recognise: object       # frame, landmarks (68, 2) -> vector (d,) of norm 1; None for cartoon heads
    device: str


def learn(state, photos, setup, epochs, **switches):
    """Fine-tune a checkpoint on a person's photos -> draw(points), which generates frames of the person.

    photos: [Photo].  epochs, switches: as in finetune.learn_person().
    draw: landmarks (n, 68, 2) -> uint8 (n, S, S, 3).
    """
    G, psi, _ = learn_person(state, photos, setup.content, epochs, setup.device, progress=False, **switches)
    size = state["config"].image_size
    return lambda points: np.stack(list(render(G, psi, points, size, progress=False)))


def methods(setup, T, learning, holdout):
    """Learn a person from the first T frames, then generate the n hold-out frames by every method.

    learning, holdout: (frames uint8 (.., S, S, 3), landmarks (.., 68, 2)) to learn from, and to hold out.
    Yields (method, frames uint8 (n, S, S, 3), the landmarks of the faces in these frames (n, 68, 2)).
    """
    # (1) the controls, which copy frames
    frames, points = learning[0][:T], learning[1][:T]
    first = np.zeros(len(holdout[0]), int)
    yield COPY, frames[first], points[first]
    distance = np.linalg.norm(holdout[1][:, None] - points[None], axis=-1).mean(-1)   # (n, T)
    nearest = distance.argmin(1)
    yield NEAREST, frames[nearest], points[nearest]

    # (2) ours; every frame counts as a photo of its own
    photos = [Photo(frames[[t]], points[[t]]) for t in range(len(frames))]

    def ours(state, epochs=EPOCHS, **switches):
        draw = learn(state, photos, setup, epochs, **switches)
        return draw(holdout[1]), holdout[1]

    if setup.ff_state:
        yield FF, *ours(setup.ff_state, epochs=0)
    yield BEFORE, *ours(setup.state, epochs=0)
    yield AFTER, *ours(setup.state)
    yield AS_PAPER, *ours(setup.state, as_paper=True)
    if setup.ablation:
        for name, switches in ABLATION.items():
            yield name, *ours(setup.state, as_paper=True, **switches)
        if setup.ff_state:
            yield NO_MATCH, *ours(setup.ff_state, as_paper=True, random="w")


def score_video(folder, name, numbers, shots, learning, holdout, setup):
    """Evaluate all methods on a video, and write the strips, the vectors and scores.csv to `folder`.

    scores.csv is written last, and marks the video as finished.
    numbers: those of the hold-out frames.  learning, holdout: as in methods().
    """
    real, real_points = holdout
    rows, vectors = [], {}

    def score(T, method, frames, points):
        title = key({"T": T, "method": method})
        write_strip(f"{folder}/{title}.png", frames)
        if setup.recognise:     # the landmarks align the face for the network
            vectors[title] = np.array([setup.recognise(*pair) for pair in zip(frames, points)])
        for k, frame in enumerate(frames):
            row = {"video": name, "T": T, "method": method, "frame": numbers[k]}
            row["ssim"] = ssim(frame, real[k])
            if setup.detect:
                error = landmark_error(frame, real_points[k], setup.detect)
                row |= {"landmark_error": error, "found": int(error is not None)}
            rows.append(row)

    write_strip(f"{folder}/T0 {SOURCE}.png", learning[0])
    score(0, REAL, real, real_points)
    for T in shots:
        for result in methods(setup, T, learning, holdout):
            score(T, *result)
    write_vectors(f"{folder}/vectors.npz", vectors)
    write_scores(f"{folder}/scores.csv", rows)


def training_people(data, recognise, kind, cache):
    """The mean vector of each person in the training data, over 4 frames of each of their videos -> (m, d).

    data: PreparedVideos.  recognise: as in Setup.  kind: the digest or name of the recognition network.
    The vectors are stored in the file `cache`, which is used again for the same data and network.
    """
    kind = f"{kind} {data.name} {data.image_size}"
    if cache.exists():
        stored = np.load(cache)
        if stored["kind"] == kind:
            return stored["vectors"]
    people = {}
    for i, file in enumerate(tqdm(data.files, "training people", unit=" sequences")):
        person = person_of(os.path.relpath(file, data.folder).removesuffix(".pt"))
        try:
            pairs = zip(*data.load(i, list(evenly(range(data.count(i)), 4))))
        except UserError as e:      # one damaged file among thousands
            warn(e)
            continue
        people.setdefault(person, []).extend(recognise(frame, points) for frame, points in pairs)
    vectors = np.stack([mean_vector(own) for own in people.values()])
    write_vectors(cache, {"kind": kind, "vectors": vectors})
    return vectors


# ------------------------------------------------------------------------------------------ command

def parse():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", metavar="FILE",
        help="a step-N.pt of meta_train.py (default: the bundled checkpoint; with --toy, weights/toy.pt)")
    add("--ff-checkpoint", metavar="FILE",
        help="a checkpoint of meta_train.py --no-match, for the row Ours-FF; A.2 needs one of --K 1, and "
             "Ours-FF is then not Table 1's")
    add("--data", metavar="DIR", help="folder that data.py prepared (default: prepared)")
    add("--train-data", metavar="DIR",
        help="the checkpoint's training data; adds the share of frames that are nearer to someone in it than "
             "to the person")
    add("--toy", action="store_true", help="cartoon heads that were not trained on, instead of --data")
    add("--shots", type=int, nargs="+", default=[1, 8, 32], metavar="T",
        help="numbers of frames to learn a person from (1 8 32)")
    add("--videos", type=int, default=50, metavar="N", help="evaluate at most N videos, drawn uniformly (50)")
    add("--holdout", type=int, default=32, metavar="N", help="hold-out frames of each video (32)")
    add("--drivers", metavar="DIR",
        help="drive each person, learned from the smallest T, by the videos and saved tracks in this folder")
    add("--out", metavar="DIR", help="where to write (default: runs/eval; with --drivers, runs/puppets)")
    add("--seed", type=int, default=0, help="seed of the choice of videos and frames (0)")
    add("--recognition", metavar="FILE", help="TorchScript network like ArcFace for CSIM (default: dlib's)")
    add("--inception", metavar="FILE", help="weights of the FID's network, from torch-fidelity's releases")
    add("--ablation", action="store_true", help="add the ablations of A.2 to the table")
    add("--user-study", metavar="DIR", help="write the page of the user study in Sec. 4 to this folder")
    add("--timing", action="store_true", help="only print Table 2")
    add_content_flags(parser)
    args = parser.parse_args()
    bundled = Path(CHECKPOINT).with_name("toy.pt") if args.toy else CHECKPOINT
    args.checkpoint = args.checkpoint or str(bundled)
    if min(*args.shots, args.videos, args.holdout) < 1 or args.seed < 0:
        raise UserError("--shots, --videos and --holdout must be at least 1, --seed at least 0")
    tables_only = "ff_checkpoint", "ablation", "train_data", "user_study", "inception"
    if args.drivers:
        check_idle(args, "--drivers only drives real faces", "toy", "timing", *tables_only)
    if args.timing:
        check_idle(args, "--timing prints Table 2 and nothing else", "recognition", "out", *tables_only)
    if args.toy:
        check_idle(args, "--toy draws its own heads", "data")
    args.data = args.data or "prepared"
    if args.train_data and args.toy and not args.recognition:
        raise UserError("--train-data together with --toy needs a --recognition network")
    check_paths([args.checkpoint, args.ff_checkpoint, args.recognition, args.inception,
                 args.vgg19, args.vggface])
    args.shots.sort()
    args.out = args.out or ("runs/puppets" if args.drivers else "runs/eval")
    if args.drivers:
        args.drivers, args.shots = find_drivers(args.drivers), args.shots[:1]
    return args


def load_checkpoints(args, device):
    """-> the checkpoint, and that of the FF variant or None. UserError if they do not fit together."""
    state = load_for_finetuning(args.checkpoint, device)
    ff_state = load_checkpoint(args.ff_checkpoint, device) if args.ff_checkpoint else None
    if ff_state:
        ours, ff = state["config"], ff_state["config"]
        if ff.match:
            raise UserError(f"{args.ff_checkpoint} was trained with the match loss: --ff-checkpoint needs a "
                            "checkpoint of meta_train.py --no-match")
        if (ff.image_size, ff.landmarks) != (ours.image_size, ours.landmarks):
            raise UserError(f"{args.ff_checkpoint} and {args.checkpoint} differ in image size or landmarks: "
                            "both must be trained on the same data")
    for checkpoint in filter(None, (state, ff_state)):
        load_networks(checkpoint)       # raises UserError if it is incomplete
    return state, ff_state


def digest(path):
    """The beginning of a file's SHA-256, or None without a path."""
    return path and hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]


def write_protocol(args, data, content):
    """Draw the videos and their frames, as draw_protocol() returns them, and write protocol.json to --out.

    The file also says what else the results depend on. UserError if --out has results of another protocol.
    """
    chosen = draw_protocol(data, args.shots, args.holdout, args.videos, args.seed)
    protocol = {
        "checkpoint": digest(args.checkpoint), "ff_checkpoint": digest(args.ff_checkpoint),
        "content": [content.kind, bool(content.extra), digest(args.vgg19), digest(args.vggface)],
        "recognition": digest(args.recognition), "data": data.name, "ablation": args.ablation,
        "shots": args.shots, "seed": args.seed, "videos": chosen}
    if args.drivers:
        protocol["drivers"] = {os.path.basename(path): digest(path) for path in args.drivers}
    path = Path(args.out) / "protocol.json"
    if path.exists() and json.loads(path.read_text()) != protocol:
        raise UserError(f"{args.out} holds an evaluation with other inputs or flags: name another --out")
    with atomic(path) as temporary:
        Path(temporary).write_text(json.dumps(protocol, indent=1))
    return chosen


def main():
    args = parse()
    device, out = default_device(), Path(args.out)

    # (1) read and check everything before the long work begins
    state, ff_state = load_checkpoints(args, device)
    config = state["config"]
    size = config.image_size
    data = ToyHeads(args.videos, size, first=1000) if args.toy else PreparedVideos(args.data, size)
    check_landmarks(data, args.data, config, args.checkpoint)
    train_data = PreparedVideos(args.train_data, size) if args.train_data else None
    content = content_loss(args, config, faces=not args.toy).to(device)
    if args.timing:
        frames, points = data.load(0, range(min(data.count(0), max(args.shots))))
        print(timing(state, content, frames, points, args.shots, device, finetune, EPOCHS))
        return
    inception_network = inception(args.inception, device) if args.inception else None
    if args.recognition:
        recognise = torchscript_recognition(args.recognition, device)
    else:
        recognise = None if args.toy else dlib_recognition()
    detect = None if args.toy else landmark_detector(config.landmarks)
    setup = Setup(state=state, ff_state=ff_state, content=content, ablation=args.ablation,
                  detect=detect, recognise=recognise, device=device)
    drivers = [open_driver(path, setup) for path in args.drivers or []]
    judge = os.path.basename(args.recognition or "dlib")
    # content losses with a face term use dlib's network: then CSIM by dlib's network is not independent
    trained_on = judge == "dlib" and bool(state["run"].get("face_weight") or content.extra)

    # (2) evaluate the videos, one by one
    chosen, videos = write_protocol(args, data, content), find_videos(data)
    if drivers:
        fine_tune = lambda photos: learn(state, photos, setup, EPOCHS)
        puppeteer(out, data, chosen, drivers, setup, fine_tune, judge, trained_on)
        return
    for name in tqdm(chosen, "evaluating", unit=" videos"):
        if not (out / name / "scores.csv").exists():
            learning = data.load(videos[name][0], chosen[name]["learn"])
            holdout = data.load(videos[name][1], chosen[name]["holdout"])
            score_video(out / name, name=name, numbers=chosen[name]["holdout"], shots=args.shots,
                        learning=learning, holdout=holdout, setup=setup)

    # (3) summarise the results
    training = None
    if train_data:
        kind = digest(args.recognition) or judge
        training = training_people(train_data, recognise, kind, out / "training.npz")
    people = {name: person_of(name) for name in chosen}
    report(out, people=people, shots=args.shots, holdout=args.holdout, judge=judge,
           trained_on=trained_on, training=training, inception=inception_network)
    if args.user_study:
        user_study(args.user_study, out, people, args.shots, args.seed)


if __name__ == "__main__":
    run(main)
