"""The three networks of "Few-Shot Adversarial Learning of Realistic Neural Talking Head Models".

    e_hat = E(x, y)        the embedder:      a frame and its landmarks -> a person     (Sec. 3.1)
    x_hat = G(y, e_hat)    the generator:     landmarks and a person -> a frame         (eq. 2)
    r     = D(x, y, w)     the discriminator: is x a real frame of this person and pose?  (eq. 5, 8)

Images are (B, 3, S, S) in [-1, 1]: x is a frame, y its landmarks drawn as lines. Numbers in comments are of
the paper's 256 pixels: E has 15, G 38 and D's V 20 million parameters.
"""
import math
import warnings
from dataclasses import asdict, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from config import Config
from runtime.files import UserError, save_tensors

FORMAT = 1  # of checkpoints; raised whenever an older file can no longer be read


# ------------------------------------------------------------------------------------- blocks

def conv(c_in, c_out, size):
    """A convolution that keeps the resolution, under spectral norm, as all layers (Sec. 3.4)."""
    return spectral_norm(nn.Conv2d(c_in, c_out, size, padding=size // 2))


class SelfAttention(nn.Module):
    """SAGAN's self-attention [44] in BigGAN's form [6]; gamma = 0 at first: the identity."""
    def __init__(self, c):
        super().__init__()
        self.query, self.key = conv(c, c // 8, 1), conv(c, c // 8, 1)
        self.value, self.out = conv(c, c // 2, 1), conv(c // 2, c, 1)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x):                                       # (B, C, H, W)
        q = self.query(x).flatten(2).transpose(1, 2)            # (B, HW, C/8)
        k = F.max_pool2d(self.key(x), 2).flatten(2)             # (B, C/8, HW/4)
        v = F.max_pool2d(self.value(x), 2).flatten(2).transpose(1, 2)  # (B, HW/4, C/2)
        attention = (q @ k).softmax(dim=-1)                     # (B, HW, HW/4): no 1/sqrt(d)
        h = (attention @ v).transpose(1, 2).unflatten(2, x.shape[2:])  # (B, C/2, H, W)
        return x + self.gamma * self.out(h)                     # (B, C, H, W)


def adain(x, psi):
    """Adaptive instance norm [14]. x (B, C, H, W), psi (B, 2C): the C gammas, then the C betas.

    1 + gamma, not gamma: under spectral norm psi = P e starts near zero and would kill the signal.
    """
    gamma, beta = psi.chunk(2, dim=1)                           # (B, C), (B, C)
    h = x.flatten(0, 1)[None]       # as batch norm of one image of B * C channels: (1, BC, H, W)
    h = F.batch_norm(h, None, None, (1 + gamma).flatten(), beta.flatten(), training=True)
    return h.view(x.shape)                                      # (B, C, H, W)


class DownBlock(nn.Module):
    """Pre-activated residual block of E, V and G's encoder (A.4); down=True halves the resolution.

    first: nothing stands before the first convolution.  norm: affine instance norm, in G's encoder.
    """

    def __init__(self, c_in, c_out, first=False, norm=False, down=True):
        super().__init__()
        self.first, self.down = first, down
        self.norm1 = nn.InstanceNorm2d(c_in, affine=True) if norm and not first else nn.Identity()
        self.norm2 = nn.InstanceNorm2d(c_out, affine=True) if norm else nn.Identity()
        self.conv1, self.conv2 = conv(c_in, c_out, 3), conv(c_out, c_out, 3)
        self.skip = conv(c_in, c_out, 1) if down else nn.Identity()

    def forward(self, x):                                       # (B, C_in, H, W)
        h = x if self.first else F.relu(self.norm1(x))  # never in place: the skip needs x as it was
        h = self.conv1(h)                                       # (B, C_out, H, W)
        h = self.conv2(F.relu(self.norm2(h), inplace=True))     # (B, C_out, H, W)
        if self.down:
            h = F.avg_pool2d(h, 2)                              # (B, C_out, H/2, W/2)
            x = F.avg_pool2d(x, 2)  # before the 1x1 skip: the same for a quarter of the work
        return self.skip(x) + h                                 # (B, C_out, H/2, W/2)


class AdaBlock(nn.Module):
    """Residual block of G with AdaIN; up=True: upsampled before the first convolution, as in BigGAN [6]."""

    def __init__(self, c_in, c_out, up=False):
        super().__init__()
        self.up = up
        self.psi_sizes = [2 * c_in, 2 * c_out]
        self.conv1, self.conv2 = conv(c_in, c_out, 3), conv(c_out, c_out, 3)
        self.skip = conv(c_in, c_out, 1) if up else nn.Identity()

    def forward(self, x, psi1, psi2):               # (B, C_in, H, W), (B, 2 C_in), (B, 2 C_out)
        h = F.relu(adain(x, psi1), inplace=True)    # (B, C_in, H, W)
        h = upsample_conv(h, self.conv1) if self.up else self.conv1(h)  # (B, C_out, 2H, 2W)
        h = F.relu(adain(h, psi2), inplace=True)    # (B, C_out, 2H, 2W)
        h = self.conv2(h)                                       # (B, C_out, 2H, 2W)
        x = self.skip(x)            # before upsampling: the same for a quarter of the work
        if self.up:
            x = F.interpolate(x, scale_factor=2.0)              # (B, C_out, 2H, 2W): nearest
        return h + x                                            # (B, C_out, 2H, 2W)


def upsample_conv(h, layer):
    """layer(nearest upsampling of h by 2), as one transposed convolution: for 16/36 of the work."""
    k = layer.weight    # read once: each look is a step of power iteration; 4x4 if folded
    k = transposed_kernel(k) if k.shape[-1] == 3 else k
    return F.conv_transpose2d(h, k, layer.bias, stride=2, padding=1)  # (B, C_out, 2H, 2W)


def transposed_kernel(weight):
    """(C_out, C_in, 3, 3) -> (C_in, C_out, 4, 4): the kernel of upsampling and convolution in one.

    Pixel i of the small image stands for pixels 2i and 2i + 1 of the large one: so it is the sum of
    the flipped 3x3 kernel at the two offsets, 0 and 1, in both directions.
    """
    k = weight.flip(2, 3).transpose(0, 1)                       # (C_in, C_out, 3, 3)
    return sum(F.pad(k, (a, 1 - a, b, 1 - b)) for a in (0, 1) for b in (0, 1))


# ----------------------------------------------------------------------------------- networks

class ConvNet(nn.Module):
    """The convolutional part of E and D (A.4): blocks down to 4x4, ReLU, sum over positions.

    forward(x, y) -> vector (B, N), [the output of each residual block].
    """

    def __init__(self, cfg, last_block):
        super().__init__()
        widths = [6, *cfg.widths(int(math.log2(cfg.image_size)) - 2)]  # 6, 64, ..., 512, 512, 512
        self.blocks = nn.ModuleList(
            DownBlock(a, b, first=a == 6) for a, b in zip(widths, widths[1:]))
        if last_block:  # V's additional block at 4x4 (Sec. 3.4)
            self.blocks.append(DownBlock(widths[-1], widths[-1], down=False))
        self.attention_after = int(math.log2(cfg.image_size // 32))  # 3 blocks lead to 32x32
        self.attention = SelfAttention(widths[self.attention_after])

    def forward(self, x, y):
        h, features = torch.cat([x, y], dim=1), []              # (B, 6, S, S)
        for k, block in enumerate(self.blocks, 1):
            h = block(h)                                        # (B, widths[k], S/2^k, S/2^k)
            features.append(h)
            if k == self.attention_after:
                h = self.attention(h)                           # (B, 256, 32, 32)
        vector = F.relu(h).sum(dim=(2, 3), dtype=torch.float32)  # (B, N): sum pooling after ReLU
        return vector, features


class Embedder(nn.Module):
    """E(x, y; phi) of Sec. 3.1: x, y (B, 3, S, S) in [-1, 1] -> e_hat (B, N), all of it >= 0."""

    def __init__(self, cfg):
        super().__init__()
        self.net = ConvNet(cfg, last_block=False)

    def forward(self, x, y):
        return self.net(x, y)[0]                                # (B, N)


class Generator(nn.Module):
    """G(y, e_hat; psi, P) of Sec. 3.1: y (B, 3, S, S), e_hat (B, N) -> x_hat (B, 3, S, S).

    The paper's psi are the weights of this module; psi_hat is P e_hat, or psi' in fine-tuning.
    """

    def __init__(self, cfg):
        super().__init__()
        N, size = cfg.max_channels, cfg.image_size
        down = [3, *cfg.widths(4 if size > 64 else 3)]                  # 3, 64, 128, 256, 512
        up = [N, *reversed(down[1:])]                                   # 512, 512, 256, 128, 64
        self.down = nn.ModuleList(
            DownBlock(a, b, first=a == 3, norm=True) for a, b in zip(down, down[1:]))
        self.bottleneck = nn.ModuleList(AdaBlock(N, N) for _ in range(4))
        self.up = nn.ModuleList(AdaBlock(a, b, up=True) for a, b in zip(up, up[1:]))
        self.to_rgb = conv(up[-1], 3, 3)

        self.attention_down_after = int(math.log2(size // 32))  # in the encoder at 32x32
        self.attention_down = SelfAttention(down[self.attention_down_after])
        high = 64 if size >= 256 else 32                        # in the decoder at 64x64
        self.attention_up_after = len(self.down) - int(math.log2(size // high))
        self.attention_up = SelfAttention(up[self.attention_up_after])

        # One linear layer for every gamma and beta (A.4). With a bias: what all people have in common
        # need not pass through P, whose norm of 1 is left for the differences between them.
        self.psi_sizes = sum((block.psi_sizes for block in [*self.bottleneck, *self.up]), []) + [2 * up[-1]]
        self.P, self.gain = spectral_norm(nn.Linear(N, sum(self.psi_sizes))), cfg.psi_gain  # 13,056
        nn.init.zeros_(self.P.bias)
        self.P.register_buffer("mean", torch.zeros(N))          # of e over people, where known: teach.py

    def project(self, e):
        """psi_hat = P e_hat: (B, N) -> (B, |psi_hat|), what makes the person (Sec. 3.1)."""
        with torch.autocast(e.device.type, enabled=False):      # gamma is small beside 1: float32
            return self.gain * self.P(e - self.P.mean)

    def render(self, y, psi_hat):
        """G'(y; psi, psi') of Sec. 3.3: y (B, 3, S, S), psi_hat (B, |psi_hat|) -> (B, 3, S, S)."""
        psi_hat = iter(psi_hat.split(self.psi_sizes, dim=1))    # two of (B, 2C) for each block
        h = y
        for k, block in enumerate(self.down, 1):
            h = block(h)                                        # (B, down[k], S/2^k, S/2^k)
            if k == self.attention_down_after:
                h = self.attention_down(h)                      # (B, 256, 32, 32)
        for block in self.bottleneck:
            h = block(h, next(psi_hat), next(psi_hat))          # (B, N, 16, 16)
        for k, block in enumerate(self.up, 1):
            h = block(h, next(psi_hat), next(psi_hat))          # (B, up[k], 16 * 2^k, 16 * 2^k)
            if k == self.attention_up_after:
                h = self.attention_up(h)                        # (B, 256, 64, 64)
        h = F.relu(adain(h, next(psi_hat)), inplace=True)       # (B, 64, S, S): A.4
        return torch.tanh(self.to_rgb(h))                       # (B, 3, S, S)

    def forward(self, y, e):
        return self.render(y, self.project(e))                  # (B, 3, S, S)

    def fold(self):
        """Put spectral norm and upsampling into the weights, for inference. Returns self."""
        self.eval()  # in eval mode the power iteration stands still
        for module in list(self.modules()):
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        for layer in (block.conv1 for block in self.up if block.conv1.weight.shape[-1] == 3):
            layer.weight = nn.Parameter(transposed_kernel(layer.weight.detach()))
        return self


class Discriminator(nn.Module):
    """D of eq. 5 and eq. 8, the same function of w: D(x, y, w) = V(x, y)^T w + b.

    Meta-learning calls it with w = D.rows(i) + D.w0 (eq. 5), fine-tuning with w = w' (eq. 8).
    W (num_videos, N): one row per training video that this rank owns (a column in the paper).
    """

    def __init__(self, cfg):
        super().__init__()
        N = cfg.max_channels
        self.V = ConvNet(cfg, last_block=True)
        self.w0 = nn.Parameter(torch.empty(N).uniform_(-1 / math.sqrt(N), 1 / math.sqrt(N)))
        self.b = nn.Parameter(torch.zeros(()))
        self.W = nn.Parameter(torch.empty(cfg.num_videos, N))
        self.reset_rows()

    def reset_rows(self):
        # where embeddings are, which end in a ReLU: around zero, L_MCH would pull them below it, where
        # no gradient is. And of little spread: what a row starts with is noise to L_MCH
        nn.init.uniform_(self.W, 0.4, 0.6)

    def rows(self, i):
        """W_i: i (B,) long -> (B, N). A sparse gradient: any number of videos costs the same."""
        return F.embedding(i, self.W, sparse=True)

    def forward(self, x, y, w):
        """x, y (B, 3, S, S); w (B, N) or (N,) -> score (B,), [the output of each of V's blocks]."""
        v, features = self.V(x, y)                              # (B, N)
        return (v * w).sum(dim=1) + self.b, features            # (B,)


# -------------------------------------------------------------------------------- checkpoints

def save_checkpoint(path, kind, config, step=0, **parts):
    """Write a flat dict of tensors and plain values that loads under weights_only=True, atomically.

    kind "meta": E=, G=, V= modules, w0=, b= tensors.  "person": as finetune.save_person says.
    A module's tensors are stored under "NAME.key", a tensor under its name.
    """
    state = {"format": FORMAT, "kind": kind, "step": step, "config": asdict(config)}
    for name, part in parts.items():
        tensors = part.state_dict(prefix=f"{name}.") if isinstance(part, nn.Module) else {name: part}
        state |= {key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}
    save_tensors(state, path)


def load_checkpoint(path, device="cpu", kind="meta"):
    """Read what save_checkpoint wrote: the flat dict, "config" a Config. UserError otherwise."""
    try:
        with warnings.catch_warnings(action="ignore"):  # on foreign pickles, which we refuse below
            state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}") from None
    except Exception as e:  # torch.load raises a dozen types on damaged or foreign files
        raise UserError(f"{path} is not a readable checkpoint ({type(e).__name__})") from None
    if not isinstance(state, dict) or not {"format", "kind", "config"} <= state.keys():
        raise UserError(f"{path} is not a checkpoint of this project")
    if state["format"] != FORMAT:
        raise UserError(f"{path} has format {state['format']}; this code reads format {FORMAT}")
    if state["kind"] != kind:
        origin = {"meta": "meta_train.py", "person": "finetune.py or infer.py --save-person"}[kind]
        raise UserError(f"{path} is a {state['kind']} file; a {kind} file is needed, from {origin}")
    try:
        config = dict(state["config"])
        clamp = config.pop("adain_clamp", 0)            # of before AdaIN lost it
        state["config"] = Config(**config)
    except (TypeError, ValueError) as e:
        raise UserError(f"{path} has a config that this code does not know: {e}") from None
    if clamp:
        raise UserError(f"{path} is of when AdaIN had a clamp, and would flicker without: make it anew")
    if kind == "meta" and "G.P.bias" not in state:      # from before P had one
        state["G.P.bias"] = state["w0"].new_zeros(len(state["G.P.parametrizations.weight.original"]))
    if kind == "meta":
        state.setdefault("G.P.mean", torch.zeros_like(state["w0"]))
    return state


def _fill(module, state, prefix=""):
    try:
        part = {k: state[prefix + k] for k in module.state_dict()}
        module.load_state_dict(part)
    except (KeyError, RuntimeError) as e:
        reason = str(e).splitlines()[-1].strip()
        raise UserError(f"the checkpoint does not fit its own config: {reason}") from None
    return module.to(next(iter(part.values())).device).eval()


def load_networks(state):
    """E, G, D of a "meta" checkpoint, in eval mode; D without W, which only the training keeps."""
    config = state["config"]
    E = _fill(Embedder(config), state, "E.")
    G = _fill(Generator(config), state, "G.")
    D = Discriminator(replace(config, num_videos=0))
    return E, G, _fill(D, state | {"W": D.W.detach()})


def load_person(state):
    """G (folded, without P) and psi' (|psi_hat|,) of a loaded "person" checkpoint."""
    G = Generator(state["config"])
    G.P = nn.Identity()  # psi' has taken its place (Sec. 3.3)
    return _fill(G.fold(), state, "G."), state["psi"]
