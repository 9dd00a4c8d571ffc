"""Stage 1, Sec. 3.2: meta-learning of E, G and D on a prepared folder of many people's videos.

    torchrun --nproc_per_node 8 meta_train.py --data prepared --out runs/meta     # the paper: 256 pixels, 8 GPUs
    python meta_train.py --toy                                                    # drawn heads, minutes on a CPU
    python meta_train.py ... --resume                                             # go on after a stop, exactly

Writes to --out: step-N.pt (what finetune.py and infer.py read), step-N.rank-R.state (for --resume), log.csv and
samples-N.png (rows of source, landmarks, target, result). The defaults are the paper's;
its content loss needs --vgg19 and --vggface.
"""
import argparse
import copy
import math
import os
import signal
import sys
import time
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader

from data import Episodes, PreparedVideos, to_float, to_uint8
from files import UserError, atomic, check_paths, run
from losses import (BETAS, FM_WEIGHT, MATCH_WEIGHT, ContentLoss, adversarial_loss, feature_matching_loss, hinge_loss, match_loss)
from model import Config, Discriminator, Embedder, Generator, autocast
from resume import Log, any_rank, check_finite, checkpoints, clear, join, newest, on_signal, save, worker_signals
from toy import ToyHeads

LOG_EVERY = 50
TOY = dict(image_size=64, min_channels=32, max_channels=128, K=4, batch=8, content="l1", lr=3e-4, lr_d=3e-4,
           save_every=300, out="runs/toy")
TOY_STEPS = 1500


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="prepared", metavar="DIR", help="folder that data.py prepared (default: prepared)")
    add("--out", default="runs/meta", metavar="DIR", help="folder of this run (default: runs/meta)")
    add("--toy", action="store_true", help=f"drawn heads and small networks; changes the defaults to {TOY_STEPS} steps and {TOY}")
    add("--epochs", type=int, help="an epoch draws as many episodes as there are videos (75; with --no-match 150)")
    add("--steps", type=int, help="instead of --epochs")
    add("--batch", type=int, default=48, help="episodes per step, over all ranks (48)")
    add("--K", type=int, default=8, help="frames per episode that the embedder sees (8)")
    add("--image-size", type=int, default=256, help="64, 128, 256 or 512 (256)")
    add("--min-channels", type=int, default=64, help="of the first block (64)")
    add("--max-channels", type=int, default=512, help="at most, and the size of an embedding (512)")
    add("--lr", type=float, default=5e-5, help="of E and G (5e-5)")
    add("--lr-d", type=float, default=2e-4, help="of D (2e-4)")
    add("--content", choices=("vgg", "squeeze", "l1"), default="vgg", help="the content loss; the last two for small machines")
    add("--vgg19", metavar="FILE", help="MatConvNet's imagenet-vgg-verydeep-19.mat, the paper's Caffe weights")
    add("--vggface", metavar="FILE", help="MatConvNet's vgg-face.mat")
    add("--ema", type=float, default=0.0, metavar="DECAY", help="checkpoints hold a moving average of E and G, e.g. 0.999 (0: none)")
    add("--by-frames", action="store_true", help="draw sequences in proportion to their frames: folders of few photos less often")
    add("--augment", action="store_true", help="recolour episodes and mirror half of them")
    add("--stills", type=float, default=0.0, metavar="SHARE", help="of the episodes that are made of one frame, warped K + 1 times (0)")
    add("--psi-gain", type=float, default=1.0, help="psi_hat = gain * P e_hat (1)")
    add("--no-match", action="store_true", help="the FF variant: no match loss, and no fine-tuning later")
    add("--save-every", type=int, default=1000, metavar="N", help="steps between checkpoints, of which two stay, and sample grids (1000)")
    add("--resume", action="store_true", help="go on from the newest complete checkpoint in --out")
    add("--seed", type=int, default=0, help="of the networks and the data (0)")
    if parser.parse_known_args()[0].toy:
        parser.set_defaults(**TOY)
    args = parser.parse_args()
    if args.steps is None and args.epochs is None and args.toy:
        args.steps = TOY_STEPS
    if args.epochs is None:
        args.epochs = 150 if args.no_match else 75
    check_paths([args.vgg19, args.vggface])
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: 0 or more is needed")
    for name in ("ema", "stills"):
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(f"--{name} {getattr(args, name)}: 0 to 1 is needed")
    for name in ("epochs", "steps", "batch", "K", "save_every", "lr", "lr_d", "psi_gain"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value}: more than 0 is needed")
    return args


