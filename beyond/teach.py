"""Ours, beside the paper: E is taught who people are, and P to read it, by dlib's recognition network.

    python -m beyond.teach --data prepared --checkpoint runs/small/step-8100.pt --out runs/taught.pt
    python meta_train.py ... --grow-from runs/taught.pt --psi-gain N --fix-embedder --face 10 --face-vector 6

In meta-learning all that E hears of people comes through P, G and a content loss, from few pictures a
second: on a small machine it learns little. So here (1) E learns to predict that network's vector, 128
numbers that say who it is, from the picture, (2) P is fitted so that the new e gives psi_hat as it was,
(3) P, and slowly E, learn from the pictures of a G that stays as it is, (4) the result is written as P of
norm 1 and its gain, the N above, which teach.py prints. Meta-learning would have E forget people again, so
there it stays fixed. Run again on its own result, teach.py goes on.
"""
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

from data import Episodes, PreparedVideos, batches, check_landmarks
from losses import FACE_WEIGHT, ContentLoss
from model import load_checkpoint, load_networks, save_checkpoint
from runtime.device import autocast, default_device
from runtime.files import check_least, check_paths, make_parser, run

TEACH_BETAS = (0.9, 0.99)       # nothing adversarial here
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
    optimizer = torch.optim.Adam([*E.parameters(), *tell.parameters()], LR_E, TEACH_BETAS)
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
def embeddings(E, episodes, device):
    """e (n, N) of the same n frames for every E."""
    e = []
    for _, x, y, _ in tqdm(batches(episodes, 0, FITTED, device), "embedding", FITTED, unit=" steps"):
        with autocast(x.device):
            e.append(E(x.flatten(0, 1), y.flatten(0, 1)))       # (B, N)
    return torch.cat(e)


@torch.no_grad()
def fit_reader(e, psi):
    """(2) The Reader of the new e (n, N) that tells psi_hat (n, |psi|) as it was: ridge regression."""
    mean, psi_mean = e.mean(0), psi.mean(0)
    spread = (e - mean).square().mean().sqrt()

    z, eye = (e - mean) / spread, torch.eye(e.shape[1], device=e.device)
    reader = Reader(mean, spread, psi.shape[1])
    reader.weight.copy_(torch.linalg.solve(z.T @ z + 0.005 * len(z) * eye, z.T @ (psi - psi_mean)).T)
    reader.bias.copy_(psi_mean)
    return reader


def teach_reader(reader, E, G, content, episodes, steps, device):
    """(3) The reader, and slowly E, learn from the pictures of a fixed G. content: a ContentLoss."""
    G.requires_grad_(False)
    rates = [{"params": E.parameters(), "lr": LR_E / 5}, {"params": reader.parameters(), "lr": LR_P}]
    optimizer = torch.optim.Adam(rates, betas=TEACH_BETAS)
    schedule = CosineAnnealingLR(optimizer, steps)
    E.train()
    for _, x, y, _ in tqdm(batches(episodes, 0, steps, device), "teaching P", steps, unit=" steps"):
        x_t, y_t = x[:, 0], y[:, 0]                             # (B, 3, S, S)
        with autocast(x.device):
            e = E(x[:, 1:].flatten(0, 1), y[:, 1:].flatten(0, 1)).float()
        e_hat = e.unflatten(0, (len(x), -1)).mean(1)            # eq. 1: (B, N)
        psi_hat = reader(e_hat)                                 # (B, |psi|): float32, as in G.project
        with autocast(x.device):
            x_hat = G.render(y_t, psi_hat).float()              # (B, 3, S, S)
            loss = content(x_hat, x_t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    E.eval()


@torch.no_grad()
def become_P(G, reader):
    """(4) P of norm 1, its gain, and its bias, that make the same psi_hat -> the gain.

    Below spectral normalisation, where their size is free, the weights get that of a fresh nn.Linear, for
    which Adam's rates were found.
    """
    weight = reader.weight / reader.spread                         # (|psi|, N)
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
    add("--steps-P", type=int, default=1000, metavar="N", help=f"of {BATCH // 4} episodes (1000)")
    add("--seed", type=int, default=0, help="another one where it goes on (0)")
    args = parser.parse_args()
    check_paths([args.checkpoint], [args.out])
    check_least(args, 1, "steps_E", "steps_P")
    check_least(args, 0, "seed")
    return args


def main():
    args, device = parse(), torch.device(default_device())
    torch.manual_seed(args.seed)
    state = load_checkpoint(args.checkpoint, device)
    videos = PreparedVideos(args.data, state["config"].image_size)
    check_landmarks(videos, args.data, state["config"], args.checkpoint)
    config = replace(state["config"], by_frames=False)          # every person as often
    draw = lambda K, slots, more, config: Episodes(videos, K, slots, 3 * args.seed + more, config=config)
    E, G, D = (net.to(memory_format=torch.channels_last) for net in load_networks(state))
    content = ContentLoss("l1", face=FACE_WEIGHT, face_vector=VECTOR_WEIGHT).to(device)

    frames, others = draw(1, BATCH // 2, 0, config), draw(1, BATCH // 2, 1, config)
    pairs = draw(2, BATCH // 4, 2, replace(config, stills=0.0))     # who it is, not which picture
    old_e = embeddings(E, others, device)
    told = teach_embedder(E, config.max_channels, content.face, frames, args.steps_E, device)
    print(f"of the variance of dlib's vectors, e tells {100 * told:.0f} %")
    reader = fit_reader(embeddings(E, others, device), G.project(old_e).detach())
    teach_reader(reader, E, G, content, pairs, args.steps_P, device)
    config = replace(state["config"], psi_gain=become_P(G, reader))
    with torch.no_grad():
        D.w0 += old_e.mean(0) - embeddings(E, others, device).mean(0)  # w0 + e is on average as before
    save_checkpoint(args.out, "meta", config, state["step"], E=E, G=G, V=D.V, w0=D.w0, b=D.b)
    print(f"wrote {args.out}: go on with meta_train.py --grow-from {args.out} --psi-gain {config.psi_gain:g} "
          f"--fix-embedder --face {FACE_WEIGHT:g} --face-vector {VECTOR_WEIGHT:g}")


if __name__ == "__main__":
    run(main)
