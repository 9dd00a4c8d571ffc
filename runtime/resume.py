"""Saving and resuming a training run, its log and its signals, and agreement between its ranks.

Step N is complete once step-N.pt exists, because every rank R writes its step-N.rank-R.state before that.
"""
import csv
import os
import re
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from runtime.checkpoint import load_checkpoint, save_checkpoint
from runtime.files import (UserError, atomic, forget_lost_terminal, make_folder, raise_if_out_of_memory,
                           save_tensors, warn)

LOG_EVERY = 50  # steps
# The values that train_step() returns: L_CNT, the two terms of L_ADV (-D and L_FM), L_MCH, L_DSC, and the
# mean norms of embeddings and of rows of W.
LOGGED = ["cnt", "adv", "fm", "mch", "dsc", "|e|", "|W|"]
COLUMNS = ["step", *LOGGED, "samples/s", "wait%"]


class Training(NamedTuple):
    """What one rank saves and restores."""
    out: str            # the run's folder
    config: object      # a Config
    run: dict           # plain values that describe the run; --resume compares these and the config
    nets: tuple         # E, G, D
    averages: tuple     # the averages of E and G, which the checkpoints hold
    optimizers: list
    rank: int
    world: int
    device: object


# --------------------------------------------------------------------------------------------- the files

def open_run(out, resume, rank):
    """Make the folder of a run -> the steps of its checkpoints, ascending.

    Rank 0 warns if there is nothing to resume. Raises UserError if there are checkpoints without --resume, or
    the folder cannot be made.
    """
    done = checkpoints(out)
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"    # by torchrun, after a failure
    if done and not resume and not restarted:
        raise UserError(f"{out} already holds {len(done)} checkpoints: add --resume, or name another --out")
    if resume and not done and rank == 0:
        warn(f"there is no checkpoint to resume in {out}, so a new run starts")
    make_folder(out)
    return done


def checkpoints(out):
    """-> the steps of the complete checkpoints in `out`, ascending."""
    names = (re.fullmatch(r"step-(\d+)\.pt", file.name) for file in Path(out).glob("step-*.pt"))
    return sorted(int(name[1]) for name in names if name)


def clear(out, keep):
    """Delete temporary files that a killed run has left, and all steps but those in `keep`."""
    for end in ("pt", r"rank-\d+\.state"):  # the .pt first, because a step without it is incomplete
        for file in Path(out).glob("step-*"):
            match = re.fullmatch(rf"step-(\d+)\.{end}(\.[0-9a-f]{{16}}\.tmp)?", file.name)
            if match and (match[2] or int(match[1]) not in keep):
                file.unlink()


def save_step(training, step):
    """Save a step: first the state of every rank, then, after a barrier, the checkpoint by rank 0.

    Only the last two steps are kept.
    """
    out, rank, world = training.out, training.rank, training.world
    E, G, D = training.nets
    state = {"D": D.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in training.optimizers]}
    if training.run["ema"]:
        state["nets"] = [E.state_dict(), G.state_dict()]
    save_tensors(state, f"{out}/step-{step}.rank-{rank}.state")
    if world > 1:
        dist.barrier()
    if rank == 0:
        average_E, average_G = training.averages
        parts = {"E": average_E, "G": average_G, "V": D.V, "w0": D.w0, "b": D.b}
        save_checkpoint(f"{out}/step-{step}.pt", "meta", training.config, step, training.run, **parts)
        clear(out, keep=checkpoints(out)[-2:])
    if world > 1:
        dist.barrier()      # no rank may exit before the checkpoint exists


def restore(training):
    """Load networks and optimizers from the newest step that all ranks can read -> the step, or 0."""
    step, ckpt, state = newest_step(training)
    if not step:
        return 0
    (E, G, D), (average_E, average_G) = training.nets, training.averages
    average_E.load_state_dict({k[2:]: v for k, v in ckpt.items() if k.startswith("E.")})
    average_G.load_state_dict({k[2:]: v for k, v in ckpt.items() if k.startswith("G.")})
    if training.run["ema"]:     # then the checkpoint has the averages, and the state has the networks
        E.load_state_dict(state["nets"][0])
        G.load_state_dict(state["nets"][1])
    D.load_state_dict(state["D"])
    for optimizer, saved in zip(training.optimizers, state["optimizers"]):
        optimizer.load_state_dict(saved)
    return step


