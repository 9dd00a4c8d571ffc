"""Stage 2, Sec. 3.3: few-shot learning of a new person by fine-tuning on T photos or frames.

    python finetune.py --photos A.jpg B.jpg --out person.pt
    python finetune.py --photos CLIP.mp4 --out person.pt --checkpoint runs/small/step-8100.pt

Writes a person file: all that `infer.py --person` needs. The meta-learned checkpoint is only read.
"""
import os

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import PolynomialLR
from tqdm import tqdm

from beyond.likeness import other_poses
from data import to_float, to_tensors
from evaluation.metrics import STRANGERS, dlib_recognition
from losses import (BETAS, FACE_WEIGHT, FM_WEIGHT, ContentLoss, adversarial_loss, feature_matching_loss,
                    hinge_loss)
from media.faces import landmark_detector
from media.folders import faces_in
from model import load_checkpoint, load_networks, save_checkpoint
from runtime.device import autocast, default_device
from runtime.files import UserError, check_least, check_paths, make_parser, run, warn

CHECKPOINT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "weights", "real128.pt")
BATCH, EPOCHS = 8, 40   # A.1: 40 epochs, in batches of 8 images for T larger than 1


@torch.no_grad()
def embed(E, x, y):
    """e_NEW, eq. 7: the mean of the embeddings of T frames, (T, 3, S, S) twice -> (N,)."""
    return torch.cat([E(a, b) for a, b in zip(x.split(BATCH), y.split(BATCH))]).mean(0)


def finetune(E, G, D, x, y, config, content, epochs=EPOCHS, seed=0, progress=False,
             others=None, adversarial=True, random=None):
    """Fine-tune G and D in place on T frames of a person; E is only read. Sec. 3.3.

    `psi` and `w` are the paper's psi' and w'; its psi and theta are the weights of G and of D's V.
    x, y: (T, 3, S, S) in [-1, 1] on the networks' device.  content: a ContentLoss, unused where epochs=0.
    others: of likeness.other_poses(), for our term of that name; None: without it, as in the paper.
    adversarial, random: the ablations of A.2. adversarial=False leaves L'_ADV out of eq. 9; random="e",
    "psi" or "w" starts e_NEW, psi' or w' from random numbers.
    Returns psi' (|psi|,), w' (N,), and the losses of each step: {"cnt", "adv", "fm", "dsc"}, and "like"
    where there are others.
    """
    for net in filter(None, (E, G, D, content)):
        net.to(memory_format=torch.channels_last)       # a quarter faster
    psi, w = start_values(E, G, D, x, y, random, seed)
    without_P = [p for name, p in G.named_parameters() if not name.startswith("P.")]  # psi' took its place
    optimizer_G = torch.optim.Adam([*without_P, psi], 2 * config.lr, BETAS)
    optimizer_D = torch.optim.Adam([*D.V.parameters(), w, D.b], 2 * config.lr_d, BETAS)
    # ours, the "training scheduler" that A.1 did without: from twice meta-learning's rate linearly to 0
    schedules = [PolynomialLR(optimizer, epochs) for optimizer in (optimizer_G, optimizer_D)]

    shuffle, history = torch.Generator().manual_seed(seed), []
    G.train()
    D.train()
    for _ in tqdm(range(epochs), "fine-tuning", unit=" epochs", disable=not progress):
        for t in torch.randperm(len(x), generator=shuffle).to(x.device).split(BATCH):
            x_t, y_t = x[t], y[t]                       # (B, 3, S, S)
            y_o = others.draw() if others else y[:0]    # (n, 3, S, S): ours, other poses; or none

            # (1) update psi and psi': eq. 9
            D.requires_grad_(False)
            with autocast(x.device):
                y_all = torch.cat([y_t, y_o])                               # at once: it costs little more
                x_all = G.render(y_all, psi.expand(len(y_all), -1)).float()
                x_hat, x_o = x_all.split([len(y_t), len(y_o)])              # (B, 3, S, S), (n, 3, S, S)
                fake_score, fake_features = D(x_hat, y_t, w.detach())       # eq. 8
                with torch.no_grad():
                    real_features = D.V(x_t, y_t)[1]
                cnt = content(x_hat, x_t)
                adv = adversarial_loss(fake_score)
                fm = FM_WEIGHT * feature_matching_loss(fake_features, real_features)
            loss = cnt + (adv + fm if adversarial else 0)                   # in brackets L'_ADV
            losses = {"cnt": cnt, "adv": adv, "fm": fm}
            if others:                                                      # ours
                losses["like"] = others.loss(x_o)
                loss = loss + losses["like"]
            optimizer_G.zero_grad()
            loss.backward()
            optimizer_G.step()

            # (2) update theta, w' and b twice: eq. 10
            D.requires_grad_(True)
            x_both = torch.cat([x_t, x_hat.detach()])   # (2B, 3, S, S): real, then generated
            y_both = torch.cat([y_t, y_t])
            for _ in range(2):
                with autocast(x.device):
                    real_score, fake_score = D(x_both, y_both, w)[0].chunk(2)
                dsc = hinge_loss(real_score, fake_score)
                optimizer_D.zero_grad()
                dsc.backward()
                optimizer_D.step()
            history.append({name: value.item() for name, value in (losses | {"dsc": dsc}).items()})
        for schedule in schedules:
            schedule.step()
    G.eval()
    D.eval()
    return psi.detach(), w.detach(), history


