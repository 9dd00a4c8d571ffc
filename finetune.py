"""Stage 2, Sec. 3.3: few-shot learning of a new person by fine-tuning on T photos or frames.

    python finetune.py --photos A.jpg B.jpg --out person.pt
    python finetune.py --photos CLIP.mp4 --out person.pt --checkpoint runs/small/step-24000.pt

Writes a person file: all that `infer.py --person` needs. The meta-learned checkpoint is only read.
"""
import argparse
import os

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from data import to_float, to_tensors
from faces import landmark_detector
from files import UserError, check_paths, run, warn
from losses import BETAS, FM_WEIGHT, ContentLoss, adversarial_loss, feature_matching_loss, hinge_loss
from metrics import dlib_recognition
from model import autocast, load_checkpoint, load_networks, save_checkpoint
from sources import faces_in

CHECKPOINT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "weights", "real64.pt")
STRANGERS = 0.45     # between two face vectors at 64 pixels: one person's are closer, 9 of 10 pairs of people farther
BATCH, EPOCHS = 8, 40   # A.1: 40 epochs, in batches of 8 images for T larger than 1


def load_faces(paths, config, detect, max_frames=32):
    """Photos and clips -> x, y float (T, 3, S, S) in [-1, 1]. UserError that names all those without a face."""
    shown, problems = [], []
    for path in paths:
        try:
            shown.append(list(faces_in(path, detect, config.landmarks, config.image_size, max_frames)))
        except UserError as e:
            problems.append(str(e))
    if problems:
        raise UserError("; ".join(problems))
    if len(shown) > 1:
        warn_of_several_people(paths, [pairs[0] for pairs in shown])
    frames, points = (np.stack(part) for part in zip(*(pair for pairs in shown for pair in pairs)))
    return tuple(map(to_float, to_tensors(frames, points)))


def warn_of_several_people(paths, pairs):
    """pairs: (crop, points) of each path. By the recognition network that CSIM uses."""
    vector = dlib_recognition()
    first, *others = (vector(*pair) for pair in pairs)
    strangers = [path for path, v in zip(paths[1:], others) if np.linalg.norm(v - first) > STRANGERS]
    if strangers:
        warn(f"{', '.join(map(str, strangers))} may show somebody else than {paths[0]}: all are learned as one person")


@torch.no_grad()
def embed(E, x, y):
    """e_NEW, eq. 7: the mean of the embeddings of T frames, (T, 3, S, S) twice -> (N,)."""
    return torch.cat([E(a, b) for a, b in zip(x.split(BATCH), y.split(BATCH))]).mean(0)


def finetune(E, G, D, x, y, config, content, epochs=EPOCHS, seed=0, progress=False, adversarial=True, random=None):
    """Fine-tune G and D in place on T frames of a person; E is only read. Sec. 3.3.

    x, y: (T, 3, S, S) in [-1, 1] on the networks' device.  content: a ContentLoss.  epochs=0: feed-forward, without one.
    The ablations of A.2: adversarial=False leaves L'_ADV out of eq. 9; random="e", "psi" or "w" starts e_NEW, psi' or
    w' from random numbers of the size that they would have.
    Returns psi' (|psi|,), w' (N,), and a list with the losses of each step: {"cnt", "adv", "fm", "dsc"}.
    """
    for net in filter(None, (E, G, D, content)):
        net.to(memory_format=torch.channels_last)               # a quarter faster than contiguous tensors
    e_new = embed(E.eval(), x, y)
    with torch.no_grad():  # psi' and w' exist before the optimizers do: else they would never be trained
        noise = torch.Generator(x.device).manual_seed(seed)
        like = lambda v: v.std() * torch.randn(v.shape, generator=noise, device=v.device) + v.mean()
        e_new = like(e_new).relu() if random == "e" else e_new
        psi = G.project(e_new[None])[0]                         # psi' = P e_NEW
        psi = nn.Parameter(like(psi) if random == "psi" else psi)
        w = nn.Parameter(D.w0 + (like(e_new) if random == "w" else e_new))      # w' = w0 + e_NEW
    parameters_G = [p for name, p in G.named_parameters() if not name.startswith("P.")]  # psi' has taken P's place
    optimizer_G = torch.optim.Adam([*parameters_G, psi], config.lr, BETAS)
    optimizer_D = torch.optim.Adam([*D.V.parameters(), w, D.b], config.lr_d, BETAS)

    shuffle, history = torch.Generator().manual_seed(seed), []
    G.train(), D.train()
    for _ in tqdm(range(epochs), "fine-tuning", unit=" epochs", disable=not progress):
        for t in torch.randperm(len(x), generator=shuffle).to(x.device).split(BATCH):
            # (1) update psi and psi': eq. 9
            D.requires_grad_(False)
            with autocast(x.device):
                x_hat = G.render(y[t], psi.expand(len(t), -1)).float()          # (B, 3, S, S)
                fake_score, fake_features = D(x_hat, y[t], w.detach())          # eq. 8
                with torch.no_grad():
                    real_features = D.V(x[t], y[t])[1]
                cnt = content(x_hat, x[t])
                adv = adversarial_loss(fake_score)
                fm = FM_WEIGHT * feature_matching_loss(fake_features, real_features)
            optimizer_G.zero_grad()
            (cnt + (adv + fm if adversarial else 0)).backward()
            optimizer_G.step()
            # (2) update theta, w' and b twice: eq. 10
            D.requires_grad_(True)
            x_both, y_both = torch.cat([x[t], x_hat.detach()]), torch.cat([y[t], y[t]])
            for _ in range(2):
                with autocast(x.device):
                    real_score, fake_score = D(x_both, y_both, w)[0].chunk(2)
                dsc = hinge_loss(real_score, fake_score)
                optimizer_D.zero_grad()
                dsc.backward()
                optimizer_D.step()
            history.append({"cnt": cnt.item(), "adv": adv.item(), "fm": fm.item(), "dsc": dsc.item()})
    G.eval(), D.eval()
    return psi.detach(), w.detach(), history


