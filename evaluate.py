"""The paper's Sec. 4, A.1 and A.2 on a checkpoint: how good, how fast, and what each part is worth.

    python evaluate.py --checkpoint FT.pt --data prepared --shots 1 8 32         # Table 1, with a figure like Fig. 4
    python evaluate.py ... --ff-checkpoint FF.pt --ablation                      # and the rows of A.2, Fig. 7
    python evaluate.py ... --user-study study                                    # and study/index.html, to be clicked
    python evaluate.py --toy                                                     # on drawn heads, without any data
    python evaluate.py --toy --timing                                            # Table 2 instead

For every video: learn from T frames, draw the 32 hold-out frames from their landmarks, compare with the true ones. A
prepared folder with train/NAME and test/NAME keeps that split; otherwise both parts are drawn from the same sequence
and never overlap. Writes to --out: protocol.json (who, which frames), a folder per video (a strip of frames per method,
scores.csv), scores.csv with every frame of every video, table.md and figure.png. A stopped run goes on where it was.
"""
import base64
import csv
import hashlib
import io
import json
import os
import re
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from data import PreparedVideos, to_float, to_tensors, to_uint8
from faces import landmark_detector
from files import UserError, atomic, check_paths, make_parser, run, warn
from finetune import CHECKPOINT, EPOCHS, add_content_flags, content_loss, embed, finetune, load_for_finetuning
from losses import FACE_WEIGHT, ContentLoss
from metrics import dlib_recognition, fid, fid_statistics, inception, landmark_error, ssim, torchscript_recognition
from device import autocast, default_device, fast_dtype
from model import load_checkpoint, load_networks
from toy import ToyHeads

SOURCE, REAL, COPY, NEAREST = "source", "real frame", "copy of the source", "nearest source frame"
FF, BEFORE, AFTER = "Ours-FF", "Ours-FT before fine-tuning", "Ours-FT"
ABLATION = {  # A.2: what finetune() is called with
    "without L'_ADV": {"adversarial": False}, "random w'": {"random": "w"},
    "random psi'": {"random": "psi"}, "random e_NEW": {"random": "e"}}
NO_MATCH = "without L_MCH, random w'"
COLUMNS = ["video", "T", "method", "frame", "ssim", "csim", "csim_stranger", "landmark_error", "found"]
PAPER = {(FF, 1): 0.061, (FF, 8): 0.138, (FF, 32): 0.221, (AFTER, 1): 43.84, (AFTER, 8): 85.48, (AFTER, 32): 258.0}  # Table 2, s
PAPER_FRAME = 0.139  # Table 2, s a frame


# ------------------------------------------------------------------------------------------- the protocol

def find_videos(data):
    """-> {name: (index of the learning sequence, index of the hold-out sequence)}, the same one but for train/ and test/."""
    if isinstance(data, ToyHeads):
        return {f"head {data.first + i}": (i, i) for i in range(len(data))}
    names = {os.path.relpath(file, data.folder).removesuffix(".pt"): i for i, file in enumerate(data.files)}
    split = {name[6:]: (i, names[f"test/{name[6:]}"]) for name, i in names.items() if name.startswith("train/") and f"test/{name[6:]}" in names}
    return split or {name: (i, i) for name, i in names.items()}


def draw_protocol(data, shots, holdout, count, seed):
    """-> {name: {"learn": [frame numbers], "holdout": [...]}} of `count` videos, drawn uniformly. T frames are the first T of these."""
    rng, protocol, short = np.random.default_rng(seed), {}, []
    videos = list(find_videos(data).items())
    for k in rng.permutation(len(videos)):
        name, (i, j) = videos[k]
        frames = rng.permutation(data.count(i)).tolist()
        learn, rest = frames[:max(shots)], frames[max(shots):]
        held = rest[:holdout] if i == j else rng.permutation(data.count(j))[:holdout].tolist()
        if len(learn) < max(shots) or len(held) < holdout:
            short.append(name)
        elif len(protocol) < count:
            protocol[name] = {"learn": learn, "holdout": sorted(held)}
    if short:
        warn(f"left out, with fewer than {max(shots)} + {holdout} frames: {', '.join(sorted(short))}")
    if not protocol:
        raise UserError(f"no video has {max(shots)} + {holdout} frames: ask for fewer with --shots or --holdout")
    return protocol