def start_values(E, G, D, x, y, random, seed):
    """psi' = P e_NEW (|psi|,) and w' = w0 + e_NEW (N,), trainable. random, seed: as in finetune()."""
    e_new = embed(E.eval(), x, y)                       # (N,): eq. 7
    with torch.no_grad():
        psi = G.project(e_new[None])[0]
        w = D.w0 + e_new
        if random:
            psi, w = randomised(random, e_new, psi, w, G, D, seed)
    return nn.Parameter(psi), nn.Parameter(w)


def randomised(what, e_new, psi, w, G, D, seed):
    """A.2: e_NEW ("e"), psi' ("psi") or w' ("w") from noise of the mean and deviation it would have.

    e_new (N,), psi (|psi|,), w (N,) -> psi, w.
    """
    noise = torch.Generator(e_new.device).manual_seed(seed)
    like = lambda v: v.mean() + v.std() * torch.randn(v.shape, generator=noise, device=v.device)
    if what == "e":
        e_new = like(e_new).relu()
        return G.project(e_new[None])[0], D.w0 + e_new
    return (like(psi), w) if what == "psi" else (psi, D.w0 + like(e_new))


# ------------------------------------------------------------------ for this command and infer.py

def load_parts(paths, config, detect, max_frames=32):
    """For each photo or clip: frames uint8 (m, S, S, 3), landmarks (m, 68, 2). UserError without a face.

    All paths without a face are named at once; a warning tells of several people.
    """
    parts, problems = [], []
    for path in paths:
        try:
            faces = faces_in(path, detect, config.image_size, max_frames)
            frames, points, _ = zip(*faces)
            parts.append((np.stack(frames), np.stack(points)))
        except UserError as e:
            problems.append(str(e))
    if problems:
        raise UserError("; ".join(problems))
    if len(parts) > 1:
        warn_of_several_people(paths, [(frames[0], points[0]) for frames, points in parts])
    return parts


def warn_of_several_people(paths, faces):
    """faces: the first (crop uint8 (S, S, 3), points (68, 2)) of each path. Judged by dlib's network."""
    vector = dlib_recognition()
    first, *others = (vector(*face) for face in faces)
    strangers = [path for path, v in zip(paths[1:], others) if v @ first < STRANGERS]
    if strangers:
        names = ", ".join(map(str, strangers))
        warn(f"{names} may show somebody else than {paths[0]}: all are learned as one person")


