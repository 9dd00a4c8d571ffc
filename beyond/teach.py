"""Ours: teach E who people are with dlib's face recognition network, and fit P to the new embeddings.

    python -m beyond.teach --data prepared --checkpoint runs/small/step-8100.pt --out runs/taught.pt
    python meta_train.py --small --grow-from runs/taught.pt --fix-embedder

In meta-learning, E's main signal about identity is the gradient of the content loss that reaches it through G
and P. A small machine sees too few pictures for E to learn much from it. So E is distilled from the
recognition network here:

(1) E learns to predict the vector of 128 numbers with which that network describes a person.
(2) P is fitted so that the new embeddings give the same psi_hat as the old ones.
(3) P, and E at a lower rate, are trained by the content loss of pictures that a fixed G generates.
(4) The result becomes the P of G: weights under spectral normalisation, a gain, and a mean of e that is
    subtracted. All three are in the checkpoint.

Further meta-learning would make E forget people again, so it keeps E fixed (--fix-embedder). teach.py can be
run again on its own result, with another --seed.
"""
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

from beyond.augment import augment
from beyond.recognition import FaceTerm
from data import Episodes, PreparedVideos, batches, check_landmarks
from losses import ContentLoss
from runtime.checkpoint import load_checkpoint, load_networks, save_checkpoint
from runtime.device import autocast, default_device
from runtime.files import check_least, check_paths, make_parser, run

TEACH_BETAS = (0.9, 0.99)       # of Adam; not BigGAN's (0, 0.999), because no loss here is adversarial
LR_E, LR_P = 1e-3, 5e-4
FACE_WEIGHT = 30.0              # in (3), of FaceTerm, beside the 300 of L1 on pixels
VECTOR_WEIGHT = 6.0             # in (3), of the recognition network's vector; each earlier layer has weight 1
BATCH = 32                      # frames in (1); (3) has a quarter as many episodes, each of 3 frames
STILLS = 0.3                    # the share of episodes that are made of one frame, as in meta_train.SMALL
FIT_BATCHES = 200               # the number of batches whose embeddings (2) fits P to


class Projection(nn.Linear):
    """Computes psi_hat from (e - mean) / spread. P is made from it in the end.

    mean (N,): of embeddings e over people.  spread (): one standard deviation for all elements of e.
    """

    def __init__(self, mean, spread, psi_size):
        super().__init__(len(mean), psi_size, device=mean.device)
        self.mean, self.spread = mean, spread

    def forward(self, e):                                       # (B, N)
        return super().forward((e - self.mean) / self.spread)   # (B, |psi|)


def teach_embedder(E, N, teacher, episodes, steps, device):
    """(1) Train E to predict the teacher's vector of a frame, through a linear map of e that is not kept.

    Returns R^2, the share of the variance of these vectors that is predicted, over the last hundred steps.
    """
    size = teacher.matrix.shape[1]                              # 128
    predict = nn.Sequential(nn.BatchNorm1d(N, affine=False), nn.Linear(N, size)).to(device)
    standardise = nn.BatchNorm1d(size, affine=False).to(device)
    optimizer = torch.optim.Adam([*E.parameters(), *predict.parameters()], LR_E, TEACH_BETAS)
    schedule = CosineAnnealingLR(optimizer, steps)
    E.train()
    losses = []
    for _, x, y, _ in tqdm(batches(episodes, 0, steps, device), "teaching E", steps, unit=" steps"):
        x, y = x.flatten(0, 1), y.flatten(0, 1)                 # (B, 3, S, S): every frame by itself
        with autocast(x.device):
            e = E(x, y)                                         # (B, N)
            with torch.no_grad():
                v = teacher(x)[-1]                              # (B, 128)
        loss = F.mse_loss(predict(e.float()), standardise(v.float()))       # 1 - R^2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    E.eval()
    return 1 - sum(losses[-100:]) / len(losses[-100:])


@torch.no_grad()
def embeddings(E, episodes, device):
    """The embeddings e (n, N) of the frames of FIT_BATCHES batches, which are the same in every call."""
    e = []
    steps = FIT_BATCHES
    for _, x, y, _ in tqdm(batches(episodes, 0, steps, device), "embedding", steps, unit=" steps"):
        with autocast(x.device):
            e.append(E(x.flatten(0, 1), y.flatten(0, 1)))       # (B, N)
    return torch.cat(e)