def person(name):
    """VoxCeleb's id00061 of clips/id00061/rrdqJsdrS3o; elsewhere every sequence is a person of its own."""
    return next((part for part in name.split("/") if re.fullmatch(r"id\d+", part)), name)


@torch.no_grad()
def draw(G, psi, y):
    """All hold-out frames: G'(y; psi, psi'), y (n, 3, S, S) -> uint8 (n, S, S, 3)."""
    with autocast(y.device):
        return np.concatenate([to_uint8(G.eval().render(part, psi.expand(len(part), -1))) for part in y.split(8)])


class Setup(NamedTuple):
    """What is the same for all videos."""
    state: dict             # the checkpoint
    ff_state: dict | None
    content: ContentLoss
    ablation: bool
    detect: object          # of data.landmark_detector; None for drawn heads, which are no faces to it
    recognise: object       # frame, points -> vector of norm 1; None for drawn heads
    device: str


def methods(setup, T, source, truth):
    """Yield (method, frames uint8 (n, S, S, 3), where their faces are (n, 68, 2)) for the n hold-out frames of a video,
    learned from the first T of `source`.

    source, truth: (frames uint8, landmarks) of the learning and the hold-out part.
    """
    frames, points = source[0][:T], source[1][:T]
    yield COPY, np.repeat(frames[:1], len(truth[0]), axis=0), np.repeat(points[:1], len(truth[0]), axis=0)
    distance = np.linalg.norm(truth[1][:, None] - points[None], axis=-1).mean(-1)           # (n, T)
    yield NEAREST, frames[distance.argmin(1)], points[distance.argmin(1)]
    x, y = (to_float(t, setup.device) for t in to_tensors(frames, points))                  # (T, 3, S, S)
    y_hold = to_float(to_tensors(*truth)[1], setup.device)                                  # (n, 3, S, S)

    def ours(state, epochs=EPOCHS, **switches):
        nets = load_networks(state)
        return draw(nets[1], finetune(*nets, x, y, state["config"], setup.content, epochs, **switches)[0], y_hold), truth[1]

    if setup.ff_state:
        yield FF, *ours(setup.ff_state, 0)
    yield BEFORE, *ours(setup.state, 0)
    yield AFTER, *ours(setup.state)
    if setup.ablation:
        for name, switches in ABLATION.items():
            yield name, *ours(setup.state, **switches)
        if setup.ff_state:
            yield NO_MATCH, *ours(setup.ff_state, random="w")


def score_video(folder, name, chosen, shots, source, truth, stranger, setup):
    """One video, into its folder: a strip of frames per method, and at last scores.csv, which says that it is done.

    chosen: numbers of the hold-out frames.  source, truth, stranger: (frames, landmarks); the stranger's may be None.
    """
    frames, points = truth
    vectors = lambda frames, points: np.array([setup.recognise(f, p) if setup.recognise else [np.nan] for f, p in zip(frames, points)])
    own, other = vectors(*truth), vectors(*stranger) if stranger else np.nan
    rows = []

    def score(T, method, results, faces):
        write_strip(f"{folder}/T{T} {method}.png", results)
        found = vectors(results, faces)         # aligned by where the face is ...
        csim = ((found * own).sum(1), (found * other).sum(1))
        for k, result in enumerate(results):
            error = setup.detect and landmark_error(result, points[k], setup.detect)
            rows.append([name, T, method, chosen[k], ssim(result, frames[k]), csim[0][k], csim[1][k], error,
                         int(error is not None) if setup.detect else None])

    write_strip(f"{folder}/T0 {SOURCE}.png", source[0])
    score(0, REAL, frames, points)
    for T in shots:
        for result in methods(setup, T, source, truth):
            score(T, *result)
    write_csv(f"{folder}/scores.csv", rows)


