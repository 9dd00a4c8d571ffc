"""A.1, Table 2: how long few-shot learning and the generation of a frame take (evaluate.py --timing)."""
import statistics
import time

import torch

from data import to_float, to_tensors
from evaluation.report import AS_PAPER, FF
from runtime.checkpoint import load_networks
from runtime.device import fast_dtype

PAPER = {  # Table 2, in seconds, by method and T
    (FF, 1): 0.061, (FF, 8): 0.138, (FF, 32): 0.221,
    (AS_PAPER, 1): 43.84, (AS_PAPER, 8): 85.48, (AS_PAPER, 32): 258.0}
PAPER_FRAME = 0.139     # seconds for a frame


def median_seconds(function, repeats):
    """The median time of a call in seconds, after one call to warm up, with the device synchronised."""
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
    """Table 2 in markdown: the seconds that learning takes for each T in `shots`, and those of a frame.

    state: a loaded checkpoint.  content: a ContentLoss.
    frames uint8 (n, S, S, 3), points (n, 68, 2): of a person. They are repeated if T is larger than n.
    finetune, epochs: finetune.finetune() and its number of epochs.
    """
    x, y = (to_float(images, device) for images in to_tensors(frames, points))  # (n, 3, S, S)
    config, name = state["config"], device
    if device == "cuda":
        name = torch.cuda.get_device_name()
    elif device == "cpu":
        name = f"{torch.get_num_threads()} CPU threads"
    head = f"| {config.image_size} pixels | this code, {name} | the paper, 256 pixels, P40 |"
    lines = [head, "|---|---|---|"]

    # (1) few-shot learning
    for method, passes, repeats in ((FF, 0, 20), (AS_PAPER, epochs, 3)):
        for T in shots:
            nets, pick = load_networks(state), torch.arange(T) % len(x)

            def learn():
                finetune(*nets, x[pick], y[pick], config, content, epochs=passes, as_paper=True)
            paper = f"{PAPER[method, T]} s" if (method, T) in PAPER else ""
            seconds = median_seconds(learn, repeats)
            lines.append(f"| few-shot learning, {method} ({T}) | {seconds:.3f} s | {paper} |")

    # (2) a frame, generated as in infer.render
    E, G, D = load_networks(state)
    psi, *_ = finetune(E, G, D, x[:1], y[:1], config, content, epochs=0)
    dtype = fast_dtype(device)
    G = G.fold().to(dtype=dtype, memory_format=torch.channels_last)
    y_t = y[:1].to(dtype)
    with torch.inference_mode():
        seconds = median_seconds(lambda: G.render(y_t, psi[None]), 50)
    return "\n".join(lines + [f"| a frame | {seconds:.4f} s | {PAPER_FRAME} s |"])
