"""The three networks of "Few-Shot Adversarial Learning of Realistic Neural Talking Head Models".

    e_hat = E(x, y)             the embedder:       a frame and its landmarks -> a person       (eq. 1)
    x_hat = G(y, e_hat)         the generator:      landmarks and a person    -> a frame        (eq. 2)
    r     = D(x, y, w)          the discriminator:  is x a real frame of this person and pose?  (eq. 5, 8)

Images are float tensors (B, 3, S, S) in [-1, 1]: x is a frame, y its landmarks drawn as lines (data.py). At the
paper's size E has 15, G 38 and the convolutional part V of D 20 million parameters (Sec. 3.4).
"""
import math
import os
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

FORMAT = 1  # of checkpoints; raised whenever an older file can no longer be read


class UserError(Exception):
    """What a user can mend: a wrong file, a missing folder. Scripts print it as one line and leave with code 2."""


@dataclass
class Config:
    """What later stages must know about a training run. The defaults are the paper's (Sec. 3.4, A.4)."""
    image_size: int = 256       # S: a power of two, 64 to 512
    min_channels: int = 64
    max_channels: int = 512     # also N, the size of an embedding
    num_videos: int = 0         # of the training; a rank's D is built with the number that this rank owns: the rows of W
    landmarks: str = "fan"      # the detector the training data was made with: fan | dlib
    content: str = "vgg"        # the content loss: vgg | squeeze | l1
    match: bool = True          # False: the FF variant, trained without the match loss
    K: int = 8                  # frames per episode that the embedder sees
    lr: float = 5e-5            # of E and G
    lr_d: float = 2e-4          # of D
    ema: float = 0.0            # decay of the moving average of E and G, which goes into the checkpoint; 0: no averaging
    by_frames: bool = False     # sequences drawn in proportion to their frames, not evenly
    augment: bool = False       # episodes recoloured, half of them mirrored
    psi_gain: float = 1.0       # psi_hat = psi_gain * P e_hat
    stills: float = 0.0         # share of episodes made of one frame, warped differently K + 1 times
    match_weight: float = 10.0  # of L_MCH
    face: float = 0.0           # weight of the content loss's face term, where there is no VGGFace
    adain_clamp: float = 0.0    # a trained G may cut what AdaIN has normalised at +- this many deviations; 0: it does not

    def __post_init__(self):
        if self.image_size not in (64, 128, 256, 512):
            raise UserError(f"image size {self.image_size}: it must be 64, 128, 256 or 512")
        if not 8 <= self.min_channels <= self.max_channels:
            raise UserError(f"channels {self.min_channels} to {self.max_channels}: 8 <= min <= max is needed")

    def widths(self, blocks):
        """Output channels of `blocks` downsampling blocks: doubling, and N at the end (A.4)."""
        widths = [min(self.min_channels * 2 ** k, self.max_channels) for k in range(blocks)]
        return widths[:-1] + [self.max_channels]


def fast_dtype(device):
    """bfloat16 where the device multiplies it fast: CUDA from Ampere on, CPUs with AMX or avx512_bf16. float32 elsewhere.

    Measured: with AMX, and on an AMD EPYC with avx512_bf16, where a training step takes 0.60 of float32's time.
    """
    device = torch.device(device).type
    cpu = getattr(torch.cpu, "get_capabilities", dict)()
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device == "cuda" else \
        device == "cpu" and (cpu.get("amx_bf16", False) or cpu.get("avx512_bf16", False))
    return torch.bfloat16 if fast else torch.float32


def autocast(device):
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=fast_dtype(device) == torch.bfloat16)


# ---------------------------------------------------------------------------------------------- blocks