def write_strip(path, frames):
    with atomic(path) as temporary:
        Image.fromarray(np.concatenate(list(frames), axis=1)).save(temporary, "PNG")


def read_strip(path):
    strip = np.asarray(Image.open(path))
    return np.split(strip, strip.shape[1] // len(strip), axis=1)


def write_csv(path, rows):
    with atomic(path) as temporary, open(temporary, "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


# ------------------------------------------------------------------------------- tables, figure, user study

def read_scores(path):
    """-> a dict per row, its numbers as floats, NaN where there is none."""
    with open(path, newline="") as file:
        return [{c: v if c in ("video", "method") else float(v or "nan") for c, v in row.items()} for row in csv.DictReader(file)]


def mean(rows, column):
    """The mean over the videos of the means over their frames, and its standard error; NaN where there is none."""
    videos = {}
    for row in rows:
        if np.isfinite(row[column]):
            videos.setdefault(row["video"], []).append(row[column])
    means = [np.mean(values) for values in videos.values()] or [np.nan]
    return np.mean(means), np.std(means, ddof=1) / len(means) ** .5 if len(means) > 1 else np.nan


def table(rows, fids, recognition):
    """Table 1 in markdown, and CSIM's two anchors. rows: of every scores.csv; fids: {(T, method): FID}, empty without it."""
    def number(mean_and_error, digits):
        texts = [f"{v:.{digits}f}" for v in mean_and_error if np.isfinite(v)]
        return " ± ".join(texts) or "n/a"

    share = lambda v: f"{100 * v:.0f} %" if np.isfinite(v) else "n/a"
    groups = {}
    for row in rows:
        groups.setdefault((row["T"], row["method"]), []).append(row)
    groups = dict(sorted(groups.items(), key=lambda item: item[0][0]))      # by T; the methods of a T stay in their order
    strangers = mean(groups[0, REAL], "csim_stranger")[0]
    same = next(mean(group, "csim")[0] for (T, method), group in groups.items() if method == COPY)
    lines = [f"| method (T) | FID ↓ | SSIM ↑ | CSIM ({recognition}) ↑ | of the way | right person | landmarks ↓ | face found |", "|---|---|---|---|---|---|---|---|"]
    for (T, method), group in groups.items():
        csim = mean(group, "csim")
        way = (csim[0] - strangers) / (same - strangers) if same > strangers and method != REAL else np.nan
        right = [row["csim"] > row["csim_stranger"] for row in group if np.isfinite(row["csim_stranger"])]
        lines.append("| " + " | ".join([
            f"{method} ({T:.0f})" if T else method, f"{fids[T, method]:.1f}" if (T, method) in fids else "n/a",
            number(mean(group, "ssim"), 3), number(csim, 3), share(way), share(np.mean(right) if right else np.nan),
            number(mean(group, "landmark_error"), 1), share(mean(group, "found")[0])]) + " |")
    return "\n".join(lines), strangers, same


def figure(out, videos, shots, columns, limit=3):
    """Fig. 4: rows T of some videos; columns source, ground truth, every method."""
    S = len(read_strip(f"{out}/{videos[0]}/T0 {SOURCE}.png")[0])
    cell = max(S, 128)
    picture = Image.new("RGB", (40 + cell * (2 + len(columns)), 30 + cell * len(videos[:limit]) * len(shots)), "white")
    pen = ImageDraw.Draw(picture)
    for c, title in enumerate(["source", "ground truth", *columns]):
        pen.multiline_text((44 + cell * c, 2), title.replace(" ", "\n", 1) if len(title) > 16 else title, "black")
    for r, (name, T) in enumerate((name, T) for name in videos[:limit] for T in shots):
        pen.text((4, 30 + cell * r + cell // 2), f"T = {T}", "black")
        for c, file in enumerate([f"T0 {SOURCE}", f"T0 {REAL}", *(f"T{T} {m}" for m in columns)]):
            frame = Image.fromarray(read_strip(f"{out}/{name}/{file}.png")[0])
            picture.paste(frame.resize((cell, cell), Image.BICUBIC), (40 + cell * c, 30 + cell * r))
    with atomic(f"{out}/figure.png") as temporary:
        picture.save(temporary, "PNG")


def user_study(folder, out, videos, shots, seed):
    """Sec. 4: triplets of two real frames and a fake one of the same person, as one page that needs no server."""
    rng, triplets = np.random.default_rng(seed), []
    for name in videos:
        real = [read_strip(f"{out}/{other}/T0 {REAL}.png") for other in videos if other != name and person(other) == person(name)]
        holdout, learning = (read_strip(f"{out}/{name}/T0 {part}.png") for part in (REAL, SOURCE))
        for T in shots:
            for method in (FF, BEFORE, AFTER):
                if not (out / name / f"T{T} {method}.png").exists():
                    continue
                fakes = read_strip(f"{out}/{name}/T{T} {method}.png")
                k = int(rng.integers(len(fakes)))
                own = [f for j, f in enumerate(holdout) if j != k] + learning[1:]
                if len(real) >= 2:      # three different sequences, as in the paper
                    pair = [real[j][rng.integers(len(real[j]))] for j in rng.choice(len(real), 2, replace=False)]
                elif len(own) >= 2:     # other moments
                    pair = [own[j] for j in rng.choice(len(own), 2, replace=False)]
                else:
                    continue
                order = rng.permutation(3).tolist()
                pictures = [[fakes[k], *pair][j] for j in order]
                triplets.append({"method": f"{method} ({T})", "video": name, "fake": order.index(0), "pictures": [as_url(p) for p in pictures]})
    if not triplets:
        raise UserError("a user study needs 3 frames of a person: ask for more with --holdout or --shots")
    rng.shuffle(triplets)
    page = (Path(__file__).parent / "assets" / "user_study.html").read_text().replace("/*TRIPLETS*/", json.dumps(triplets))
    with atomic(f"{folder}/index.html") as temporary:
        Path(temporary).write_text(page)
    print(f"wrote {folder}/index.html: {len(triplets)} triplets; open it in a browser")


def as_url(frame):
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# --------------------------------------------------------------------------------------------------- timing

def median_seconds(function, repeats):
    """After one run to warm up, with the device synchronised."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        elif torch.backends.mps.is_available():
            torch.mps.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def timing(state, content, x, y, shots, device):
    """Table 2 in markdown: seconds of few-shot learning and of a frame. x, y: (n, 3, S, S), repeated up to T frames."""
    config = state["config"]
    lines = [f"| {config.image_size} pixels | ours, {torch.cuda.get_device_name() if device == 'cuda' else f'{torch.get_num_threads()} CPU threads' if device == 'cpu' else device} "
             "| the paper: 256 pixels, P40 |", "|---|---|---|"]
    for method, epochs, repeats in ((FF, 0, 20), (AFTER, EPOCHS, 3)):
        for T in shots:
            nets, pick = load_networks(state), torch.arange(T) % len(x)
            seconds = median_seconds(lambda: finetune(*nets, x[pick], y[pick], config, content, epochs), repeats)
            lines.append(f"| few-shot learning, {method} ({T}) | {seconds:.3f} s | {PAPER.get((method, T), '')}{' s' if (method, T) in PAPER else ''} |")
    E, G, D = load_networks(state)
    dtype, psi = fast_dtype(device), G.project(embed(E, x[:1], y[:1])[None]).detach()
    G, psi, picture = G.fold().to(dtype=dtype, memory_format=torch.channels_last), psi.to(dtype), y[:1].to(dtype)
    with torch.inference_mode():
        seconds = median_seconds(lambda: G.render(picture, psi), 50)
    return "\n".join(lines + [f"| a frame | {seconds:.4f} s | {PAPER_FRAME} s |"])


# -------------------------------------------------------------------------------------------------- command

def parse():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", help="a meta-learned checkpoint (default: the bundled weights/real64.pt, with --toy weights/toy.pt)")
    add("--ff-checkpoint", metavar="FILE", help="one trained with meta_train.py --no-match, for the row Ours-FF")
    add("--data", default="prepared", metavar="DIR", help="folder that data.py prepared (default: prepared)")
    add("--toy", action="store_true", help="drawn heads that no training has seen, instead of --data")
    add("--shots", type=int, nargs="+", default=[1, 8, 32], metavar="T", help="frames to learn from (1 8 32)")
    add("--videos", type=int, default=50, help="at most so many, drawn uniformly (50)")
    add("--holdout", type=int, default=32, help="frames of each to compare (32)")
    add("--out", default="runs/eval", metavar="DIR", help="(runs/eval)")
    add("--seed", type=int, default=0, help="of the choice of videos and frames (0)")
    add("--recognition", metavar="FILE", help="ArcFace-like TorchScript network for CSIM (default: dlib's, which is bundled)")
    add("--inception", metavar="FILE", help="weights of FID's network, from torch-fidelity's releases")
    add("--ablation", action="store_true", help="add the rows of A.2")
    add("--user-study", metavar="DIR", help="write a page with the triplets of Sec. 4")
    add("--timing", action="store_true", help="print Table 2 and nothing else")
    add_content_flags(parser)
    args = parser.parse_args()
    args.checkpoint = args.checkpoint or (str(Path(CHECKPOINT).with_name("toy.pt")) if args.toy else CHECKPOINT)
    if min(*args.shots, args.videos, args.holdout) < 1 or args.seed < 0:
        raise UserError("--shots, --videos and --holdout must be at least 1, --seed at least 0")
    check_paths([args.checkpoint, args.ff_checkpoint, args.recognition, args.inception, args.vgg19, args.vggface])
    args.shots.sort()
    return args


def report(out, names, args, network):
    """From the videos' folders: scores.csv, table.md, which is printed too, and figure.png."""
    rows, fids = [row for name in names for row in read_scores(out / name / "scores.csv")], {}
    columns = dict.fromkeys((row["T"], row["method"]) for row in rows)      # the real frames come first
    if network and len(names) * args.holdout > 1:
        for T, method in columns:
            frames = [frame for name in names for frame in read_strip(out / name / f"T{T:.0f} {method}.png")]
            statistic = fid_statistics(frames, network)
            if method == REAL:
                real = statistic
            else:
                fids[T, method] = fid(real, statistic)
    with atomic(out / "scores.csv") as temporary:
        lines = [line for name in names for line in (out / name / "scores.csv").read_text().splitlines()[1:]]
        Path(temporary).write_text("\n".join([",".join(COLUMNS), *lines]) + "\n")
    recognition = os.path.basename(args.recognition or "dlib")
    text, strangers, same = table(rows, fids, recognition)
    csim = "" if not np.isfinite(same) else (
        f" CSIM by {'the face-recognition network of dlib' if recognition == 'dlib' else recognition}: strangers "
        f"{strangers:.3f}, the same person {same:.3f}, both of real frames; of the way: (CSIM - strangers) / (same person - strangers). Right person: "
        "frames nearer to the person than to somebody else. Landmarks: error in % of the distance between the outer eye corners.")
    text += f"\n\nMeans over {len(names)} videos ± standard error, {args.holdout} hold-out frame{'s' * (args.holdout > 1)} each.{csim}"
    with atomic(out / "table.md") as temporary:
        Path(temporary).write_text(text + "\n")
    print(text)
    if not network:
        print("FID: n/a, its network is a download; get weights-inception-2015-12-05-6726825d.pth from torch-fidelity's releases and name it with --inception")
    figure(out, names, args.shots, list(dict.fromkeys(method for T, method in columns if T)))
    print(f"wrote {out}/table.md, {out}/scores.csv and {out}/figure.png")


def main():
    args = parse()
    device, out = default_device(), Path(args.out)
    state = load_for_finetuning(args.checkpoint, device)
    ff_state = load_checkpoint(args.ff_checkpoint, device) if args.ff_checkpoint else None
    config = state["config"]
    if ff_state and ff_state["config"].match:
        raise UserError(f"{args.ff_checkpoint} was trained with the match loss: the FF variant comes from meta_train.py --no-match")
    if ff_state and (ff_state["config"].image_size, ff_state["config"].landmarks) != (config.image_size, config.landmarks):
        raise UserError(f"{args.ff_checkpoint} has another image size or other landmarks than {args.checkpoint}")
    for checkpoint in filter(None, (state, ff_state)):
        load_networks(checkpoint)   # refused now, if it is not whole
    data = ToyHeads(args.videos, config.image_size, first=1000) if args.toy else PreparedVideos(args.data, config.image_size)
    if data.detector != config.landmarks:
        raise UserError(f"{args.data} was prepared with {data.detector} landmarks, {args.checkpoint} trained with {config.landmarks}")
    content = content_loss(args, config, face=0.0 if args.toy else FACE_WEIGHT).to(device)
    if args.timing:
        x, y = to_tensors(*data.load(0, lambda count: range(min(count, max(args.shots)))))
        print(timing(state, content, to_float(x, device), to_float(y, device), args.shots, device))
        return
    network = inception(args.inception, device) if args.inception else None
    recognise = torchscript_recognition(args.recognition, device) if args.recognition else None if args.toy else dlib_recognition()
    setup = Setup(state, ff_state, content, args.ablation, None if args.toy else landmark_detector(config.landmarks), recognise, device)

    digest = lambda path: path and hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
    protocol = {"checkpoint": digest(args.checkpoint), "ff_checkpoint": digest(args.ff_checkpoint), "recognition": digest(args.recognition),
                "data": data.name, "content": [content.kind, digest(args.vgg19), digest(args.vggface)], "ablation": args.ablation, "shots": args.shots, "seed": args.seed,
                "videos": draw_protocol(data, args.shots, args.holdout, args.videos, args.seed)}
    names, videos = list(protocol["videos"]), find_videos(data)
    for name in names if isinstance(data, PreparedVideos) else ():     # the folder may have been prepared anew
        protocol["videos"][name]["files"] = [digest(data.files[i]) for i in videos[name]]
    if (out / "protocol.json").exists() and json.loads((out / "protocol.json").read_text()) != protocol:
        raise UserError(f"{out} holds an evaluation of something else: name another --out")
    with atomic(out / "protocol.json") as temporary:
        Path(temporary).write_text(json.dumps(protocol, indent=1))

    load = lambda name, part: data.load(videos[name][part == "holdout"], lambda count: protocol["videos"][name][part])
    for k, name in enumerate(tqdm(names, "evaluating", unit=" videos")):
        if not (out / name / "scores.csv").exists():
            others = [n for n in names[k + 1:] + names[:k] if person(n) != person(name)]
            stranger = load(others[0], "holdout") if others else None
            score_video(out / name, name, protocol["videos"][name]["holdout"], args.shots, load(name, "learn"), load(name, "holdout"), stranger, setup)

    report(out, names, args, network)
    if args.user_study:
        user_study(args.user_study, out, names, args.shots, args.seed)


if __name__ == "__main__":
    run(main)
