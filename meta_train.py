"""Stage 1, Sec. 3.2: meta-learning of E, G and D on a prepared folder of many people's videos.

    torchrun --nproc_per_node 8 meta_train.py --vgg19 FILE --vggface FILE       # as in the paper, on 8 GPUs
    python meta_train.py --toy                                  # cartoon heads, under an hour on a CPU
    python meta_train.py --small --data prepared                # real people, about a day on a CPU
    python meta_train.py ... --resume                           # continue a run that was stopped, exactly

Writes to --out: step-N.pt (which finetune.py and infer.py read), step-N.rank-R.state (for --resume),
log.csv, and samples-N.png (a row for each example: source, landmarks, target, result). The defaults are the
paper's. Its content loss needs --vgg19 and --vggface; see losses.ContentLoss for what happens without them.
"""
import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.nn.utils import parametrize

from beyond.augment import augment
from beyond.average import average_decay, update_average
from beyond.grow import grow
from beyond.recognition import FaceTerm
from beyond.toy import ToyHeads
from data import Episodes, PreparedVideos, batches, to_float, to_uint8
from losses import (BETAS, MATCH_WEIGHT, ContentLoss, adversarial_loss, feature_matching_loss, hinge_loss,
                    match_loss)
from model import Discriminator, Embedder, Generator
from runtime.checkpoint import make_config
from runtime.device import autocast, device_of_rank
from runtime.files import UserError, atomic, check_idle, check_least, check_paths, make_parser, run
from runtime.resume import (LOG_EVERY, Log, Signals, Training, any_rank, check_finite, clear, find_ranks,
                            join_ranks, open_run, restore, save_step)

# The settings of a run: one of these dictionaries, overridden by flags.
PAPER = dict(
    out="runs/meta", save_every=1000, steps=None,
    image_size=256, channels=(64, 128, 256, 512), K=8, batch=48,        # Sec. 3.2, 3.4, A.4; 256 is ours
    lr=5e-5, lr_d=2e-4, content="vgg", match_weight=MATCH_WEIGHT,       # Sec. 3.4
    # Everything below is ours. These values turn it off in meta-learning:
    content_weight=1.0,     # the factor of the whole content loss
    face_weight=0.0,        # the weight of dlib's recognition network, used where VGGFace's file is missing
    vector_weight=1.0,      # in that term, the weight of the network's last output; the others have 1
    ema=0.0,                # the decay of the moving average of E and G that checkpoints hold
    augment=False,          # recolour episodes, and mirror half of them
    stills=0.0,             # the share of episodes that are made of one frame, warped K + 1 times
    psi_gain=1.0,           # psi_hat = psi_gain * P e_hat, because spectral normalisation keeps |P| at 1
    # and these are stored for finetune.py and infer.py:
    finetune_lr=1e-4, finetune_lr_d=4e-4,       # initial learning rates of fine-tuning without --as-paper
    finetune_content=None,                      # the content loss of fine-tuning; None: the same
    lips=1.0)                                   # how far lips open, as a multiple of the driver's opening
TOY = PAPER | dict(
    out="runs/toy", save_every=300, steps=1500,
    image_size=64, channels=(32, 64, 128), K=4, batch=8, lr=3e-4, lr_d=3e-4, content="l1",
    finetune_lr=6e-4, finetune_lr_d=6e-4, content_weight=1 / 3)     # a third of losses.PIXEL_WEIGHT
SMALL = PAPER | dict(       # the training of the bundled checkpoint, see weights/MODEL_CARD.md
    out="runs/small", save_every=150,
    channels=(16, 16, 32, 64, 256), K=2, batch=8, lr=2e-4, lr_d=1e-4, content="squeeze", match_weight=0.3,
    content_weight=0.3, face_weight=10.0, vector_weight=6.0,
    ema=0.999, augment=True, stills=0.3, psi_gain=8.0,
    finetune_lr=1e-3, finetune_lr_d=1e-3, finetune_content="l1", lips=1.25)


# ----------------------------------------------------------------------------------------- the algorithm

def make_optimizers(E, G, D, config):
    """-> Adam for E and G, Adam for D. With beta1 = 0, rows of W that are not drawn do not change."""
    fused = D.w0.is_cuda
    return (torch.optim.Adam([*E.parameters(), *G.parameters()], config.lr, BETAS, fused=fused),
            torch.optim.Adam(D.parameters(), config.lr_d, BETAS, fused=fused))