@torch.no_grad()
def fit_projection(e, psi):
    """(2) Ridge regression of psi_hat (n, |psi|), which the old E and P gave, on the new e (n, N)."""
    mean, psi_mean = e.mean(0), psi.mean(0)
    spread = (e - mean).square().mean().sqrt()

    z, eye = (e - mean) / spread, torch.eye(e.shape[1], device=e.device)
    projection = Projection(mean, spread, psi.shape[1])
    projection.weight.copy_(torch.linalg.solve(z.T @ z + 0.005 * len(z) * eye, z.T @ (psi - psi_mean)).T)
    projection.bias.copy_(psi_mean)
    return projection


def train_projection(projection, E, G, content, episodes, steps, device):
    """(3) Train the projection, and E at a lower rate, by the content loss of pictures from a fixed G."""
    G.requires_grad_(False)
    rates = [{"params": E.parameters(), "lr": LR_E / 5}, {"params": projection.parameters(), "lr": LR_P}]
    optimizer = torch.optim.Adam(rates, betas=TEACH_BETAS)
    schedule = CosineAnnealingLR(optimizer, steps)
    E.train()
    for _, x, y, _ in tqdm(batches(episodes, 0, steps, device), "teaching P", steps, unit=" steps"):
        x_t, y_t = x[:, 0], y[:, 0]                             # (B, 3, S, S)
        with autocast(x.device):
            e = E(x[:, 1:].flatten(0, 1), y[:, 1:].flatten(0, 1)).float()
        e_hat = e.unflatten(0, (len(x), -1)).mean(1)            # eq. 1: (B, N)
        psi_hat = projection(e_hat)                             # (B, |psi|): float32, as in G.project
        with autocast(x.device):
            x_hat = G.render(y_t, psi_hat).float()              # (B, 3, S, S)
            loss = content(x_hat, x_t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    E.eval()


@torch.no_grad()
def write_P(G, projection):
    """(4) Set G's P, with its gain and mean, so that it computes the same psi_hat as the projection.

    Spectral normalisation makes the scale of the stored weights arbitrary. They get the scale of a fresh
    nn.Linear, because the learning rates of meta-learning were chosen for that.
    """
    weight = projection.weight / projection.spread                  # (|psi|, N)
    gain = torch.linalg.matrix_norm(weight, 2)
    norm = G.P.parametrizations.weight
    norm.original.copy_(weight / weight.square().mean().sqrt() / (3 * weight.shape[1]) ** 0.5)
    norm[0]._power_method(norm.original, 50)
    G.P.bias.copy_(projection.bias / gain)
    G.P.mean.copy_(projection.mean)
    G.P.gain.copy_(gain)


# ------------------------------------------------------------------------------------------- command

def parse():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--data", default="prepared", metavar="DIR", help="folder that data.py prepared (default: prepared)")
    add("--checkpoint", required=True, metavar="FILE", help="a step-N.pt of meta_train.py")
    add("--out", required=True, metavar="FILE", help="where to write the checkpoint with the new E and P")
    add("--steps-E", type=int, default=9000, metavar="N",
        help=f"training steps of E, each of {BATCH} frames (9000)")
    add("--steps-P", type=int, default=1000, metavar="N",
        help=f"training steps of P, each of {BATCH // 4} episodes (1000)")
    add("--seed", type=int, default=0, help="seed of the data; use another one to teach a result again (0)")
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
    config = state["config"]
    draw = lambda K, slots, number, stills: Episodes(videos, K, slots, seed=3 * args.seed + number,
                                                     augment=augment, stills=stills)
    E, G, D = (net.to(memory_format=torch.channels_last) for net in load_networks(state))
    content = ContentLoss("l1", extra=FaceTerm(FACE_WEIGHT, VECTOR_WEIGHT)).to(device)

    to_teach, to_fit = draw(1, BATCH // 2, 0, STILLS), draw(1, BATCH // 2, 1, STILLS)
    to_train = draw(2, BATCH // 4, 2, 0.0)      # no stills: e has to carry the identity, not the picture
    old_e = embeddings(E, to_fit, device)
    r2 = teach_embedder(E, config.N, content.extra.net, to_teach, args.steps_E, device)
    print(f"E predicts {100 * r2:.0f} % of the variance of the recognition network's vectors")
    projection = fit_projection(embeddings(E, to_fit, device), G.project(old_e).detach())
    train_projection(projection, E, G, content, to_train, args.steps_P, device)
    write_P(G, projection)
    with torch.no_grad():
        D.w0 += old_e.mean(0) - embeddings(E, to_fit, device).mean(0)   # keeps the mean of w' = w0 + e_NEW
    save_checkpoint(args.out, "meta", config, state["step"], state["run"], E=E, G=G, V=D.V, w0=D.w0, b=D.b)
    print(f"wrote {args.out}: go on with meta_train.py --small --grow-from {args.out} --fix-embedder")


if __name__ == "__main__":
    run(main)