def newest_step(training):
    """-> (step, checkpoint, state) of the newest step that all ranks can read; (0, None, None) without steps.

    Ends all ranks, with a UserError on rank 0, if no step can be read or the run has other settings.
    """
    out, steps, advice = training.out, checkpoints(training.out), None
    for step in reversed(steps):
        path = f"{out}/step-{step}.rank-{training.rank}.state"
        ckpt, state = read_step(training, step, path)
        flags = [state is None, ckpt is not None, not os.path.exists(path)]
        unreadable, usable, missing = any_rank(flags, training.world, training.device)
        if not unreadable:
            return step, ckpt, state
        if usable and not advice:       # from the newest step that has a checkpoint
            advice = f"start a new run from {out}/step-{step}.pt with --grow-from and another --out"
            if missing:
                advice = (f"every rank's step-{step}.rank-R.state is needed beside step-{step}.pt: if the "
                          f"run was copied here, copy these files, too; or {advice}")
    if not steps:
        return 0, None, None
    advice = advice or "name another --out to start again"
    raise shared_error(training.rank, f"none of the checkpoints in {out} can be resumed: {advice}")


def read_step(training, step, path):
    """-> (checkpoint, this rank's state) of a complete step, with None for a file that cannot be read.

    path: of the state. Ends all ranks, with a UserError on rank 0, if the checkpoint has other settings than
    this run. All ranks read the same checkpoint, so they agree.
    """
    try:
        ckpt = load_checkpoint(f"{training.out}/step-{step}.pt", training.device)
    except UserError as e:
        warn(f"step {step} cannot be resumed: {e}")
        return None, None
    was, now = vars(ckpt["config"]) | ckpt["run"], vars(training.config) | training.run
    changed = [f"{k} was {was.get(k)}, now {v}" for k, v in now.items() if was.get(k) != v]
    if changed:
        advice = (f"Use the same settings again, or start a new run from {training.out}/step-{step}.pt with "
                  "--grow-from and another --out")
        raise shared_error(training.rank,
                           f"{training.out} cannot be resumed: {'; '.join(changed)}. {advice}")
    try:
        return ckpt, torch.load(path, map_location=training.device, weights_only=True)
    except Exception as e:  # torch.load raises a dozen types for damaged files
        raise_if_out_of_memory(e)
        reason = "is missing" if isinstance(e, FileNotFoundError) else "is damaged"
        warn(f"step {step} cannot be resumed: {path} {reason}")
        return ckpt, None


def shared_error(rank, message):
    """-> the exception to raise for an error on all ranks: all exit, but only rank 0 prints the message."""
    return UserError(message) if rank == 0 else SystemExit(2)


# --------------------------------------------------------------------------------------------- the ranks