def add_content_flags(parser):
    parser.add_argument("--content", choices=("vgg", "squeeze", "l1"), help="the content loss (default: the checkpoint's)")
    parser.add_argument("--vgg19", metavar="FILE", help="MatConvNet's imagenet-vgg-verydeep-19.mat, for --content vgg")
    parser.add_argument("--vggface", metavar="FILE", help="MatConvNet's vgg-face.mat, for --content vgg")


def load_for_finetuning(path, device, random=None):
    """A meta checkpoint that may be fine-tuned: UserError for the FF variant, except with a random w' (A.2)."""
    state = load_checkpoint(path, device)
    if not state["config"].match and random != "w":
        raise UserError(f"{path} was trained without the match loss (the FF variant), which the paper uses "
                        "without fine-tuning only: infer.py --feed-forward does that")
    return state


def learn_person(state, x, y, content, epochs, device, **switches):
    """A loaded checkpoint and T faces -> what a person file holds: (config, G folded and without P, psi', source).

    x, y: (T, 3, S, S) of load_faces.  epochs=0: feed-forward, content unused.  switches: of finetune(), for A.2.
    source: (3, S, S), the first face.
    """
    E, G, D = load_networks(state)
    x, y, content = x.to(device), y.to(device), content and content.to(device)
    psi = finetune(E, G, D, x, y, state["config"], content, epochs, progress=epochs > 0, **switches)[0]
    G.P = nn.Identity()  # psi' has taken P's place
    return state["config"], G.fold(), psi, x[0]


def save_person(path, config, G, psi, source):
    save_checkpoint(path, "person", config, G=G, psi=psi, source=source)


def default_device():
    """CUDA, else Apple's MPS (untested here), else the CPU."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", nargs="+", required=True, metavar="FILE", help="photos and/or clips of one person")
    parser.add_argument("--out", default="person.pt", help="the person file (default: person.pt)")
    parser.add_argument("--checkpoint", default=CHECKPOINT, help="a meta-learned checkpoint (default: the bundled weights/real64.pt)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="passes over the photos (40)")
    parser.add_argument("--no-adversarial", action="store_true", help="ablation of A.2: without the adversarial term")
    parser.add_argument("--random", choices=("e", "psi", "w"), help="ablation of A.2: start e_NEW, psi' or w' from random numbers")
    add_content_flags(parser)
    args = parser.parse_args()
    if args.epochs < 1:
        raise UserError(f"--epochs {args.epochs}: at least 1 is needed")
    check_paths([*args.photos, args.checkpoint, args.vgg19, args.vggface], [args.out])
    device = default_device()
    state = load_for_finetuning(args.checkpoint, device, args.random)
    config = state["config"]
    x, y = load_faces(args.photos, config, landmark_detector(config.landmarks))
    content = ContentLoss(args.content or config.content, args.vgg19, args.vggface)
    person = learn_person(state, x, y, content, args.epochs, device, adversarial=not args.no_adversarial, random=args.random)
    save_person(args.out, *person)
    print(f"wrote {args.out}: python infer.py --person {args.out} --driver VIDEO")


if __name__ == "__main__":
    run(main)
