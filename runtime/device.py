"""Which device, where bfloat16 is fast on it, and how much of the machine is left to this process."""
import math
import os
from pathlib import Path

import torch

from runtime.files import UserError


def default_device():
    """CUDA, else Apple's MPS (untested here), else the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def device_of_rank(local_rank):
    """The GPU of a rank on this machine, or the CPU without GPUs. UserError where there are too few."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"{local_rank + 1} ranks or more on this machine, but only "
                        f"{torch.cuda.device_count()} GPUs")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def fast_dtype(device):
    """bfloat16 where the device multiplies it fast, float32 elsewhere.

    Fast are CUDA from Ampere on, and CPUs with AMX or avx512_bf16: a training step takes 0.6 of the time.
    """
    kind = torch.device(device).type
    fast = False
    if kind == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif kind == "cpu":
        can = getattr(torch.cpu, "get_capabilities", dict)()
        fast = can.get("amx_bf16", False) or can.get("avx512_bf16", False)
    return torch.bfloat16 if fast else torch.float32


def autocast(device):
    """A context in which a training computes in fast_dtype(device) where it may; weights stay float32."""
    enabled = fast_dtype(device) == torch.bfloat16
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled)


# --------------------------------------------------------------------- what is left to this process

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
CACHES = "active_file", "inactive_file"     # what memory.stat says of files that were read


def usable_cores():
    """How many cores this process may use, fewer than the machine has by its affinity or in its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in control_groups("cpu"):
        limit = numbers(group / "cpu.max") or (numbers(group / "cpu.cfs_quota_us")
                                               + numbers(group / "cpu.cfs_period_us"))
        if len(limit) == 2 and limit[0] > 0:        # microseconds of a period, -1 for all of it
            cores = min(cores, max(1, limit[0] / limit[1]))
    return int(cores)


def free_memory():
    """How many bytes are left to this process, on the machine or in its container; infinite if unknown."""
    free = 1024 * counts(PROC / "meminfo").get("MemAvailable:", math.inf)
    for group in control_groups("memory"):
        limit = numbers(group / "memory.max") or numbers(group / "memory.limit_in_bytes")
        used = numbers(group / "memory.current") or numbers(group / "memory.usage_in_bytes")
        if limit and used:
            stat = counts(group / "memory.stat")
            cached = sum(stat.get(f"total_{name}", stat.get(name, 0)) for name in CACHES)
            free = min(free, limit[0] - used[0] + cached)       # what is cached is given up in need
    return free


def control_groups(controller):
    """The folders of this process's control groups and of those around them, of version 1 and 2 (cgroups(7)).

    Not all need be there: in a container the outermost one is its own.
    """
    groups = []
    for line in text(PROC / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            top = GROUPS / controller if controllers else GROUPS
            own = top / path.lstrip("/")
            groups += [group for group in (own, *own.parents) if group.is_relative_to(top)]
    return groups


def text(path):
    """What a file of the system says; nothing where there is none."""
    try:
        return path.read_text()
    except OSError:
        return ""


def numbers(path):
    return [math.inf if word == "max" else float(word) for word in text(path).split()]


def counts(path):
    """{name: number} of a file with a line for each."""
    rows = (line.split() for line in text(path).splitlines())
    return {row[0]: float(row[1]) for row in rows}