def train_step(E, G, D, content, optimizers, row, x, y, match_weight=MATCH_WEIGHT):
    """One step of Sec. 3.2. x, y (B, K+1, 3, S, S) in [-1, 1], with the target frame t first.

    row (B,): the paper's i, as rows of this rank's W.  content: a ContentLoss.
    match_weight: the weight of L_MCH, which is 0 for the FF variant.
    Returns what is logged: {name: scalar tensor}.
    """
    optimizer_EG, optimizer_D = optimizers
    x_t, y_t = x[:, 0], y[:, 0]                                 # (B, 3, S, S)
    x_s, y_s = x[:, 1:], y[:, 1:]                               # (B, K, 3, S, S)

    # (1) update E and G: eq. 3
    D.requires_grad_(False)
    with autocast(x.device), parametrize.cached():              # both calls of V share one power iteration
        e = E(x_s.flatten(0, 1), y_s.flatten(0, 1))             # (B K, N)
        e = e.unflatten(0, x_s.shape[:2])                       # (B, K, N)
        e_hat = e.mean(dim=1)                                   # eq. 1: (B, N)
        x_hat = G(y_t, e_hat).float()                           # eq. 2: (B, 3, S, S)
        w_i = D.rows(row)                                       # (B, N)
        fake_score, fake_features = D(x_hat, y_t, w_i + D.w0)   # eq. 5
        with torch.no_grad():
            real_features = D.V(x_t, y_t)[1]
        cnt = content(x_hat, x_t)
        adv = adversarial_loss(fake_score)
        fm = feature_matching_loss(fake_features, real_features)
        mch = match_loss(e, w_i, match_weight)
    l_adv = adv + fm                                            # eq. 4
    loss = cnt + l_adv + mch                                    # eq. 3, minimised over phi, psi, P
    optimizer_EG.zero_grad()
    loss.backward()
    optimizer_EG.step()

    # (2) update theta, W, w0 and b twice, on the same batch and x_hat: eq. 6
    D.requires_grad_(True)
    x_both = torch.cat([x_t, x_hat.detach()])                   # (2B, 3, S, S): real, then generated
    y_both = torch.cat([y_t, y_t])
    for _ in range(2):
        with autocast(x.device):
            w = D.rows(row) + D.w0
            score, _ = D(x_both, y_both, torch.cat([w, w]))     # (2B,)
        real_score, fake_score = score.chunk(2)
        dsc = hinge_loss(real_score, fake_score)
        optimizer_D.zero_grad()
        dsc.backward()
        optimizer_D.step()

    norm_e, norm_w = e.norm(dim=2).mean(), w_i.norm(dim=1).mean()
    logged = {"cnt": cnt, "adv": adv, "fm": fm, "mch": mch, "dsc": dsc, "|e|": norm_e, "|W|": norm_w}
    return {name: value.detach().float() for name, value in logged.items()}


def set_rates(optimizers, config, left):
    """Set the learning rates to `left` times config's. left: the share of the run still to do, 1 to 0."""
    for optimizer, rate in zip(optimizers, (config.lr, config.lr_d)):
        for group in optimizer.param_groups:
            group["lr"] = rate * left


@torch.no_grad()
def sample_grid(path, E, G, episodes, device, rows=8):
    """Write a PNG with a row for each episode: source s_1, landmarks y(t), target x(t), result x_hat(t)."""
    _, x, y = zip(*(episodes[n] for n in range(rows)))
    x, y = to_float(torch.stack(x), device), to_float(torch.stack(y), device)   # (rows, K+1, 3, S, S)
    modes = E.training, G.training
    E.eval(), G.eval()
    e = torch.stack([E(x[n, 1:], y[n, 1:]).mean(0) for n in range(rows)])       # (rows, N)
    grid = torch.stack([x[:, 1], y[:, 0], x[:, 0], G(y[:, 0], e)], dim=1)       # (rows, 4, 3, S, S)
    E.train(modes[0]), G.train(modes[1])
    picture = np.concatenate(np.concatenate(to_uint8(grid), axis=1), axis=1)    # (rows S, 4 S, 3)
    with atomic(path) as temporary:
        Image.fromarray(picture).save(temporary, "PNG")


# ----------------------------------------------------------------------------------------------- command

