"""Ours, beside the paper: E is taught who people are, and P to read it, by dlib's recognition network.

    python teach.py --data prepared --checkpoint runs/small/step-3000.pt --out runs/taught.pt
    python meta_train.py ... --grow-from runs/taught.pt --psi-gain N        # N is what teach.py says

In meta-learning all that E hears of people comes through P, G and a content loss, from few pictures a
second: on a small machine it learns little. Here E alone is told the answer, then P alone is trained.
Run again on its own result, it goes on.
"""
import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

from data import Episodes, PreparedVideos
from device import autocast, default_device
from files import UserError, check_paths, make_parser, run
from losses import FACE_WEIGHT, PIXEL_WEIGHT, face_terms, l1
from meta_train import batches
from model import load_checkpoint, load_networks, save_checkpoint
from perceptual import FaceFeatures

BETAS = (0.9, 0.99)             # nothing adversarial here
LR_E, LR_P = 1e-3, 5e-4
VECTOR_WEIGHT = 6.0             # of dlib's answer who it is, beside 1 of each layer before it
BATCH = 32                      # frames; (3) has as many episodes as the meta-learning that we ran, 8
FITTED = 200                    # batches that P is fitted on before it is trained


class Reader(nn.Linear):
    """psi_hat from (e - mean) / spread: mean (N,) over people, one spread for all of e. What P becomes."""

    def __init__(self, mean, spread, size):
        super().__init__(len(mean), size, device=mean.device)
        self.mean, self.spread = mean, spread

    def forward(self, e):                                       # (B, N)
        return super().forward((e - self.mean) / self.spread)   # (B, |psi|)


def teach_embedder(E, N, teacher, episodes, steps, device):
    """(1) E learns to tell dlib's vector of its picture, by a linear map of e that is not kept.

    Returns R^2, the share of these vectors' variance that it told over the last hundred steps.
    """
    size = teacher.matrix.shape[1]                              # 128
    tell = nn.Sequential(nn.BatchNorm1d(N, affine=False), nn.Linear(N, size)).to(device)
    standard = nn.BatchNorm1d(size, affine=False).to(device)
    optimizer = torch.optim.Adam([*E.parameters(), *tell.parameters()], LR_E, BETAS)
    schedule = CosineAnnealingLR(optimizer, steps)
    E.train()
    losses = []
    for _, x, y, _ in tqdm(batches(episodes, 0, steps, device), "teaching E", steps, unit=" steps"):
        x, y = x.flatten(0, 1), y.flatten(0, 1)                 # (B, 3, S, S): every frame by itself
        with autocast(x.device):
            e = E(x, y)                                         # (B, N)
            with torch.no_grad():
                v = teacher(x)[-1]                              # (B, 128)
        loss = F.mse_loss(tell(e.float()), standard(v.float()))     # 1 - R^2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    E.eval()
    return 1 - sum(losses[-100:]) / len(losses[-100:])


@torch.no_grad()
def fit_reader(E, old_E, G, episodes, device):
    """(2) The linear map of the new e to psi_hat as it was, by ridge regression.

    -> the Reader, and the mean over people of the old e (N,).
    """
    new, old = [], []
    for _, x, y, _ in tqdm(batches(episodes, 0, FITTED, device), "fitting P", FITTED, unit=" steps"):
        x, y = x.flatten(0, 1), y.flatten(0, 1)                 # (B, 3, S, S)
        with autocast(x.device):
            new.append(E(x, y))                                 # (B, N)
            old.append(old_E(x, y))                             # (B, N)
    e, old_e = torch.cat(new), torch.cat(old)
    psi = G.project(old_e)                                      # (n, |psi|)
    mean, psi_mean = e.mean(0), psi.mean(0)
    spread = (e - mean).square().mean().sqrt()

    z, eye = (e - mean) / spread, torch.eye(e.shape[1], device=device)
    reader = Reader(mean, spread, psi.shape[1])
    reader.weight.copy_(torch.linalg.solve(z.T @ z + 0.005 * len(z) * eye, z.T @ (psi - psi_mean)).T)
    reader.bias.copy_(psi_mean)
    return reader, old_e.mean(0)


