"""Stage 2, Sec. 3.3: learn a new person by fine-tuning on T photos or frames.

    python finetune.py --photos A.jpg B.jpg --out person.pt
    python finetune.py --photos CLIP.mp4 --out person.pt --checkpoint runs/small/step-8100.pt

Writes a person file, which is all that `infer.py --person` needs. The checkpoint is only read.
"""
import os

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.lr_scheduler import PolynomialLR
from tqdm import tqdm

from beyond.likeness import other_poses
from beyond.portrait import (SHUT, are_grey, eye_opening, make_grey, open_eyes_first, warn_of_quality,
                             warn_of_several_people)
from beyond.recognition import FaceTerm
from data import to_float, to_tensors
from losses import BETAS, ContentLoss, adversarial_loss, feature_matching_loss, hinge_loss
from media.faces import landmark_detector
from media.folders import faces_in
from media.recognition import tell_apart
from runtime.checkpoint import load_checkpoint, load_networks, save_checkpoint
from runtime.device import autocast, default_device
from runtime.files import UserError, check_least, check_paths, make_parser, run, warn

CHECKPOINT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "weights", "real256.pt")
BATCH, EPOCHS = 8, 40   # A.1: 40 epochs, with batches of 8 if T is larger than 1


@torch.no_grad()
def embed(E, x, y):
    """e_NEW of eq. 7, the mean of the embeddings of T frames: x, y (T, 3, S, S) -> (N,)."""
    return torch.cat([E(a, b) for a, b in zip(x.split(BATCH), y.split(BATCH))]).mean(0)


def finetune(E, G, D, x, y, config, content, epochs=EPOCHS, seed=0, progress=False,
             as_paper=False, others=None, adversarial=True, random=None):
    """Fine-tune G and D in place on T frames of a person (Sec. 3.3). E is only read.

    `psi` and `w` are the paper's psi' and w'. The paper's psi are the weights of G without P, its theta those
    of D's V.
    x, y: (T, 3, S, S) in [-1, 1] on the networks' device.  content: a ContentLoss; None if epochs is 0.
    as_paper: use the learning rates of meta-learning, without decay. Otherwise they fall linearly from
    config.finetune_lr to 0, which is ours: A.1 did without a "training scheduler". The paper does not give
    fine-tuning's rates.  seed: for shuffling the photos, and for the noise of `random`.
    others: ours, from beyond.likeness.other_poses(), or None to do without these losses, as the paper does.
    adversarial, random: the ablations of A.2. adversarial=False leaves L'_ADV out of eq. 9; random="e",
    "psi" or "w" starts e_NEW, psi' or w' from random numbers.
    Returns psi' (|psi|,), w' (N,), and a list with the losses of each step: "cnt", "adv", "fm", "dsc", and
    "others" if there are any.
    """
    for net in filter(None, (E, G, D, content)):
        net.to(memory_format=torch.channels_last)       # a quarter faster
    psi, w = start_values(E, G, D, x, y, random, seed)
    without_P = [p for name, p in G.named_parameters() if not name.startswith("P.")]  # psi' replaces it
    lr, lr_d = (config.lr, config.lr_d) if as_paper else (config.finetune_lr, config.finetune_lr_d)
    optimizer_G = torch.optim.Adam([*without_P, psi], lr, BETAS)
    optimizer_D = torch.optim.Adam([*D.V.parameters(), w, D.b], lr_d, BETAS)
    schedules = [] if as_paper else [PolynomialLR(o, epochs) for o in (optimizer_G, optimizer_D)]     # linear

    shuffle, history = torch.Generator().manual_seed(seed), []
    G.train()
    D.train()
    for _ in tqdm(range(epochs), "fine-tuning", unit=" epochs", disable=not progress):
        for t in torch.randperm(len(x), generator=shuffle).to(x.device).split(BATCH):
            x_t, y_t = x[t], y[t]                       # (B, 3, S, S)

            # (1) update psi (weights of G) and psi' (the variable psi): eq. 9
            D.requires_grad_(False)
            with autocast(x.device), parametrize.cached():
                x_hat = G.render(y_t, psi.expand(len(y_t), -1)).float()     # (B, 3, S, S)
                fake_score, fake_features = D(x_hat, y_t, w.detach())       # eq. 8
                with torch.no_grad():
                    real_features = D.V(x_t, y_t)[1]
                cnt = content(x_hat, x_t)
                adv = adversarial_loss(fake_score)
                fm = feature_matching_loss(fake_features, real_features)
                l_adv = adv + fm if adversarial else 0                      # L'_ADV
                loss = cnt + l_adv                                          # eq. 9
                losses = {"cnt": cnt, "adv": adv, "fm": fm}

                # ours, in addition to eq. 9: likeness and mouth in other poses
                if others:
                    y_o = others.draw()                                     # (n, 3, S, S)
                    x_o = G.render(y_o, psi.expand(len(y_o), -1)).float()   # (n, 3, S, S)
                    losses["others"] = others.loss(x_o)
                    loss = loss + losses["others"]
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
            history.append({name: value.detach() for name, value in (losses | {"dsc": dsc}).items()})
        for schedule in schedules:
            schedule.step()
    G.eval()
    D.eval()
    return psi.detach(), w.detach(), [{name: float(v) for name, v in step.items()} for step in history]