def to_faces(parts):
    """-> x, y float (T, 3, S, S) in [-1, 1], of all parts together."""
    frames, points = zip(*parts)
    x, y = to_tensors(np.concatenate(frames), np.concatenate(points))
    return to_float(x), to_float(y)


def add_content_flags(parser):
    add = parser.add_argument
    add("--content", choices=("vgg", "squeeze", "l1"), help="the content loss (default: the checkpoint's)")
    add("--vgg19", metavar="FILE", help="MatConvNet's imagenet-vgg-verydeep-19.mat, for --content vgg")
    add("--vggface", metavar="FILE", help="MatConvNet's vgg-face.mat, for --content vgg")


def content_loss(args, config, face=FACE_WEIGHT):
    """The content loss that these flags name; our stand-in for VGGFace where --vggface is not given."""
    kind = args.content or config.content
    return ContentLoss(kind, args.vgg19, args.vggface, face)


def load_for_finetuning(path, device, random=None):
    """A meta checkpoint that may be fine-tuned. UserError for the FF variant, but with a random w' (A.2)."""
    state = load_checkpoint(path, device)
    if not state["config"].match and random != "w":
        raise UserError(f"{path} was trained without the match loss (the FF variant), which the paper uses "
                        "without fine-tuning only: infer.py --feed-forward does that")
    return state


def learn_person(state, parts, content, epochs, device, progress=True, **switches):
    """A loaded checkpoint and the faces of a person -> what a person file holds: G, psi', source.

    parts: of load_parts.  epochs=0: feed-forward, content unused.  switches: of finetune().
    G: folded and without P.  source: (3, S, S), the first face.
    """
    config, (E, G, D) = state["config"], load_networks(state)
    x, y = (faces.to(device) for faces in to_faces(parts))
    content = content and content.to(device)
    others = other_poses(x, [points for _, points in parts], content) if epochs else None
    psi, *_ = finetune(E, G, D, x, y, config, content, epochs, progress=progress and epochs > 0,
                       others=others, **switches)
    G.P = nn.Identity()  # psi' has taken P's place
    return G.fold(), psi, x[0]


def save_person(path, config, G, psi, source, parts=()):
    """Write a person file: G folded and without P, psi' (|psi|,), source (3, S, S) in [-1, 1].

    parts: of load_parts. Their "landmarks" (m, 68, 2), with the "counts" of each part, say whose face it
    is, for when someone else drives.
    """
    known = {}
    if parts:
        points = [torch.from_numpy(points) for _, points in parts]
        known = {"landmarks": torch.cat(points), "counts": torch.tensor([len(p) for p in points])}
    save_checkpoint(path, "person", config, G=G, psi=psi, source=source, **known)


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--photos", nargs="+", required=True, metavar="FILE", help="photos and/or clips of one person")
    add("--out", default="person.pt", help="the person file (default: person.pt)")
    add("--checkpoint", default=CHECKPOINT, help="a meta-learned checkpoint (default: the bundled one)")
    add("--epochs", type=int, default=EPOCHS, help="passes over the photos (40)")
    add("--no-adversarial", action="store_true", help="ablation of A.2: without the adversarial term")
    add("--random", choices=("e", "psi", "w"), help="ablation of A.2: start e_NEW, psi' or w' from noise")
    add_content_flags(parser)
    args = parser.parse_args()
    check_least(args, 1, "epochs")
    check_paths([*args.photos, args.checkpoint, args.vgg19, args.vggface], [args.out])

    device = default_device()
    state = load_for_finetuning(args.checkpoint, device, args.random)
    config = state["config"]
    parts = load_parts(args.photos, config, landmark_detector(config.landmarks))
    content = content_loss(args, config)
    person = learn_person(state, parts, content, args.epochs, device,
                          adversarial=not args.no_adversarial, random=args.random)
    save_person(args.out, config, *person, parts)
    print(f"wrote {args.out}: python infer.py --person {args.out} --driver VIDEO")


if __name__ == "__main__":
    run(main)
