"""What a training run leaves and finds: complete steps, the state of a rank, the log; what all ranks agree on.

A step N is complete when step-N.pt is there: every rank has written its step-N.rank-R.state before.
"""
import csv
import os
import re
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

from files import UserError, atomic, save_tensors, warn
from model import load_checkpoint, save_checkpoint

COLUMNS = ["step", "cnt", "adv", "fm", "mch", "dsc", "|e|", "|W|", "samples/s", "wait%"]


def checkpoints(out):
    """Steps of the complete checkpoints in `out`, ascending: the .pt is renamed last, so where it is, all is."""
    return sorted(int(m[1]) for f in Path(out).glob("step-*.pt") if (m := re.fullmatch(r"step-(\d+)\.pt", f.name)))


def save(out, step, config, nets, averages, D, optimizers, run_id, rank, world):
    """Every rank its state, a barrier, then rank 0 the portable checkpoint; the last two are kept."""
    state = {"run": run_id, "D": D.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
    if config.ema:
        state["nets"] = [net.state_dict() for net in nets]
    save_tensors(state, f"{out}/step-{step}.rank-{rank}.state")
    if world > 1:
        dist.barrier()
    if rank == 0:
        save_checkpoint(f"{out}/step-{step}.pt", "meta", config, step, E=averages[0], G=averages[1], V=D.V, w0=D.w0, b=D.b)
        clear(out, checkpoints(out)[-2:])
    if world > 1:
        dist.barrier()      # nobody leaves before the checkpoint is there


def clear(out, keep):
    """Delete checkpoints but those of the steps in `keep`, and what a killed run left behind."""
    for end in ("pt", r"rank-\d+\.state"):     # the .pt first: without it the rest does not count
        for file in Path(out).glob("step-*"):
            match = re.fullmatch(rf"step-(\d+)\.{end}(\.\d+\.tmp)?", file.name)
            if match and (match[2] or int(match[1]) not in keep):
                file.unlink()


def read_state(out, step, config, run_id, rank, device):
    """The two files of a complete step, None if one is damaged. UserError if they are not of this very run."""
    path = f"{out}/step-{step}"
    try:
        ckpt = load_checkpoint(f"{path}.pt", device)
        state = torch.load(f"{path}.rank-{rank}.state", map_location=device, weights_only=True)
    except Exception as e:  # torch.load raises a dozen types on damaged files
        warn(f"step {step} cannot be resumed by rank {rank}: {e if isinstance(e, UserError) else f'{path}.rank-{rank}.state is damaged'}")
        return None
    was, now = vars(ckpt["config"]) | state["run"], vars(config) | run_id
    changed = [f"{k} was {was.get(k)}, now {v}" for k, v in now.items() if was.get(k) != v]
    if changed:
        raise UserError(f"{out} cannot be resumed: {'; '.join(changed)}")
    return ckpt, state


def newest(out, config, run_id, rank, world, device):
    """(step, checkpoint, state) of the newest step that every rank can read; (0, None, None) where there is none."""
    steps = checkpoints(out)
    for step in reversed(steps):
        saved = read_state(out, step, config, run_id, rank, device)
        if not any_rank([saved is None], world, device)[0]:
            return step, *saved
    if steps:
        raise UserError(f"none of the checkpoints in {out} can be read: name another --out to start anew")
    return 0, None, None


def join(backend, rank, world):
    """The process group. torchrun's restarts share a store, where ranks can meet the addresses of those that died and wait
    for ever (PyTorch's issue 135712): so each has its keys apart. Not on several nodes, which count restarts each for itself."""
    store, _, _ = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore("restart " + os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)


def any_rank(flags, world, device):
    """Each of the flags: is it set on any of the ranks? So that all of them do the same."""
    flags = torch.tensor(flags, dtype=torch.float32, device=device)
    if world > 1:
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return [flag > 0 for flag in flags.tolist()]


def check_finite(values, weights, step, out, world):
    """UserError, on all ranks, if a loss (or where weights are given, one of these) is NaN or Inf on any of them."""
    finite = dict(zip(COLUMNS[1:], values.isfinite().tolist()))
    if weights:
        finite["a weight"] = all(torch.isfinite(w).all() for w in weights)
    bad = [name for name, wrong in zip(finite, any_rank([not f for f in finite.values()], world, values.device)) if wrong]
    if bad:
        good = checkpoints(out)
        raise UserError(f"step {step}: {', '.join(bad)} is NaN or infinite. " + (
            f"The last good checkpoint is {out}/step-{good[-1]}.pt: go on from it with --resume. If it comes again, start"
            if good else "There is no checkpoint yet: start") + " anew with a lower --lr and --lr-d in another --out")


def worker_signals(worker):
    """A loader's worker leaves signals to the main process, which may need one more batch: told to end, it waits seconds."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, lambda number, frame: os._exit(0))
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(5))


def on_signal(signals, number):
    """The first one saves and stops; one that comes seconds later stops at once (clusters send the first one twice)."""
    if signals and time.time() - signals[0][1] > 3:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    signals.append((number, time.time()))


class Log:
    """Means over the steps since the last line, aligned on the screen and as CSV."""

    def __init__(self, path, start, total):
        self.start, self.total, self.values, self.since, self.waited = start, total, [], time.time(), 0.0
        self.began, self.last_step = time.time(), start
        lines = Path(path).read_text().splitlines()[1:] if start and os.path.exists(path) else []
        rows = [row for row in (line.split(",") for line in lines) if len(row) == len(COLUMNS)]  # a kill can leave half of one
        with atomic(path) as temporary, open(temporary, "w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *(row for row in rows if int(row[0]) <= start)])
        self.path = path
        print("".join(f"{c:>10}" for c in COLUMNS) + f"{'ETA':>10}", flush=True)

    def write(self, step, samples_per_step):
        now = time.time()
        seconds, steps = max(now - self.since, 1e-9), step - self.last_step
        means = torch.stack(self.values).mean(0).tolist()
        row = [step, *(f"{m:.4f}" for m in means), f"{steps * samples_per_step / seconds:.1f}", f"{100 * self.waited / seconds:.0f}"]
        eta = int((now - self.began) / (step - self.start) * (self.total - step))
        print("".join(f"{v:>10}" for v in row) + f"{eta // 3600:>4}:{eta // 60 % 60:02}:{eta % 60:02}", flush=True)
        try:
            with open(self.path, "a", newline="") as file:
                csv.writer(file).writerow(row)
        except OSError as e:
            raise UserError(f"cannot write {self.path}: {e.strerror}") from None
        self.values, self.since, self.waited, self.last_step = [], now, 0.0, step