def start_values(E, G, D, x, y, random, seed):
    """-> the parameters psi' = P e_NEW (|psi|,) and w' = w0 + e_NEW (N,). random, seed: see finetune()."""
    e_new = embed(E.eval(), x, y)                       # (N,): eq. 7
    with torch.no_grad():
        psi = G.project(e_new[None])[0]
        w = D.w0 + e_new
        if random:
            psi, w = randomised(random, e_new, psi, w, G, D, seed)
    return nn.Parameter(psi), nn.Parameter(w)


def randomised(what, e_new, psi, w, G, D, seed):
    """Ablation of A.2: replace e_NEW ("e"), psi' ("psi") or e_NEW in w' ("w") by Gaussian noise.

    The noise has the mean and standard deviation of what it replaces. For "e" it also passes a ReLU, because
    embeddings are never negative. e_new (N,), psi (|psi|,), w (N,) -> psi, w.
    """
    noise = torch.Generator(e_new.device).manual_seed(seed)
    like = lambda v: v.mean() + v.std() * torch.randn(v.shape, generator=noise, device=v.device)
    if what == "e":
        e_new = like(e_new).relu()
        return G.project(e_new[None])[0], D.w0 + e_new
    return (like(psi), w) if what == "psi" else (psi, D.w0 + like(e_new))


# --------------------------------------------------------------------- shared with infer.py

def load_photos(paths, config, detect, max_frames=32):
    """Find the face in photos and clips -> [Photo]. Raises UserError, which names all files without a face.

    The first frame of the first Photo gives pose and expression: one with open eyes is chosen, if there is
    one. Prints a warning for several people, small faces, shut eyes, and tightly cropped photos.
    max_frames: use at most this many frames of each clip, evenly spaced.
    """
    photos, problems, recognition = [], [], tell_apart()
    for path in paths:
        try:
            faces = list(faces_in(path, detect, config.image_size, max_frames, recognition=recognition))
        except UserError as e:
            problems.append(str(e))
            continue
        photos.append(open_eyes_first(faces))
        warn_of_quality(path, faces)
    if problems:
        raise UserError("; ".join(problems))
    if len(photos) > 1:
        warn_of_several_people(paths, photos)
    first = np.argmax([eye_opening(photo.points[0]) >= SHUT for photo in photos])      # 0 if there are none
    if first:
        warn(f"pose and expression are taken from {paths[first]}, because the eyes in {paths[0]} are shut")
    return [photos[first], *photos[:first], *photos[first + 1:]]


def to_networks(photos):
    """All frames of these [Photo] -> x, y float (T, 3, S, S) in [-1, 1]."""
    frames, points = zip(*photos)
    x, y = to_tensors(np.concatenate(frames), np.concatenate(points))
    return to_float(x), to_float(y)


FINETUNING = "as_paper", "content", "vgg19", "vggface"


def add_finetuning_flags(parser):
    parser.add_argument("--as-paper", action="store_true",
                        help="fine-tune with the constant learning rates of meta-learning, and without our "
                             "losses in other poses; the content loss stays the same")
    add_content_flags(parser)


def add_content_flags(parser):
    add = parser.add_argument
    add("--content", choices=("vgg", "squeeze", "l1"),
        help="the content loss (default: the one that the checkpoint names for fine-tuning)")
    add("--vgg19", metavar="FILE", help="MatConvNet's imagenet-vgg-verydeep-19.mat, for --content vgg")
    add("--vggface", metavar="FILE", help="MatConvNet's vgg-face.mat, for --content vgg")