def parse():
    parser = make_parser(__doc__)
    add = parser.add_argument_group("settings (defaults without --toy and --small)").add_argument
    add("--data", metavar="DIR", help="folder that data.py prepared (default: prepared)")
    add("--out", metavar="DIR", help="folder of this run (runs/meta, runs/toy or runs/small)")
    add("--epochs", type=int, help="an epoch has as many episodes as there are videos (75; --no-match: 150)")
    add("--steps", type=int, help="instead of --epochs")
    add("--batch", type=int, help="episodes per step, over all ranks (48)")
    add("--K", type=int, help="frames per episode that the embedder sees (8)")
    add("--image-size", type=int, help="64, 128, 256 or 512 (256)")
    add("--channels", type=int, nargs="+", metavar="C",
        help="output widths of G's encoder; the last is also the size of an embedding (64 128 256 512)")
    add("--lr", type=float, help="learning rate of E and G (5e-5)")
    add("--lr-d", type=float, help="learning rate of D (2e-4)")
    add("--content", choices=("vgg", "squeeze", "l1"), help="the content loss (vgg)")
    add("--vgg19", metavar="FILE", help="MatConvNet's imagenet-vgg-verydeep-19.mat, as in the paper")
    add("--vggface", metavar="FILE", help="MatConvNet's vgg-face.mat")
    add("--no-match", action="store_true", help="the FF variant: no match loss, and no fine-tuning later")
    add("--save-every", type=int, metavar="N", help="steps between checkpoints; two are kept (1000)")
    add("--resume", action="store_true", help="continue from the newest complete checkpoint in --out")
    add("--seed", type=int, default=0, help="seed of the networks and the data (0)")
    add = parser.add_argument_group("additions to the paper").add_argument
    add("--toy", action="store_true", help="cartoon heads, small networks: the defaults of TOY in this file")
    add("--small", action="store_true", help="real people, small networks: the defaults of SMALL")
    add("--content-weight", type=float, metavar="WEIGHT",
        help="the factor of the content loss; a smaller one gives D more influence (1)")
    add("--linear-decay", action="store_true", help="let both learning rates fall linearly to 0 over the run")
    add("--grow-from", metavar="FILE",
        help="start from a step-N.pt of the same sizes, or of half the size and without the first width")
    add("--fix-embedder", action="store_true", help="with --grow-from: do not train E (see beyond/teach.py)")
    first, _ = parser.parse_known_args()
    if first.toy and first.small:
        raise UserError("--toy and --small exclude each other: use one of them")
    if first.epochs is not None and first.steps is not None:
        raise UserError("--epochs and --steps exclude each other: use one of them")
    parser.set_defaults(**TOY if first.toy else SMALL if first.small else PAPER)
    args = parser.parse_args()
    if args.epochs is None:
        args.epochs = 150 if args.no_match else 75
    else:
        args.steps = None
    check(args)
    return args


def check(args):
    check_paths([args.vgg19, args.vggface, args.grow_from])
    check_least(args, 0, "seed")
    if args.fix_embedder and not args.grow_from:
        raise UserError("--fix-embedder needs --grow-from, because otherwise E would never be trained")
    if args.toy:
        check_idle(args, "--toy draws its own heads", "data")
    args.data = args.data or "prepared"
    if not args.toy and Path(args.out).resolve().is_relative_to(Path(args.data).resolve()):
        raise UserError(f"--out {args.out} is inside --data, which is for sequences only: name another")
    for name in ("epochs", "steps", "batch", "K", "save_every", "lr", "lr_d", "content_weight"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value}: it must be more than 0")


def find_data(args, rank, world):
    """-> the run's Config, this rank's episodes, eight more for the sample grids, the number of steps."""
    slots, rest = divmod(args.batch, world)
    if rest:
        raise UserError(f"--batch {args.batch} cannot be divided evenly among {world} ranks")
    if args.toy:
        videos, shown = ToyHeads(1000, args.image_size), ToyHeads(8, args.image_size, first=1000)
    else:
        videos = shown = PreparedVideos(args.data, args.image_size)
    config = make_config(image_size=args.image_size, channels=args.channels, num_videos=len(videos),
                         landmarks=videos.detector, content=args.finetune_content or args.content,
                         match=not args.no_match, lr=args.lr, lr_d=args.lr_d, lips=args.lips,
                         finetune_lr=args.finetune_lr, finetune_lr_d=args.finetune_lr_d)
    ours = dict(augment=augment if args.augment else None, stills=args.stills)
    episodes = Episodes(videos, args.K, slots, args.seed, rank, world, **ours)
    examples = Episodes(shown, args.K, slots=8, seed=args.seed + 1, **ours)
    steps = args.steps or math.ceil(args.epochs * len(videos) / args.batch)
    return config, episodes, examples, steps