@torch.no_grad()
def follow(averages, nets, decay):
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
    x, y = to_float(torch.stack(x), device), to_float(torch.stack(y), device)                       # (rows, K+1, 3, S, S)
    e = torch.stack([E.eval()(x[n, 1:], y[n, 1:]).mean(0) for n in range(rows)])                    # (rows, N)
    grid = torch.stack([x[:, 1], y[:, 0], x[:, 0], G.eval()(y[:, 0], e)], dim=1)                    # (rows, 4, 3, S, S)
    E.train(), G.train()
    with atomic(path) as temporary:
        Image.fromarray(np.concatenate(np.concatenate(to_uint8(grid), axis=1), axis=1)).save(temporary, "PNG")


def make_optimizers(E, G, D, config):
    return [torch.optim.Adam([*E.parameters(), *G.parameters()], config.lr, BETAS),
            torch.optim.Adam([*D.V.parameters(), D.w0, D.b], config.lr_d, BETAS),
            torch.optim.SparseAdam([D.W], config.lr_d, BETAS)]  # touches the rows of a batch, not 145 k of them


def train_step(E, G, D, content, optimizers, row, x, y, match=True):
    """One step of Sec. 3.2. row (B,); x, y (B, K+1, 3, S, S) in [-1, 1], the target frame t first. Returns what is logged."""
    optimizer_EG, optimizer_D, optimizer_W = optimizers
    x_t, y_t, x_s, y_s = x[:, 0], y[:, 0], x[:, 1:], y[:, 1:]           # (B, 3, S, S), (B, K, 3, S, S)

    # (1) update E and G: eq. 3
    D.requires_grad_(False)
    with autocast(x.device):
        e = E(x_s.flatten(0, 1), y_s.flatten(0, 1)).unflatten(0, x_s.shape[:2])  # (B, K, N)
        x_hat = G(y_t, e.mean(1)).float()                           # eq. 1 and 2: (B, 3, S, S)
        w_i = D.rows(row)                                           # (B, N)
        fake_score, fake_features = D(x_hat, y_t, w_i + D.w0)       # eq. 5
        with torch.no_grad():
            real_features = D.V(x_t, y_t)[1]
        cnt = content(x_hat, x_t)
        adv = adversarial_loss(fake_score)
        fm = FM_WEIGHT * feature_matching_loss(fake_features, real_features)
        mch = MATCH_WEIGHT * match_loss(e, w_i)
    loss = cnt + adv + fm + (mch if match else 0)
    optimizer_EG.zero_grad()
    loss.backward()
    optimizer_EG.step()

    # (2) update D twice, on the same batch: eq. 6
    D.requires_grad_(True)
    x_both, y_both = torch.cat([x_t, x_hat.detach()]), torch.cat([y_t, y_t])    # real, then generated
    for _ in range(2):
        with autocast(x.device):
            w = D.rows(row) + D.w0
            real_score, fake_score = D(x_both, y_both, torch.cat([w, w]))[0].chunk(2)
        dsc = hinge_loss(real_score, fake_score)
        optimizer_D.zero_grad()
        optimizer_W.zero_grad()
        dsc.backward()
        optimizer_D.step()
        optimizer_W.step()

    norms = e.detach().norm(dim=2).mean(), w_i.norm(dim=1).mean()
    return torch.stack([v.detach().float() for v in (cnt, adv, fm, mch, dsc, *norms)])


