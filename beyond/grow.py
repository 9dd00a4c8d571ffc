"""Start a training from a smaller checkpoint: a network of 64 pixels is inside one of 128.

The blocks of a 128-pixel network with widths 16 to 256 are those of a 64-pixel one with widths 32 to 256,
and one more outside. (From 128 to 256 it is not so: G's encoder ends in 16x16 there, and gains no block.)
So `meta_train.py --grow-from step-N.pt` copies what fits and leaves the outer blocks fresh; but the new first
block of E, V and G's encoder passes the halved picture on, and the next one sees what it saw as the first.
"""
import re

import torch
from torch import nn

from data import to_float, to_tensors
from model import load_checkpoint
from runtime.files import UserError


@torch.no_grad()
def grow(E, G, D, path, config, episodes):
    """Fill E, G, V, w0 and b from a checkpoint of the same size, or of 64 for 128 pixels; W from E itself.

    config, episodes: of the new run, the latter this rank's. UserError where sizes or widths do not fit.
    """
    # the old tensors, under their new names: blocks are numbered from the outside
    state = load_checkpoint(path)
    was = state["config"]
    shift = int((was.image_size, config.image_size) == (64, 128))
    widths = config.min_channels << shift, config.max_channels
    if config.image_size != was.image_size << shift or widths != (was.min_channels, was.max_channels):
        raise UserError(
            f"--grow-from {path}: it has {was.image_size} pixels and {was.min_channels} to {was.max_channels}"
            " channels; all the same is needed, or for 128 pixels 64 and twice --min-channels")
    if config.psi_gain != was.psi_gain:
        raise UserError(f"--grow-from {path}: it was made with --psi-gain {was.psi_gain:g}, "
                        "which P goes with")
    renumbered = lambda m: f"{m[1]}.{int(m[2]) + shift}."
    old = {re.sub(r"^(E\.net\.blocks|V\.blocks|G\.down)\.(\d+)\.", renumbered, key): value
           for key, value in state.items() if torch.is_tensor(value)}

    # what fits is copied
    copied = 0
    for prefix, net in (("E.", E), ("G.", G), ("V.", D.V)):
        for key, new in net.state_dict(prefix=prefix).items():  # the parameters themselves
            if key not in old:
                continue
            if key.startswith("G.P.") and new.ndim:
                old[key] = padded(old[key], len(new))           # psi_hat of the new layers: zeros
            if old[key].shape == new.shape:
                new.copy_(old[key])
                copied += new.numel()
    D.w0.copy_(old["w0"])
    D.b.copy_(old["b"])
    if shift:
        see_through(E.net.blocks, old, "E.net.blocks.1", c=6)
        see_through(D.V.blocks, old, "V.blocks.1", c=6)
        see_through(G.down, old, "G.down.1", c=3)
    embed_rows(E, D, episodes)
    print(f"{copied / 1e6:.1f} million numbers of the networks are from {path}")


def padded(tensor, rows):
    """Zeros below, up to `rows` rows; a vector that is not P's output is as long already."""
    missing = max(0, rows - len(tensor))
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])


def see_through(blocks, old, name, c):
    """Let the second block see what it saw as the first: c channels before it are the halved input, plus 1.

    That is 0 or more, so that the ReLU which the second block now begins with lets all of it through.
    The other channels are fresh, and read by nobody yet. old[name + ...]: the second block as it was.
    """
    outer, inner = blocks[0], blocks[1]
    raw = lambda conv: conv.parametrizations.weight.original

    # the new first block: its input, halved by the pooling, plus 1
    raw(outer.conv2)[:c] = 0
    outer.conv2.bias[:c] = 0
    raw(outer.skip).mul_(0.1)   # so that the identity has the largest singular value
    raw(outer.skip)[:c] = torch.eye(c)[..., None, None]
    outer.skip.bias[:c] = 1

    # the second block: the old weights on these channels, and a bias that takes the 1 away again
    for conv, key in ((inner.conv1, f"{name}.conv1."), (inner.skip, f"{name}.skip.")):
        part = lambda end: old[f"{key}parametrizations.weight.{end}"].float()
        weight, u, v = part("original"), part("0._u"), part("0._v")
        raw(conv)[:] = 0
        raw(conv)[:, :c] = weight
        normalised = weight / (u @ weight.flatten(1) @ v)       # by spectral normalisation
        conv.bias.copy_(old[f"{key}bias"] - normalised.sum((1, 2, 3)))
    for conv in (outer.conv2, outer.skip, inner.conv1, inner.skip):  # the power iteration starts anew
        conv.parametrizations.weight[0]._power_method(raw(conv).flatten(1), 30)
    if not isinstance(inner.norm1, nn.Identity):
        # landmarks are lines on black: -1 + 0.04 on average, with a deviation of 0.25
        inner.norm1.weight[:c] = 0.25
        inner.norm1.bias[:c] = 0.04


def embed_rows(E, D, episodes):
    """W_i = the mean of E on two frames of video i: E is not fresh, and L_MCH wants them to agree."""
    E.eval()
    for row in range(episodes.rows):
        try:
            frames, points = episodes.videos.load(episodes.video(row), lambda count: [0, count // 2])
        except UserError:
            continue    # a damaged file, of which Episodes warns
        x, y = (to_float(part, D.W.device) for part in to_tensors(frames, points))
        D.W[row] = E(x, y).mean(0)
    E.train()