def run_facts(args, videos, steps, world):
    """What, besides its Config, identifies this run. --resume refuses to continue if any of it differs."""
    names = ("seed", "batch", "K", "content", "content_weight", "match_weight", "face_weight",
             "vector_weight", "ema", "augment", "stills", "psi_gain", "fix_embedder")
    file_name = lambda path: path and Path(path).name
    return {name: getattr(args, name) for name in names} | {
        "ranks": world, "data": videos.name, "--vgg19": file_name(args.vgg19),
        "--vggface": file_name(args.vggface), "steps of --linear-decay": steps if args.linear_decay else None}


def make_networks(config, rows, seed, rank, device):
    """-> E, G, D. They are equal on every rank, except for W, of which every rank has its own rows."""
    layout = dict(device=device, memory_format=torch.channels_last)  # a quarter faster
    torch.manual_seed(seed)
    E, G = Embedder(config).to(**layout), Generator(config).to(**layout)
    D = Discriminator(replace(config, num_videos=rows)).to(**layout)
    torch.manual_seed(seed + 1 + rank)  # from here on the ranks differ
    D.reset_rows()
    return E, G, D


def main():
    # devices
    args = parse()
    rank, world, local_rank = find_ranks()
    device = device_of_rank(local_rank)

    # data
    config, episodes, examples, steps = find_data(args, rank, world)
    facts = run_facts(args, episodes.videos, steps, world)
    done = open_run(args.out, args.resume, rank)
    extra = FaceTerm(args.face_weight, args.vector_weight) if args.face_weight and not args.vggface else None
    content = ContentLoss(args.content, args.vgg19, args.vggface, extra, args.content_weight)
    content = content.to(device, memory_format=torch.channels_last)
    if world > 1:
        join_ranks("nccl" if device.type == "cuda" else "gloo", rank, world)

    # networks: E and G are the same on all ranks, but each rank trains its own D (step-N.pt has rank 0's)
    E, G, D = make_networks(config, episodes.rows, args.seed, rank, device)
    G.P.gain.fill_(args.psi_gain)
    optimizers = make_optimizers(E, G, D, config)
    averages = (copy.deepcopy(E), copy.deepcopy(G)) if args.ema else (E, G)     # checkpoints hold them

    # resume
    training = Training(args.out, config, facts, (E, G, D), averages, optimizers, rank, world, device)
    start = restore(training)
    if start >= steps:
        print(f"{args.out} is finished: step {start} of {steps}")
        return dist.destroy_process_group() if world > 1 else None
    if rank == 0:
        clear(args.out, keep=[step for step in done if step <= start])
    if args.grow_from and not start:
        grow(E, G, D, args.grow_from, config, episodes)
        update_average(averages, (E, G), decay=0.0)
    if args.fix_embedder:
        E.requires_grad_(False).eval()
    if device.type == "cuda":
        for net in (E, G, D.V):
            net.compile()
    # A.4: gradients are reduced "only for the generator and the embedder". Buffers need no broadcast, because
    # the power iterations of equal weights are equal.
    E_ddp = DDP(E, broadcast_buffers=False) if world > 1 and not args.fix_embedder else E
    G_ddp = DDP(G, broadcast_buffers=False) if world > 1 else G

    # loop
    log = Log(f"{args.out}/log.csv", start, steps) if rank == 0 else None
    match_weight = args.match_weight if config.match else 0.0
    with Signals() as signals:
        for step, (row, x, y, waited) in enumerate(batches(episodes, start, steps, device), start + 1):
            if args.linear_decay:
                set_rates(optimizers, config, 1 - (step - 1) / steps)
            values = train_step(E_ddp, G_ddp, D, content, optimizers, row, x, y, match_weight)
            if args.ema:
                update_average(averages, (E, G), average_decay(args.ema, step))
            ask = world == 1 or step % 10 == 0      # ranks have to agree, which would slow down every step
            stopping = ask and any_rank([bool(signals.came)], world, device)[0]
            saving = step % args.save_every == 0 or step == steps or stopping
            if saving or step % LOG_EVERY == 0:
                weights = [*E.parameters(), *G.parameters(), *D.V.parameters()] if saving else []
                check_finite(values, weights, step, args.out, world)
            if rank == 0:
                log.add(values, waited)
                if step % LOG_EVERY == 0 or saving:
                    log.write(step, args.batch)
            if saving:
                if rank == 0:
                    sample_grid(f"{args.out}/samples-{step}.png", *averages, examples, device)
                save_step(training, step)
            if stopping:
                break
    if world > 1:
        dist.destroy_process_group()
    if stopping and step < steps:
        signals.leave(f"stopped at step {step} of {steps}, saved in {args.out}: continue with --resume")


if __name__ == "__main__":
    run(main)