def content_loss(args, config, faces=True):
    """-> the ContentLoss of these flags. faces: whether it has a FaceTerm, used if --vggface is not given."""
    extra = FaceTerm() if faces else None
    return ContentLoss(args.content or config.content, args.vgg19, args.vggface, extra)


def load_for_finetuning(path, device, random=None):
    """Load a meta-learned checkpoint. Raises UserError for the FF variant, unless w' is random (A.2)."""
    state = load_checkpoint(path, device)
    if not state["config"].match and random != "w":
        raise UserError(f"{path} was trained without the match loss (the FF variant), so it cannot be "
                        "fine-tuned: use infer.py --feed-forward")
    return state


def learn_person(state, photos, content, epochs, device, progress=True, as_paper=False, **switches):
    """Learn a person from [Photo] and a loaded checkpoint -> what a person file holds: G, psi' and source.

    epochs=0: feed-forward; content may be None.  as_paper, switches: see finetune().
    G is folded and has no P. If all photos are grey it draws grey pictures, except with as_paper.
    source: (3, S, S), the first frame.
    """
    config, (E, G, D) = state["config"], load_networks(state)
    x, y = (part.to(device) for part in to_networks(photos))
    # Already here, not only in finetune(): otherwise other_poses() would use another memory layout for the
    # first person than for later ones, and round differently.
    content = content and content.to(device, memory_format=torch.channels_last)
    others = None
    if epochs and not as_paper:
        # the person without fine-tuning; as_paper only keeps it from being made grey
        before, psi_hat, _ = learn_person(state, photos, None, 0, device, as_paper=True)
        others = other_poses(x, [photo.points for photo in photos], content, before, psi_hat)
    psi, *_ = finetune(E, G, D, x, y, config, content, epochs, progress=progress and epochs > 0,
                       as_paper=as_paper, others=others, **switches)
    G.P = nn.Identity()  # psi' replaces it
    G.fold()
    if are_grey(photos) and not as_paper:
        make_grey(G)
    return G, psi, x[0]


def save_person(path, config, G, psi, source, photos):
    """Write a person file: G folded and without P, psi' (|psi|,), source (3, S, S) in [-1, 1].

    It also holds the "landmarks" (m, 68, 2) of all photos and the number of frames of each ("counts"),
    because beyond/adapt.py needs the person's face shape when someone else drives.
    """
    points = [torch.from_numpy(photo.points) for photo in photos]
    save_checkpoint(path, "person", config, G=G, psi=psi, source=source,
                    landmarks=torch.cat(points), counts=torch.tensor([len(p) for p in points]))


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--photos", nargs="+", required=True, metavar="FILE",
        help="photos of one person, and clips, of which up to 32 frames each are used")
    add("--out", default="person.pt", help="the person file (default: person.pt)")
    add("--checkpoint", default=CHECKPOINT, help="a meta-learned checkpoint (default: the bundled one)")
    add("--epochs", type=int, default=EPOCHS, help="passes over the photos (40)")
    add("--no-adversarial", action="store_true", help="an ablation of A.2: no adversarial term")
    add("--random", choices=("e", "psi", "w"), help="an ablation of A.2: start e_NEW, psi' or w' from noise")
    add_finetuning_flags(parser)
    args = parser.parse_args()
    check_least(args, 1, "epochs")
    if args.no_adversarial and args.random == "w":
        raise UserError("--no-adversarial and --random w exclude each other, because w' is used in the "
                        "adversarial term only: leave out one of them")
    check_paths([*args.photos, args.checkpoint, args.vgg19, args.vggface], [args.out])

    device = default_device()
    state = load_for_finetuning(args.checkpoint, device, args.random)
    config = state["config"]
    photos = load_photos(args.photos, config, landmark_detector(config.landmarks))
    content = content_loss(args, config)
    person = learn_person(state, photos, content, args.epochs, device, as_paper=args.as_paper,
                          adversarial=not args.no_adversarial, random=args.random)
    save_person(args.out, config, *person, photos)
    print(f"wrote {args.out}: use it with python infer.py --person {args.out} --driver VIDEO")


if __name__ == "__main__":
    run(main)
