"""Which device to use, whether bfloat16 is fast on it, and how many cores and how much memory are free."""
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
    """-> the torch.device of a rank on this machine: its GPU, or the CPU if there are no GPUs.

    Raises UserError if there are fewer GPUs than ranks.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        raise UserError(f"this machine has only {gpus} GPUs: use torchrun --nproc_per_node {gpus}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def fast_dtype(device):
    """torch.bfloat16 if the device computes with it fast, else torch.float32.

    It is fast on CUDA GPUs since Ampere, and on CPUs with AMX or avx512_bf16.
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
    """A context in which training computes in fast_dtype(device). The weights stay float32."""
    enabled = fast_dtype(device) == torch.bfloat16
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled)


# ------------------------------------------------------------------------------ free cores and memory

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
CACHES = "active_file", "inactive_file"     # the page cache in memory.stat


def usable_cores():
    """The number of cores that this process may use, given its affinity and the limits of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in control_groups("cpu"):
        limit = numbers(group / "cpu.max") or (numbers(group / "cpu.cfs_quota_us")
                                               + numbers(group / "cpu.cfs_period_us"))
        if len(limit) == 2 and limit[0] > 0:        # microseconds per period; -1 means no limit
            cores = min(cores, max(1, limit[0] / limit[1]))
    return int(cores)


def free_memory():
    """The number of free bytes for this process on the machine and in its container; infinite if unknown."""
    free = 1024 * counts(PROC / "meminfo").get("MemAvailable:", math.inf)
    for group in control_groups("memory"):
        limit = numbers(group / "memory.max") or numbers(group / "memory.limit_in_bytes")
        used = numbers(group / "memory.current") or numbers(group / "memory.usage_in_bytes")
        if limit and used:
            stat = counts(group / "memory.stat")
            cached = sum(stat.get(f"total_{name}", stat.get(name, 0)) for name in CACHES)
            free = min(free, limit[0] - used[0] + cached)       # the system can free its cache
    return free


def control_groups(controller):
    """The folders of this process's control groups and of all groups that contain them; see cgroups(7).

    Versions 1 and 2 are supported. Some folders may not exist, because a container sees its own group as the
    outermost one.
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
    """The content of a system file, or "" if it does not exist."""
    try:
        return path.read_text()
    except OSError:
        return ""


def numbers(path):
    """The numbers in a system file, with infinity for "max"."""
    return [math.inf if word == "max" else float(word) for word in text(path).split()]


def counts(path):
    """-> {name: number} from a system file that has a name and a number in each line."""
    rows = (line.split() for line in text(path).splitlines())
    return {row[0]: float(row[1]) for row in rows}