def teach_reader(reader, E, G, teacher, episodes, steps, device):
    """(3) The reader learns from G's pictures, on fixed networks: those of the person, by dlib's eyes."""
    G.requires_grad_(False)
    optimizer = torch.optim.Adam(reader.parameters(), LR_P, BETAS)
    schedule = CosineAnnealingLR(optimizer, steps)
    for _, x, y, _ in tqdm(batches(episodes, 0, steps, device), "teaching P", steps, unit=" steps"):
        x_t, y_t = x[:, 0], y[:, 0]                             # (B, 3, S, S)
        with autocast(x.device):
            with torch.no_grad():
                e = E(x[:, 1:].flatten(0, 1), y[:, 1:].flatten(0, 1)).float()
                e = e.unflatten(0, (len(x), -1)).mean(1)        # eq. 1: (B, N)
        psi_hat = reader(e)                                     # (B, |psi|): float32, as in G.project
        with autocast(x.device):
            x_hat = G.render(y_t, psi_hat).float()              # (B, 3, S, S)
            *look, who = face_terms(teacher, x_hat, x_t)
        loss = PIXEL_WEIGHT["l1"] * l1(x_hat, x_t) + FACE_WEIGHT * (sum(look) + VECTOR_WEIGHT * who)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def become_P(G, reader):
    """(4) P of norm 1, its gain, and its bias, that make the same psi_hat -> the gain.

    The weights below spectral normalisation get the size that they have in a fresh nn.Linear.
    """
    weight = reader.weight / reader.spread                             # (|psi|, N)
    gain = float(f"{torch.linalg.matrix_norm(weight, 2):.4g}")     # short enough for a flag
    norm = G.P.parametrizations.weight
    norm.original.copy_(weight / weight.square().mean().sqrt() / (3 * weight.shape[1]) ** 0.5)
    norm[0]._power_method(norm.original, 50)
    G.P.bias.copy_(reader.bias / gain)
    G.P.mean.copy_(reader.mean)
    return gain


# ------------------------------------------------------------------------------------------- command

def parse():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--data", default="prepared", metavar="DIR", help="folder that data.py prepared (default: prepared)")
    add("--checkpoint", required=True, metavar="FILE", help="a step-N.pt of meta_train.py")
    add("--out", required=True, metavar="FILE", help="the checkpoint with E and P taught")
    add("--steps-E", type=int, default=9000, metavar="N", help=f"of {BATCH} frames (9000)")
    add("--steps-P", type=int, default=1500, metavar="N", help=f"of {BATCH // 4} episodes (1500)")
    add("--seed", type=int, default=0, help="another one where it goes on (0)")
    args = parser.parse_args()
    check_paths([args.checkpoint], [args.out])
    for name in ("steps_E", "steps_P"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: 1 or more is needed")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: 0 or more is needed")
    return args


def main():
    args, device = parse(), torch.device(default_device())
    torch.manual_seed(args.seed)
    state = load_checkpoint(args.checkpoint, device)
    videos = PreparedVideos(args.data, state["config"].image_size)
    config = replace(state["config"], by_frames=False)          # every person as often
    draw = lambda K, slots, more: Episodes(videos, K, slots, 3 * args.seed + more, config=config)
    E, G, D = (net.to(memory_format=torch.channels_last) for net in load_networks(state))
    old_E = copy.deepcopy(E)
    teacher = FaceFeatures().to(device).eval().requires_grad_(False)

    frames = draw(1, BATCH // 2, 0)
    told = teach_embedder(E, config.max_channels, teacher, frames, args.steps_E, device)
    print(f"of the variance of dlib's vectors, e tells {100 * told:.0f} %")
    reader, old_mean = fit_reader(E, old_E, G, draw(1, BATCH // 2, 1), device)
    teach_reader(reader, E, G, teacher, draw(2, BATCH // 4, 2), args.steps_P, device)
    config = replace(state["config"], psi_gain=become_P(G, reader))
    with torch.no_grad():
        D.w0 += old_mean - reader.mean                                 # as before, w0 + e is to D on average
    save_checkpoint(args.out, "meta", config, state["step"], E=E, G=G, V=D.V, w0=D.w0, b=D.b)
    print(f"wrote {args.out}: go on with meta_train.py --grow-from {args.out} --psi-gain {config.psi_gain:g}")


if __name__ == "__main__":
    run(main)
