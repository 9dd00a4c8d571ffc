"""Stage 1, Sec. 3.2: meta-learning of E, G and D on a prepared folder of many people's videos.

    torchrun --nproc_per_node 8 meta_train.py --data prepared --out runs/meta   # the paper, 8 GPUs
    python meta_train.py --toy                                  # drawn heads, minutes on a CPU
    python meta_train.py ... --resume                           # go on after a stop, exactly

Writes to --out: step-N.pt (what finetune.py and infer.py read), step-N.rank-R.state (for --resume),
log.csv and samples-N.png (rows of source, landmarks, target, result). The defaults are the paper's;
its content loss needs --vgg19 and --vggface, without which it is another (losses.ContentLoss).
"""
import copy
import math
import os
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.nn.parallel import DistributedDataParallel as DDP

from beyond.grow import grow
from beyond.toy import ToyHeads
from config import Config
from data import Episodes, PreparedVideos, batches, to_float, to_uint8
from losses import (BETAS, FM_WEIGHT, ContentLoss, adversarial_loss, feature_matching_loss, hinge_loss,
                    match_loss)
from model import Discriminator, Embedder, Generator
from runtime.device import autocast
from runtime.files import UserError, atomic, check_least, check_paths, make_parser, run
from runtime.resume import (Log, Signals, Training, any_rank, check_finite, clear, find_ranks, join_ranks,
                            open_run, restore, save_step)

LOG_EVERY = 50
TOY = dict(image_size=64, min_channels=32, max_channels=128, K=4, batch=8, content="l1", lr=3e-4, lr_d=3e-4,
           save_every=300, out="runs/toy")
TOY_STEPS = 1500


# ----------------------------------------------------------------------------------------- the algorithm

def make_optimizers(E, G, D, config):
    return [torch.optim.Adam([*E.parameters(), *G.parameters()], config.lr, BETAS),
            torch.optim.Adam([*D.V.parameters(), D.w0, D.b], config.lr_d, BETAS),
            torch.optim.SparseAdam([D.W], config.lr_d, BETAS)]  # the rows of a batch, not 145 k of them


def train_step(E, G, D, content, optimizers, row, x, y, match_weight=10.0, adversarial_weight=1.0):
    """One step of Sec. 3.2. row (B,); x, y (B, K+1, 3, S, S) in [-1, 1], the target frame t first.

    match_weight: of L_MCH; 0 for the FF variant. adversarial_weight: of L_ADV, ours. content: a ContentLoss.
    Returns what is logged, resume.COLUMNS[1:8]; mch without its weight.
    """
    optimizer_EG, optimizer_D, optimizer_W = optimizers
    x_t, y_t = x[:, 0], y[:, 0]                                 # (B, 3, S, S)
    x_s, y_s = x[:, 1:], y[:, 1:]                               # (B, K, 3, S, S)

    # (1) update E and G: eq. 3
    D.requires_grad_(False)
    with autocast(x.device):
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
        fm = FM_WEIGHT * feature_matching_loss(fake_features, real_features)
        mch = match_loss(e, w_i)
    l_adv = adv + fm                                            # eq. 4
    loss = cnt + adversarial_weight * l_adv + match_weight * mch    # eq. 3
    optimizer_EG.zero_grad()
    loss.backward()
    optimizer_EG.step()

    # (2) update D twice, on the same batch: eq. 6
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
        optimizer_W.zero_grad()
        dsc.backward()
        optimizer_D.step()
        optimizer_W.step()

    norm_e = e.detach().norm(dim=2).mean()
    norm_w = w_i.detach().norm(dim=1).mean()
    return torch.stack([v.detach().float() for v in (cnt, adv, fm, mch, dsc, norm_e, norm_w)])


@torch.no_grad()
def update_average(averages, nets, decay):
    """Moving averages of the weights; spectral normalisation's vectors are taken as they are."""
    for average, net in zip(averages, nets):
        for a, p in zip(average.parameters(), net.parameters()):
            a.lerp_(p, 1 - decay)
        for a, b in zip(average.buffers(), net.buffers()):
            a.copy_(b)


@torch.no_grad()
def sample_grid(path, E, G, episodes, device, rows=8):
    """A PNG with a row per episode: source s_1, landmarks y(t), target x(t), result x_hat(t)."""
    _, x, y = zip(*(episodes[n] for n in range(rows)))
    x, y = to_float(torch.stack(x), device), to_float(torch.stack(y), device)   # (rows, K+1, 3, S, S)
    E.eval()
    G.eval()
    e = torch.stack([E(x[n, 1:], y[n, 1:]).mean(0) for n in range(rows)])       # (rows, N)
    grid = torch.stack([x[:, 1], y[:, 0], x[:, 0], G(y[:, 0], e)], dim=1)       # (rows, 4, 3, S, S)
    E.train()
    G.train()
    picture = np.concatenate(np.concatenate(to_uint8(grid), axis=1), axis=1)    # (rows S, 4 S, 3)
    with atomic(path) as temporary:
        Image.fromarray(picture).save(temporary, "PNG")