def main():
    args = parse()
    rank, world, local = (int(os.environ.get(k, v)) for k, v in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if world > 1 and not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise UserError(f"WORLD_SIZE={world} is set without what torchrun sets beside it: unset it, or start with torchrun")
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(f"{local + 1} ranks or more on this machine, but only {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(device)
    slots, rest = divmod(args.batch, world)
    if rest:
        raise UserError(f"--batch {args.batch} cannot be shared evenly by {world} ranks")
    videos = ToyHeads(1000, args.image_size) if args.toy else PreparedVideos(args.data, args.image_size)
    unseen = ToyHeads(8, args.image_size, first=1000) if args.toy else videos  # the grid of --toy shows unseen heads
    steps = args.steps or math.ceil(args.epochs * len(videos) / args.batch)
    config = Config(args.image_size, args.min_channels, args.max_channels, len(videos), videos.detector, args.content,
                    not args.no_match, args.K, args.lr, args.lr_d, args.ema, args.by_frames, args.augment, args.psi_gain, args.stills)
    episodes = Episodes(videos, args.K, slots, args.seed, rank, world, config)
    examples = Episodes(unseen, args.K, 8, args.seed + 1)
    run_id = {"seed": args.seed, "batch": args.batch, "ranks": world, "data": videos.name}
    done = checkpoints(args.out)
    if done and not args.resume and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":  # torchrun starts a failed run again
        raise UserError(f"{args.out} already holds {len(done)} checkpoints: add --resume, or name another --out")
    try:
        os.makedirs(args.out, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot write to --out {args.out}: {e.strerror}") from None
    content = ContentLoss(args.content, args.vgg19, args.vggface).to(device)
    if world > 1:
        join("nccl" if device.type == "cuda" else "gloo", rank, world)
    start, ckpt, state = newest(args.out, config, run_id, rank, world, device)
    if start >= steps:
        print(f"{args.out} is finished: step {start} of {steps}")
        return dist.destroy_process_group() if world > 1 else None
    if rank == 0:
        clear(args.out, [step for step in done if step <= start])
    torch.manual_seed(args.seed)            # the networks start equal on every rank ...
    layout = dict(device=device, memory_format=torch.channels_last)  # a quarter faster than contiguous tensors
    E, G = Embedder(config).to(**layout), Generator(config).to(**layout)
    D = Discriminator(replace(config, num_videos=episodes.rows)).to(**layout)
    torch.manual_seed(args.seed + 1 + rank) # ... and only then do the ranks part
    optimizers = make_optimizers(E, G, D, config)
    if start:
        E.load_state_dict({k[2:]: v for k, v in ckpt.items() if k.startswith("E.")})
        G.load_state_dict({k[2:]: v for k, v in ckpt.items() if k.startswith("G.")})
        D.load_state_dict(state["D"])
        for optimizer, was in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(was)
    averages = (copy.deepcopy(E), copy.deepcopy(G)) if config.ema else (E, G)
    if start and config.ema:  # the checkpoint had the averages, the state the networks themselves
        E.load_state_dict(state["nets"][0]), G.load_state_dict(state["nets"][1])
    parallel = {"device_ids": [local] if device.type == "cuda" else None}
    # A.4: gradients are reduced across the GPUs "only for the generator and the embedder"; D stays each rank's own
    E_ddp, G_ddp = (DDP(E, **parallel), DDP(G, **parallel)) if world > 1 else (E, G)

    workers = min(8, max(1, (os.cpu_count() or 2) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))
    loader = iter(DataLoader(episodes, slots, sampler=range(start * slots, steps * slots), num_workers=workers,
                             pin_memory=device.type == "cuda", worker_init_fn=worker_signals))
    log = Log(f"{args.out}/log.csv", start, steps) if rank == 0 else None

    signals = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: on_signal(signals, number))

    for step in range(start + 1, steps + 1):
        waiting = time.time()
        row, x, y = next(loader)                                        # (B,), (B, K+1, 3, S, S) uint8 twice
        waited = time.time() - waiting
        row, x, y = row.to(device), to_float(x, device), to_float(y, device)
        values = train_step(E_ddp, G_ddp, D, content, optimizers, row, x, y, config.match)
        if config.ema:
            follow(averages, (E, G), min(config.ema, step / (step + 10)))       # the start is forgotten sooner
        stopping = any_rank([bool(signals)], world, device)[0]
        saving = step % args.save_every == 0 or step == steps or stopping
        check_finite(values, saving and [*E.parameters(), *G.parameters(), *D.V.parameters()], step, args.out, world)
        if rank == 0:
            log.values.append(values)
            log.waited += waited
            if step % LOG_EVERY == 0 or saving:
                log.write(step, args.batch)

        if saving:
            if rank == 0:
                sample_grid(f"{args.out}/samples-{step}.png", *averages, examples, device)
            save(args.out, step, config, (E, G), averages, D, optimizers, run_id, rank, world)
        if stopping:
            break

    if world > 1:
        dist.destroy_process_group()
    if stopping and step < steps:
        sys.exit(print(f"stopped at step {step} of {steps}, saved in {args.out}: go on with --resume", file=sys.stderr) or 128 + (signals[0][0] if signals else signal.SIGTERM))


if __name__ == "__main__":
    run(main)