def find_ranks():
    """-> rank, number of ranks, and rank on this machine, as torchrun sets them; 0, 1, 0 without torchrun."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise UserError(f"WORLD_SIZE={world} is set, but not all variables of torchrun: start this with "
                        "torchrun, or unset WORLD_SIZE")
    return int(os.environ.get("RANK", 0)), world, int(os.environ.get("LOCAL_RANK", 0))


def join_ranks(backend, rank, world):
    """Start the process group.

    All restarts by torchrun share one store, so each restart gets keys of its own in it. Otherwise a rank can
    find the address of a rank that has died, and wait forever (PyTorch issue 135712). With several nodes this
    is left out, because each node counts its own restarts.
    """
    # torch 2.14 renames this argument of DDP, but torch 2.5 does not know the new name
    warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
    store, _, _ = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore("restart " + os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)


def any_rank(flags, world, device):
    """-> [bool]: for each of these flags, whether it is set on any rank, so that all ranks act alike."""
    flags = torch.tensor(flags, dtype=torch.float32, device=device)
    if world > 1:
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return [flag > 0 for flag in flags.tolist()]


def check_finite(values, weights, step, out, world):
    """Raise UserError on all ranks if a loss or a weight is NaN or infinite on any of them."""
    finite = {name: bool(value.isfinite()) for name, value in values.items()}
    if weights:
        finite["a weight"] = all(torch.isfinite(w).all() for w in weights)
    wrong = any_rank([not f for f in finite.values()], world, values["cnt"].device)
    bad = [name for name, is_wrong in zip(finite, wrong) if is_wrong]
    if not bad:
        return
    good = checkpoints(out)
    advice = "There is no checkpoint yet: start"
    if good:
        advice = (f"The last good checkpoint is {out}/step-{good[-1]}.pt: continue from it with --resume. "
                  "If this happens again, start")
    raise UserError(f"step {step}: {', '.join(bad)} is NaN or infinite. {advice} a new run with a lower --lr "
                    "and --lr-d in another --out")


# ------------------------------------------------------------------------------------------- the signals

class Signals:
    """A context in which SIGTERM, SIGINT, SIGHUP are only noted in `came`, so that the loop can save.

    came: [(number, time)] of the signals so far.
    A signal that is ignored stays ignored, such as SIGHUP under nohup. A signal more than 3 seconds after the
    first one ends the process at once. Earlier ones do not, because clusters send the first one twice.
    """

    def __enter__(self):
        self.came = []
        heard = [number for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
                 if signal.getsignal(number) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self.note) for number in heard}
        return self

    def note(self, number, frame):
        forget_lost_terminal()
        if self.came and time.time() - self.came[0][1] > 3:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.came.append((number, time.time()))

    def leave(self, words):
        """Exit with the code of the signal, or with SIGTERM's if only another rank received one."""
        print(words, file=sys.stderr)
        sys.exit(128 + (self.came[0][0] if self.came else signal.SIGTERM))

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def worker_signals(worker):
    """Keep a loader's worker alive for 5 seconds after SIGTERM, and let it ignore SIGINT and SIGHUP.

    The main process, which receives the same signals, may need one more batch before it saves.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, lambda number, frame: os._exit(0))
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(5))


# ------------------------------------------------------------------------------------------------ the log

class Log:
    """Prints the means over the steps since the last line, and appends them to a CSV file."""

    def __init__(self, path, start, total):
        self.path, self.start, self.total = path, start, total
        self.values, self.waited = [], 0.0
        self.began = self.since = time.time()
        self.last_step = start
        lines = Path(path).read_text().splitlines()[1:] if start and os.path.exists(path) else []
        rows = [line.split(",") for line in lines]
        whole = [row for row in rows if len(row) == len(COLUMNS)]   # a killed run can leave half a row
        rows = [row for row in whole if int(row[0]) <= start]
        with atomic(path) as temporary, open(temporary, "w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
        print("".join(f"{c:>10}" for c in COLUMNS) + f"{'ETA':>10}", flush=True)

    def add(self, values, waited):
        """Add a step. values: the result of train_step().  waited: seconds until its batch was loaded."""
        self.values.append(torch.stack([values[name] for name in LOGGED]))
        self.waited += waited

    def write(self, step, samples_per_step):
        """Write a line for the steps that were added since the last one."""
        # the numbers
        now = time.time()
        seconds, steps = max(now - self.since, 1e-9), step - self.last_step
        means = torch.stack(self.values).mean(0).tolist()
        rate, wait = steps * samples_per_step / seconds, 100 * self.waited / seconds
        row = [step, *(f"{m:.4f}" for m in means), f"{rate:.1f}", f"{wait:.0f}"]
        # on the screen
        eta = int((now - self.began) / (step - self.start) * (self.total - step))
        eta = f"{eta // 3600:>4}:{eta // 60 % 60:02}:{eta % 60:02}"
        print("".join(f"{v:>10}" for v in row) + eta, flush=True)
        # in the file
        try:
            with open(self.path, "a", newline="") as file:
                csv.writer(file).writerow(row)
        except OSError as e:
            raise UserError(f"cannot write {self.path}: {e.strerror}") from None
        self.values, self.since, self.waited, self.last_step = [], now, 0.0, step