def conv(c_in, c_out, size):
    """A convolution that keeps the resolution, under spectral normalisation like every layer (Sec. 3.4)."""
    return spectral_norm(nn.Conv2d(c_in, c_out, size, padding=size // 2))


class UpConv(nn.Conv2d):
    """Nearest upsampling by 2 and a 3x3 convolution in one: a transposed convolution with a 4x4 kernel.

    Exactly the same result for 16/36 of the multiply-adds: G is a fifth faster by it.
    """

    class Spread(nn.Module):
        """(out, in, 3, 3) -> (in, out, 4, 4). Pixel i of the small image stands for the pixels 2i and 2i + 1 of the large
        one: the transposed kernel is the sum of the flipped 3x3 kernel at these offsets, 0 and 1, in both directions."""

        def forward(self, weight):
            k = weight.flip(2, 3).transpose(0, 1)
            return sum(F.pad(k, (a, 1 - a, b, 1 - b)) for a in (0, 1) for b in (0, 1))

    def __init__(self, c_in, c_out):
        super().__init__(c_in, c_out, 3)
        spectral_norm(self)  # of the 3x3 kernel, which is what is learned
        parametrize.register_parametrization(self, "weight", UpConv.Spread(), unsafe=True)  # unsafe: the shape changes

    def forward(self, x):                                                       # (B, C_in, H, W)
        return F.conv_transpose2d(x, self.weight, self.bias, stride=2, padding=1)  # (B, C_out, 2H, 2W)


class SelfAttention(nn.Module):
    """SAGAN's self-attention [44] in BigGAN's form [6]; gamma starts at 0, so it starts as the identity."""

    def __init__(self, c):
        super().__init__()
        self.query, self.key = conv(c, c // 8, 1), conv(c, c // 8, 1)
        self.value, self.out = conv(c, c // 2, 1), conv(c // 2, c, 1)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x):                                                       # (B, C, H, W)
        q = self.query(x).flatten(2)                                            # (B, C/8, HW)
        k = F.max_pool2d(self.key(x), 2).flatten(2)                             # (B, C/8, HW/4)
        v = F.max_pool2d(self.value(x), 2).flatten(2)                           # (B, C/2, HW/4)
        attention = (q.transpose(1, 2) @ k).softmax(dim=-1)                     # (B, HW, HW/4): no 1/sqrt(d) in SAGAN
        h = (v @ attention.transpose(1, 2)).unflatten(2, x.shape[2:])           # (B, C/2, H, W)
        return x + self.gamma * self.out(h)                                     # (B, C, H, W)


def instance_norm(x, gamma, beta):
    """x (B, C, H, W), gamma and beta (B, C). It is batch norm of B * C channels: so scale and shift come in the same pass."""
    h = F.batch_norm(x.flatten(0, 1)[None], None, None, gamma.flatten(), beta.flatten(), training=True)
    return h.view(x.shape)


class InstanceNorm(nn.InstanceNorm2d):
    """Affine instance norm; PyTorch's own would undo channels_last, which costs a tenth of G's time."""

    def __init__(self, c):
        super().__init__(c, affine=True)

    def forward(self, x):                                                       # (B, C, H, W)
        return instance_norm(x, self.weight.expand(len(x), -1), self.bias.expand(len(x), -1))


def adain(x, psi, clamp=0.0):
    """Adaptive instance norm [14]. x (B, C, H, W), psi (B, 2C): C numbers gamma, then C numbers beta.

    1 + gamma, not gamma: under spectral normalisation psi = P e starts near zero and would kill the signal.
    clamp: without it a single spot can outgrow a whole channel, whose deviation it then is, and all the rest dims.
    """
    gamma, beta = psi.to(x.dtype).chunk(2, dim=1)
    if not clamp:
        return instance_norm(x, 1 + gamma, beta)
    h = instance_norm(x, torch.ones_like(gamma), torch.zeros_like(beta)).clamp(-clamp, clamp)
    return torch.addcmul(beta[..., None, None], h, 1 + gamma[..., None, None])


class DownBlock(nn.Module):
    """Pre-activated residual block of E, V and G's encoder (A.4), halving the resolution unless down=False.

    first: nothing stands before the first convolution.  norm: affine instance norm (G's encoder only).
    """

    def __init__(self, c_in, c_out, first=False, norm=False, down=True):
        super().__init__()
        self.first, self.down = first, down
        self.norm1 = InstanceNorm(c_in) if norm and not first else nn.Identity()
        self.norm2 = InstanceNorm(c_out) if norm else nn.Identity()
        self.conv1, self.conv2 = conv(c_in, c_out, 3), conv(c_out, c_out, 3)
        self.skip = conv(c_in, c_out, 1) if down else nn.Identity()

    def forward(self, x):                                                       # (B, C_in, H, W)
        h = x if self.first else F.relu(self.norm1(x))  # never in place: the skip needs x as it was
        h = self.conv1(h)                                                       # (B, C_out, H, W)
        h = self.conv2(F.relu(self.norm2(h), inplace=True))                     # (B, C_out, H, W)
        if self.down:  # pooling before the 1x1 skip gives the same result for a quarter of the work
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        return self.skip(x) + h                                                 # (B, C_out, H/2, W/2)


class AdaBlock(nn.Module):
    """Residual block of G's bottleneck and decoder, normalised by AdaIN; up=True doubles the resolution."""

    def __init__(self, c_in, c_out, up=False, clamp=0.0):
        super().__init__()
        self.up, self.clamp = up, clamp
        self.psi_sizes = [2 * c_in, 2 * c_out]
        self.conv1 = UpConv(c_in, c_out) if up else conv(c_in, c_out, 3)  # upsampled before it, as BigGAN does
        self.conv2 = conv(c_out, c_out, 3)
        self.skip = conv(c_in, c_out, 1) if up else nn.Identity()

    def forward(self, x, psi1, psi2):                               # (B, C_in, H, W), (B, 2 C_in), (B, 2 C_out)
        h = F.relu(adain(x, psi1, self.clamp), inplace=True)                    # (B, C_in, H, W)
        h = self.conv1(h)                                                       # (B, C_out, 2H, 2W)
        h = self.conv2(F.relu(adain(h, psi2, self.clamp), inplace=True))        # (B, C_out, 2H, 2W)
        x = self.skip(x)  # before upsampling: the same result for a quarter of the work
        return h + (F.interpolate(x, scale_factor=2.0) if self.up else x)       # (B, C_out, 2H, 2W)


# -------------------------------------------------------------------------------------------- networks

class ConvNet(nn.Module):
    """The convolutional part that E and D share (A.4): blocks down to 4x4, ReLU, then the sum over positions.

    forward(x, y) -> vector (B, N), [the output of each residual block].
    """

    def __init__(self, cfg, last_block):
        super().__init__()
        widths = [6] + cfg.widths(int(math.log2(cfg.image_size)) - 2)
        self.blocks = nn.ModuleList(DownBlock(a, b, first=k == 0) for k, (a, b) in enumerate(zip(widths, widths[1:])))
        if last_block:  # V's additional block at 4x4 (Sec. 3.4)
            self.blocks.append(DownBlock(widths[-1], widths[-1], down=False))
        self.attention_after = int(math.log2(cfg.image_size // 32))             # this many blocks lead to 32x32
        self.attention = SelfAttention(widths[self.attention_after])

    def forward(self, x, y):
        h, features = torch.cat([x, y], dim=1), []                              # (B, 6, S, S)
        for k, block in enumerate(self.blocks, 1):
            h = block(h)                                                        # (B, widths[k], S/2^k, S/2^k)
            features.append(h)
            if k == self.attention_after:
                h = self.attention(h)                                           # (B, widths[k], 32, 32)
        return F.relu(h).sum(dim=(2, 3), dtype=torch.float32), features         # (B, N): sum pooling after ReLU


class Embedder(nn.Module):
    """E(x, y; phi) of Sec. 3.1: x, y (B, 3, S, S) in [-1, 1] -> e_hat (B, N), all of it >= 0."""

    def __init__(self, cfg):
        super().__init__()
        self.net = ConvNet(cfg, last_block=False)

    def forward(self, x, y):
        return self.net(x, y)[0]                                                # (B, N)


class Generator(nn.Module):
    """G(y, e_hat; psi, P) of Sec. 3.1: y (B, 3, S, S), e_hat (B, N) -> x_hat (B, 3, S, S) in [-1, 1].

    The paper's psi are the weights of this module; what is called psi below is its psi_hat (Sec. 3.2) or psi' (Sec. 3.3).
    """

    def __init__(self, cfg):
        super().__init__()
        N, size = cfg.max_channels, cfg.image_size
        down = [3] + cfg.widths(4 if size > 64 else 3)
        up = [N] + down[:0:-1]                                                  # the encoder's widths in reverse
        self.down = nn.ModuleList(DownBlock(a, b, first=k == 0, norm=True) for k, (a, b) in enumerate(zip(down, down[1:])))
        self.bottleneck = nn.ModuleList(AdaBlock(N, N, clamp=cfg.adain_clamp) for _ in range(4))
        self.up = nn.ModuleList(AdaBlock(a, b, True, cfg.adain_clamp) for a, b in zip(up, up[1:]))
        self.to_rgb, self.clamp = conv(up[-1], 3, 3), cfg.adain_clamp

        bottom = size >> len(self.down)
        self.attention_down_after = int(math.log2(size // 32))                  # at 32x32 in the encoder
        self.attention_down = SelfAttention(down[self.attention_down_after])
        self.attention_up_after = int(math.log2(min(64, max(32, size // 4)) // bottom))  # at 64x64 in the decoder
        self.attention_up = SelfAttention(up[self.attention_up_after])

        self.psi_sizes = [n for b in [*self.bottleneck, *self.up] for n in b.psi_sizes] + [2 * up[-1]]
        # One linear layer for every gamma and beta (A.4). With a bias, as a linear layer has: without one P's norm, which is 1,
        # goes into what all people have in common.
        self.P, self.gain = spectral_norm(nn.Linear(N, sum(self.psi_sizes))), cfg.psi_gain
        nn.init.zeros_(self.P.bias)

    def project(self, e):
        """psi_hat = P e_hat + a bias: (B, N) -> (B, |psi|), the person-specific parameters (Sec. 3.1)."""
        return self.gain * self.P(e)

    def render(self, y, psi):
        """G'(y; psi, psi') of Sec. 3.3: y (B, 3, S, S), psi (B, |psi|) -> (B, 3, S, S) in [-1, 1]."""
        psi = iter(psi.split(self.psi_sizes, dim=1))
        h = y
        for k, block in enumerate(self.down, 1):
            h = block(h)                                                        # (B, down[k], S/2^k, S/2^k)
            if k == self.attention_down_after:
                h = self.attention_down(h)                                      # (B, 256, 32, 32)
        for block in self.bottleneck:
            h = block(h, next(psi), next(psi))                                  # (B, N, 16, 16)
        for k, block in enumerate(self.up, 1):
            h = block(h, next(psi), next(psi))                                  # (B, up[k], 16 * 2^k, 16 * 2^k)
            if k == self.attention_up_after:
                h = self.attention_up(h)                                        # (B, 256, 64, 64)
        h = F.relu(adain(h, next(psi), self.clamp), inplace=True)               # (B, 64, S, S): the final AdaIN (A.4)
        return torch.tanh(self.to_rgb(h))                                       # (B, 3, S, S)

    def forward(self, y, e):
        return self.render(y, self.project(e))                                  # (B, 3, S, S)

    def fold(self):
        """Put spectral normalisation into the weights, for inference only: the same output, for less. Returns self."""
        self.eval()  # in eval mode the power iteration stands still
        for m in list(self.modules()):
            if parametrize.is_parametrized(m, "weight"):
                parametrize.remove_parametrizations(m, "weight", leave_parametrized=True)
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
        # Of the embeddings' sign and size at the start: around zero, L_MCH pulls every e below the ReLU, where it dies. And of
        # little spread: a row moves slowly, and what it starts with is noise to L_MCH.
        self.W = nn.Parameter(torch.empty(cfg.num_videos, N).uniform_(0.4, 0.6))
        self.w0 = nn.Parameter(torch.empty(N).uniform_(-1 / math.sqrt(N), 1 / math.sqrt(N)))
        self.b = nn.Parameter(torch.zeros(()))

    def rows(self, i):
        """W_i: i (B,) long -> (B, N). Its gradient is sparse: a step costs the same for any number of videos."""
        return F.embedding(i, self.W, sparse=True)

    def forward(self, x, y, w):
        """x, y (B, 3, S, S) in [-1, 1]; w (B, N) or (N,) -> score (B,), [the output of each of V's blocks]."""
        v, features = self.V(x, y)                                              # (B, N)
        return (v * w).sum(dim=1) + self.b, features                            # (B,)


# ----------------------------------------------------------------------------------------- checkpoints

@contextmanager
def atomic(path):
    """Yield a temporary name to write to, renamed to `path` at the end: it is absent, as it was before, or whole."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def save_tensors(state, path):
    """torch.save, atomically."""
    with atomic(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as e:  # what torch.save makes of a full disk
            raise OSError(str(e).splitlines()[0]) from None


def save_checkpoint(path, kind, config, step=0, **parts):
    """Write a flat dict of tensors and plain values that loads under weights_only=True, atomically.

    kind "meta": E=, G=, V= modules, w0=, b= tensors.  kind "person": G= folded and without P, psi=, source= tensors.
    A module's tensors are stored under "NAME.key", a tensor under its name.
    """
    state = {"format": FORMAT, "kind": kind, "step": step, "config": asdict(config)}
    for name, part in parts.items():
        tensors = part.state_dict(prefix=name + ".") if isinstance(part, nn.Module) else {name: part}
        state |= {key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}
    save_tensors(state, path)


def load_checkpoint(path, device="cpu", kind="meta"):
    """Read what save_checkpoint wrote: the flat dict, its "config" a Config. UserError if the file is no such file."""
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's on foreign pickles, which are refused in our own words
            state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}") from None
    except Exception as e:  # torch.load raises a dozen types on damaged or foreign files
        raise UserError(f"{path} is not a readable checkpoint ({type(e).__name__})") from None
    if not isinstance(state, dict) or not {"format", "kind", "config"} <= state.keys():
        raise UserError(f"{path} is not a checkpoint of this project")
    if state["format"] != FORMAT:
        raise UserError(f"{path} has checkpoint format {state['format']}; this code reads format {FORMAT}")
    if state["kind"] != kind:
        origin = {"meta": "from meta_train.py", "person": "from finetune.py or infer.py --save-person"}
        raise UserError(f"{path} is a {state['kind']} file; a {kind} file is needed here ({origin[kind]})")
    try:
        state["config"] = Config(**state["config"])
    except TypeError as e:
        raise UserError(f"{path} has a config that this code does not know: {e}") from None
    if "G.P.parametrizations.weight.original" in state:     # of before P had a bias
        state.setdefault("G.P.bias", torch.zeros(len(state["G.P.parametrizations.weight.original"]), device=device))
    return state


def _fill(module, state, prefix=""):
    part = {k[len(prefix):]: v for k, v in state.items() if k.startswith(prefix) and torch.is_tensor(v)}
    try:
        module.load_state_dict({k: part[k] for k in module.state_dict()})
    except (KeyError, RuntimeError) as e:
        raise UserError(f"the checkpoint does not fit its own config: {str(e).splitlines()[-1].strip()}") from None
    return module.to(next(iter(part.values())).device).eval()


def load_networks(state):
    """E, G, D of a loaded "meta" checkpoint, in eval mode; D without W, which only the training run keeps."""
    cfg = state["config"]
    D = Discriminator(replace(cfg, num_videos=0))
    return _fill(Embedder(cfg), state, "E."), _fill(Generator(cfg), state, "G."), _fill(D, state | {"W": D.W.detach()})


def load_person(state):
    """G (folded, without P) and psi' (|psi|,) of a loaded "person" checkpoint."""
    G = Generator(state["config"])
    G.P = nn.Identity()  # psi' has taken its place (Sec. 3.3)
    return _fill(G.fold(), state, "G."), state["psi"]