# ----------------------------------------------------------------------------------------------- command

def parse():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--data", default="prepared", metavar="DIR", help="folder that data.py prepared (default: prepared)")
    add("--out", default="runs/meta", metavar="DIR", help="folder of this run (default: runs/meta)")
    add("--toy", action="store_true",
        help=f"drawn heads and small networks; changes the defaults to {TOY_STEPS} steps and {TOY}")
    add("--epochs", type=int,
        help="an epoch draws as many episodes as there are videos (75; with --no-match 150)")
    add("--steps", type=int, help="instead of --epochs")
    add("--batch", type=int, default=48, help="episodes per step, over all ranks (48)")
    add("--K", type=int, default=8, help="frames per episode that the embedder sees (8)")
    add("--image-size", type=int, default=256, help="64, 128, 256 or 512 (256)")
    add("--min-channels", type=int, default=64, help="of the first block (64)")
    add("--max-channels", type=int, default=512, help="at most, and the size of an embedding (512)")
    add("--lr", type=float, default=5e-5, help="of E and G (5e-5)")
    add("--lr-d", type=float, default=2e-4, help="of D (2e-4)")
    add("--content", choices=("vgg", "squeeze", "l1"), default="vgg",
        help="the content loss; the last two for small machines")
    add("--vgg19", metavar="FILE", help="MatConvNet's imagenet-vgg-verydeep-19.mat, as in the paper")
    add("--vggface", metavar="FILE", help="MatConvNet's vgg-face.mat")
    add("--face", type=float, default=0.0, metavar="WEIGHT",
        help="of our stand-in for VGGFace, which needs no download, e.g. 3 (0: without it)")
    add("--face-vector", type=float, default=1.0, metavar="WEIGHT",
        help="in it, of the last layer, which says who it is, e.g. 6; of the others 1 (1)")
    add("--ema", type=float, default=0.0, metavar="DECAY",
        help="checkpoints hold a moving average of E and G, e.g. 0.999 (0: none)")
    add("--by-frames", action="store_true",
        help="draw sequences in proportion to their frames: folders of few photos less often")
    add("--augment", action="store_true", help="recolour episodes and mirror half of them")
    add("--stills", type=float, default=0.0, metavar="SHARE",
        help="of the episodes that are made of one frame, warped K + 1 times (0)")
    add("--psi-gain", type=float, default=1.0, help="psi_hat = gain * P e_hat (1)")
    add("--no-match", action="store_true", help="the FF variant: no match loss, and no fine-tuning later")
    add("--match-weight", type=float, default=10.0, metavar="WEIGHT",
        help="of the match loss (10; the authors' later code: 0.01)")
    add("--adversarial-weight", type=float, default=1.0, metavar="WEIGHT",
        help="of the adversarial loss and feature matching, e.g. 6 beside the face term, see the card (1)")
    add("--grow-from", metavar="FILE",
        help="start from a step-N.pt of the same sizes; or, for 128 pixels, of 64 and twice --min-channels")
    add("--fix-embedder", action="store_true", help="with --grow-from: E stays as it is there, see teach.py")
    add("--save-every", type=int, default=1000, metavar="N",
        help="steps between checkpoints, of which two stay, and sample grids (1000)")
    add("--resume", action="store_true", help="go on from the newest complete checkpoint in --out")
    add("--seed", type=int, default=0, help="of the networks and the data (0)")
    if parser.parse_known_args()[0].toy:
        parser.set_defaults(**TOY)
    args = parser.parse_args()
    if args.steps is None and args.epochs is None and args.toy:
        args.steps = TOY_STEPS
    if args.epochs is None:
        args.epochs = 150 if args.no_match else 75
    check(args)
    return args


def check(args):
    check_paths([args.vgg19, args.vggface, args.grow_from])
    for name in ("ema", "stills"):
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(f"--{name} {getattr(args, name)}: 0 to 1 is needed")
    check_least(args, 0, "seed", "face", "face_vector", "match_weight", "adversarial_weight")
    if args.fix_embedder and not args.grow_from:
        raise UserError("--fix-embedder: from which checkpoint? --grow-from is needed")
    if args.face and args.vggface:
        raise UserError("--face stands in for VGGFace: leave it out, or --vggface")
    if not args.toy and Path(args.out).resolve().is_relative_to(Path(args.data).resolve()):
        raise UserError(f"--out {args.out}: inside --data, checkpoints would be taken for sequences")
    for name in ("epochs", "steps", "batch", "K", "save_every", "lr", "lr_d", "psi_gain"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value}: more than 0 is needed")


