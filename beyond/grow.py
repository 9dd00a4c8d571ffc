"""Start a training from a checkpoint of the same size, or of half the size.

A 256-pixel network with channels (16, 16, 32, 64, 256) has the blocks of a 128-pixel one with
(16, 32, 64, 256), and one more next to the picture. The same holds for any size and first width. So
`meta_train.py --grow-from step-N.pt` copies what the two have in common. It arranges the new blocks so that
the first pictures are nearly the old ones, enlarged: the new first block of E, V and G's encoder passes on
the halved picture, and the new last block of G passes on what it gets.
"""
import re

import torch
from torch import nn

from data import to_float, to_tensors
from runtime.checkpoint import load_checkpoint
from runtime.files import UserError

QUIET = 0.1     # the factor by which the main path of G's new last block is turned down at first


@torch.no_grad()
def grow(E, G, D, path, config, episodes):
    """Fill E, G, V, w0 and b from a checkpoint of the same or of half the size, and W from E's embeddings.

    config: of the new run.  episodes: this rank's. Raises UserError if sizes or channels do not fit.
    """
    state = load_checkpoint(path)
    was = state["config"]
    same = (was.image_size, was.channels) == (config.image_size, config.channels)
    half = (2 * was.image_size, was.channels) == (config.image_size, config.channels[1:])
    if not same and not half:
        channels = lambda c: " ".join(map(str, c.channels))
        raise UserError(f"--grow-from {path} has {was.image_size} pixels and channels {channels(was)}, this "
                        f"run {config.image_size} and {channels(config)}: use the same, or twice the pixels "
                        "and one more width in front")

    # the old tensors, under their new names: blocks are numbered from the outside
    renumbered = lambda m: f"{m[1]}.{int(m[2]) + half}."
    old = {re.sub(r"^(E\.net\.blocks|V\.blocks|G\.down)\.(\d+)\.", renumbered, key): value
           for key, value in state.items() if torch.is_tensor(value)}
    if half:
        rows = old_rows_of_psi(G, was.channels[0])
        for key in [key for key in old if key.startswith("G.P.")]:
            if len(old[key].shape) and len(old[key]) == len(rows):     # one row for each number of psi_hat
                new = old[key].new_zeros(len(G.P.bias), *old[key].shape[1:])
                new[rows] = old[key]
                old[key] = new

    # what fits is copied
    copied = 0
    for prefix, net in (("E.", E), ("G.", G), ("V.", D.V)):
        for key, new in net.state_dict(prefix=prefix).items():  # not copies: writing changes the net
            if key in old and old[key].shape == new.shape:
                new.copy_(old[key])
                copied += new.numel()
    D.w0.copy_(old["w0"])
    D.b.copy_(old["b"])
    if half:
        see_through(E.net.blocks, old, "E.net.blocks.1", c=6)
        see_through(D.V.blocks, old, "V.blocks.1", c=6)
        see_through(G.down, old, "G.down.1", c=3)
        if config.channels[0] >= was.channels[0]:
            pass_on(G, old, was.channels[0])
    embed_rows(E, D, episodes)
    print(f"{copied / 1e6:.1f} million numbers of the networks are from {path}")


def old_rows_of_psi(G, c):
    """For each number of the smaller G's psi_hat, its index in the psi_hat of G: (|psi_hat| of the smaller,).

    c: channels of the smaller one's last block. What its final AdaIN had goes to the first c channels of
    the new final AdaIN, or, where that has fewer, to the AdaIN that now follows the same block.
    """
    *before, _, _, final = G.psi_sizes      # the last three slices are new: two of a block, and the final one
    first = sum(before)
    a = final // 2
    if a < c:
        return torch.arange(first + 2 * c)
    gammas = sum(G.psi_sizes) - final + torch.arange(c)
    return torch.cat([torch.arange(first), gammas, gammas + a])


def pass_on(G, old, c):
    """Let G's new last block pass on its c input channels, and the last convolution read them as before."""
    block, (size2, final) = G.up[-1], G.psi_sizes[-2:]
    raw(block.skip).mul_(0.1)       # so that the identity has the largest singular value
    raw(block.skip)[:c] = torch.eye(c)[..., None, None]
    block.skip.bias[:c] = 0
    gammas = len(G.P.bias) - final - size2 + torch.arange(size2 // 2)
    G.P.bias[gammas] = (QUIET - 1) / G.P.gain       # 1 + gamma is QUIET
    raw(G.to_rgb).mul_(0.1)
    raw(G.to_rgb)[:, :c] = old["G.to_rgb.parametrizations.weight.original"]
    G.to_rgb.bias.copy_(old["G.to_rgb.bias"])
    restart(block.skip, G.to_rgb)


def see_through(blocks, old, name, c):
    """Let the second block see what it saw when it was the first: c channels have the halved input, plus 1.

    That is 0 or more, so that the ReLU which the second block now begins with lets all of it through.
    The other channels are random, and nothing reads them yet. old[name + ...]: the second block as it was.
    """
    outer, inner = blocks[0], blocks[1]

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
    restart(outer.conv2, outer.skip, inner.conv1, inner.skip)
    if not isinstance(inner.norm1, nn.Identity):
        # undo the normalisation: drawn landmarks plus 1 have a mean of 0.04 and a deviation of 0.25
        inner.norm1.weight[:c] = 0.25
        inner.norm1.bias[:c] = 0.04


def raw(conv):
    """The weight of a convolution before spectral normalisation."""
    return conv.parametrizations.weight.original


def restart(*convs):
    """Restart the power iteration of these convolutions' spectral normalisation."""
    for conv in convs:
        conv.parametrizations.weight[0]._power_method(raw(conv).flatten(1), 30)


def embed_rows(E, D, episodes):
    """Set W_i to the mean of E on two frames of video i: E is trained already, and L_MCH compares them."""
    E.eval()
    for row in range(episodes.rows):
        video = episodes.video(row)
        usable = episodes.videos.usable(video)
        try:
            frames, points = episodes.videos.load(video, usable[[0, len(usable) // 2]])
        except (UserError, IndexError):
            continue    # a damaged file, of which Episodes warns, or one without a frame that may be used
        x, y = (to_float(part, D.W.device) for part in to_tensors(frames, points))
        D.W[row] = E(x, y).mean(0)
    E.train()
