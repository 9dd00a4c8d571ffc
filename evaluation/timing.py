"""A.1, Table 2: how long few-shot learning takes, and a frame (evaluate.py --timing)."""
import statistics
import time

import torch

from beyond.likeness import other_poses
from data import to_float, to_tensors
from evaluation.report import AFTER, FF
from model import load_networks
from runtime.device import fast_dtype

PAPER = {  # Table 2, seconds
    (FF, 1): 0.061, (FF, 8): 0.138, (FF, 32): 0.221,
    (AFTER, 1): 43.84, (AFTER, 8): 85.48, (AFTER, 32): 258.0}
PAPER_FRAME = 0.139


def median_seconds(function, repeats):
    """After one run to warm up, with the device synchronised."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        elif torch.backends.mps.is_available():
            torch.mps.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def timing(state, content, frames, points, shots, device, finetune, epochs):
    """Table 2 in markdown: seconds of few-shot learning and of a frame.

    frames uint8 (n, S, S, 3), points (n, 68, 2): repeated up to T frames.
    finetune, epochs: finetune.finetune() and its number of epochs.
    """
    x, y = (to_float(part, device) for part in to_tensors(frames, points))      # (n, 3, S, S)
    config, name = state["config"], device
    if device == "cuda":
        name = torch.cuda.get_device_name()
    elif device == "cpu":
        name = f"{torch.get_num_threads()} CPU threads"
    head = f"| {config.image_size} pixels | ours, {name} | the paper: 256 pixels, P40 |"
    lines = [head, "|---|---|---|"]

    # few-shot learning
    for method, passes, repeats in ((FF, 0, 20), (AFTER, epochs, 3)):
        for T in shots:
            nets, pick = load_networks(state), torch.arange(T) % len(x)

            def learn():
                others = other_poses(x[pick], list(points[pick, None]), content) if passes else None
                finetune(*nets, x[pick], y[pick], config, content, epochs=passes, others=others)
            paper = f"{PAPER[method, T]} s" if (method, T) in PAPER else ""
            seconds = median_seconds(learn, repeats)
            lines.append(f"| few-shot learning, {method} ({T}) | {seconds:.3f} s | {paper} |")

    # a frame, as in infer.render
    E, G, D = load_networks(state)
    psi, *_ = finetune(E, G, D, x[:1], y[:1], config, content, epochs=0)
    dtype = fast_dtype(device)
    G = G.fold().to(dtype=dtype, memory_format=torch.channels_last)
    picture = y[:1].to(dtype)
    with torch.inference_mode():
        seconds = median_seconds(lambda: G.render(picture, psi[None]), 50)
    return "\n".join(lines + [f"| a frame | {seconds:.4f} s | {PAPER_FRAME} s |"])