def find_device(local_rank):
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"{local_rank + 1} ranks or more on this machine, but only "
                        f"{torch.cuda.device_count()} GPUs")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def find_data(args, rank, world):
    """-> the run's Config, the episodes of this rank, eight more for the sample grids, the steps to take."""
    slots, rest = divmod(args.batch, world)
    if rest:
        raise UserError(f"--batch {args.batch} cannot be shared evenly by {world} ranks")
    if args.toy:
        videos, shown = ToyHeads(1000, args.image_size), ToyHeads(8, args.image_size, first=1000)
    else:
        videos = shown = PreparedVideos(args.data, args.image_size)
    flags = {field.name: getattr(args, field.name) for field in fields(Config) if hasattr(args, field.name)}
    config = Config(num_videos=len(videos), landmarks=videos.detector, match=not args.no_match, **flags)
    episodes = Episodes(videos, args.K, slots, seed=args.seed, rank=rank, world=world, config=config)
    examples = Episodes(shown, args.K, slots=8, seed=args.seed + 1)
    steps = args.steps or math.ceil(args.epochs * len(videos) / args.batch)
    return config, episodes, examples, steps


def make_networks(config, rows, seed, rank, device):
    """E, G, D: under one seed equal on every rank, but for D's W, which is a rank's own."""
    layout = dict(device=device, memory_format=torch.channels_last)  # a quarter faster
    torch.manual_seed(seed)
    E = Embedder(config).to(**layout)
    G = Generator(config).to(**layout)
    D = Discriminator(replace(config, num_videos=rows)).to(**layout)
    torch.manual_seed(seed + 1 + rank)  # only now do the ranks part
    D.reset_rows()
    return E, G, D


def main():
    # devices
    args = parse()
    rank, world, local_rank = find_ranks()
    device = find_device(local_rank)

    # data
    config, episodes, examples, steps = find_data(args, rank, world)
    run_id = {"seed": args.seed, "batch": args.batch, "ranks": world, "data": episodes.videos.name,
              "--vgg19": args.vgg19 and os.path.basename(args.vgg19),
              "--vggface": args.vggface and os.path.basename(args.vggface)}
    done = open_run(args.out, args.resume)
    content = ContentLoss(args.content, args.vgg19, args.vggface, args.face, args.face_vector).to(device)
    if world > 1:
        join_ranks("nccl" if device.type == "cuda" else "gloo", rank, world)

    # networks
    E, G, D = make_networks(config, episodes.rows, args.seed, rank, device)
    optimizers = make_optimizers(E, G, D, config)
    averages = (copy.deepcopy(E), copy.deepcopy(G)) if config.ema else (E, G)

    # resume
    training = Training(args.out, config, run_id, (E, G, D), averages, optimizers, rank, world, device)
    start = restore(training)
    if start >= steps:
        print(f"{args.out} is finished: step {start} of {steps}")
        return dist.destroy_process_group() if world > 1 else None
    if rank == 0:
        clear(args.out, keep=[step for step in done if step <= start])
    if args.grow_from and not start:
        grow(E, G, D, args.grow_from, config, episodes)
        update_average(averages, (E, G), decay=0.0)
    E.requires_grad_(not config.fix_embedder)
    only = [local_rank] if device.type == "cuda" else None
    # A.4: gradients are reduced "only for the generator and the embedder"; D is each rank's own
    E_ddp = DDP(E, device_ids=only) if world > 1 and not config.fix_embedder else E
    G_ddp = DDP(G, device_ids=only) if world > 1 else G

    # loop
    log = Log(f"{args.out}/log.csv", start, steps) if rank == 0 else None
    match_weight = config.match_weight if config.match else 0.0
    with Signals() as signals:
        for step, (row, x, y, waited) in enumerate(batches(episodes, start, steps, device), start + 1):
            values = train_step(E_ddp, G_ddp, D, content, optimizers, row, x, y,
                                match_weight, config.adversarial_weight)
            if config.ema:
                decay = min(config.ema, step / (step + 10))     # short at first: the random start fades
                update_average(averages, (E, G), decay)
            stopping = any_rank([bool(signals.came)], world, device)[0]
            saving = step % args.save_every == 0 or step == steps or stopping
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
        signals.leave(f"stopped at step {step} of {steps}, saved in {args.out}: go on with --resume")


if __name__ == "__main__":
    run(main)
