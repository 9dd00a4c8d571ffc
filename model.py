"""The three networks of "Few-Shot Adversarial Learning of Realistic Neural Talking Head Models".

    e_hat = E(x, y)        the embedder:      a frame and its landmarks -> a person     (Sec. 3.1)
    x_hat = G(y, e_hat)    the generator:     landmarks and a person -> a frame         (eq. 2)
    r     = D(x, y, w)     the discriminator: is x a real frame of this person and pose?  (eq. 5, 8)

Images are (B, 3, S, S) in [-1, 1]: x is a frame, y its landmarks drawn as lines. Shapes in the comments are
those of the paper's 256 pixels, where E has 15 million parameters, G 38 million and D's V 20 million.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm


@dataclass
class Config:
    """The sizes of the networks, and what later stages must know about the training. Checkpoints store it.

    The defaults are the paper's (Sec. 3.4, A.4). Raises ValueError if the sizes do not fit together.
    """
    image_size: int = 256                   # S: 64, 128, 256 or 512
    channels: tuple = (64, 128, 256, 512)   # output widths of G's encoder, one per halving; the last is N
    num_videos: int = 0                     # training videos, each of which has a row of W
    landmarks: str = "fan"                  # the landmark detector of the training data: fan | dlib
    content: str = "vgg"                    # the content loss of fine-tuning: vgg | squeeze | l1
    match: bool = True                      # False: the FF variant, trained without the match loss
    lr: float = 5e-5                        # learning rate of E and G, and of G in fine-tuning --as-paper
    lr_d: float = 2e-4                      # learning rate of D, likewise
    finetune_lr: float = 1e-4               # ours: initial learning rate of G in fine-tuning; it falls to 0
    finetune_lr_d: float = 4e-4             # ours: the same for D
    lips: float = 1.0                       # ours: how far lips open, as a multiple of the driver's opening

    def __post_init__(self):
        self.channels = tuple(self.channels)
        if self.image_size not in (64, 128, 256, 512):
            raise ValueError(f"image size {self.image_size}: it must be 64, 128, 256 or 512")
        if self.bottleneck not in (8, 16):
            raise ValueError(f"channels {self.channels}: an image size of {self.image_size} needs one width "
                             "per halving, down to 8x8 or 16x16")
        if min(self.channels) < 8:
            raise ValueError(f"channels {self.channels}: each must be at least 8")

    @property
    def N(self):
        """The length of an embedding e_hat."""
        return self.channels[-1]

    @property
    def bottleneck(self):
        """The side of the smallest feature map in G: 16 in the paper."""
        return self.image_size >> len(self.channels)

    def embedder_channels(self):
        """Output widths of the blocks that halve the image to 4x4 in E and V: 64, 128, 256, 512, 512, 512."""
        widths = list(self.channels[:-1])
        while self.image_size >> len(widths) > 4:
            widths.append(min(2 * widths[-1], self.N))
        return widths[:-1] + [self.N]       # the last width is N, even if doubling has not reached it


# ------------------------------------------------------------------------------------- blocks

def conv(c_in, c_out, size, padding="zeros"):
    """A convolution that keeps the resolution, with spectral normalisation as in all layers (Sec. 3.4)."""
    return spectral_norm(nn.Conv2d(c_in, c_out, size, padding=size // 2, padding_mode=padding))


class SelfAttention(nn.Module):
    """SAGAN's self-attention [44] in BigGAN's form [6]. gamma starts at 0, so it starts as the identity."""
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


def instance_norm(x, scale, shift):
    """x (B, C, H, W), each channel of each picture normalised, times scale (B, C), plus shift (B, C)."""
    # F.instance_norm would lose the channels-last memory format, which makes the next convolution slower.
    one = x if len(x) == 1 else x.flatten(0, 1)[None]   # (1, BC, H, W): one picture with B C channels
    h = F.batch_norm(one, None, None, scale.flatten(), shift.flatten(), training=True)
    return h if len(x) == 1 else h.view(x.shape)        # a view, even of the same shape, would lose it too


class InstanceNorm(nn.InstanceNorm2d):
    def forward(self, x):                                       # (B, C, H, W)
        return instance_norm(x, self.weight.expand(len(x), -1), self.bias.expand(len(x), -1))


def adain(x, psi_k):
    """Adaptive instance normalisation [14]: (1 + gamma) * instance_norm(x) + beta.

    x (B, C, H, W); psi_k (B, 2C), a slice of psi_hat: the C gammas, then the C betas. The factor is
    1 + gamma, because P e stays small under spectral normalisation: gamma alone would suppress the signal.
    """
    gamma, beta = psi_k.chunk(2, dim=1)                         # (B, C), (B, C)
    return instance_norm(x, 1 + gamma, beta)                    # (B, C, H, W)


class DownBlock(nn.Module):
    """Pre-activated residual block of E, V and G's encoder (A.4).

    first: whether its input is a picture, which gets no ReLU before the first convolution.
    norm: whether it has affine instance normalisation, as in G's encoder.  down: halve the resolution.
    """

    def __init__(self, c_in, c_out, first=False, norm=False, down=True):
        super().__init__()
        self.first, self.down = first, down
        self.norm1 = InstanceNorm(c_in, affine=True) if norm and not first else nn.Identity()
        self.norm2 = InstanceNorm(c_out, affine=True) if norm else nn.Identity()
        self.conv1, self.conv2 = conv(c_in, c_out, 3), conv(c_out, c_out, 3)
        self.skip = conv(c_in, c_out, 1) if down else nn.Identity()

    def forward(self, x):                                       # (B, C_in, H, W)
        h = x if self.first else F.relu(self.norm1(x))  # not in place, because the skip needs x
        h = self.conv1(h)                                       # (B, C_out, H, W)
        h = self.conv2(F.relu(self.norm2(h), inplace=True))     # (B, C_out, H, W)
        if self.down:
            h = F.avg_pool2d(h, 2)                              # (B, C_out, H/2, W/2)
            x = F.avg_pool2d(x, 2)  # pooling commutes with the 1x1 skip, which then costs a quarter as much
        return self.skip(x) + h                                 # (B, C_out, H/2, W/2), if down


class AdaBlock(nn.Module):
    """Residual block of G with AdaIN. up: upsample before the first convolution, as in BigGAN.

    A.4 says "in the end of the block, following [6]", but [6] is BigGAN. Shapes are those of up=True.
    """

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
        x = self.skip(x)            # the 1x1 skip commutes with upsampling, so it runs on the small map
        if self.up:
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear")     # (B, C_out, 2H, 2W)
        return h + x                                            # (B, C_out, 2H, 2W)


def upsample_conv(h, layer):
    """Upsample h bilinearly by 2 and convolve it, in less than half the time of one after the other.

    Bilinear upsampling is nearest-neighbour upsampling followed by a [1 2 1]/4 blur in both directions. The
    blur and the convolution commute, except in the two outermost pixels, so the blur can come last. And
    nearest-neighbour upsampling followed by a convolution is one transposed convolution.
    """
    k = layer.weight    # read once, because each access runs a step of the power iteration
    k = transposed_kernel(k) if k.shape[-1] == 3 else k         # after fold(), it is the 4x4 kernel already
    h = F.conv_transpose2d(h, k, layer.bias, stride=2, padding=1)       # (B, C_out, 2H, 2W)
    return blur(h)                                                      # (B, C_out, 2H, 2W)


def transposed_kernel(weight):
    """The kernel that does nearest-neighbour upsampling and this convolution in one.

    (C_out, C_in, 3, 3) -> (C_in, C_out, 4, 4). Pixel i of the small image becomes pixels 2i and 2i + 1 of the
    large one, so the kernel is the sum of the flipped 3x3 kernel at offsets 0 and 1 in both directions.
    """
    k = weight.flip(2, 3).transpose(0, 1)                       # (C_in, C_out, 3, 3)
    return sum(F.pad(k, (a, 1 - a, b, 1 - b)) for a in (0, 1) for b in (0, 1))


def blur(h):
    """Blur with [1 2 1]/4 in both directions. The border is replicated, because zeros would darken it."""
    k = torch.tensor([0.25, 0.5, 0.25], device=h.device, dtype=h.dtype)
    k = (k[:, None] * k).expand(h.shape[1], 1, 3, 3)            # (C, 1, 3, 3), for each channel by itself
    return F.conv2d(F.pad(h, (1, 1, 1, 1), mode="replicate"), k, groups=h.shape[1])     # (B, C, H, W)


# ----------------------------------------------------------------------------------- networks

class ConvNet(nn.Module):
    """The convolutional part of E and D (A.4): blocks down to 4x4, ReLU, sum over positions.

    forward(x, y) -> vector (B, N), [the output of each residual block].
    """

    def __init__(self, cfg, last_block):
        super().__init__()
        widths = [6, *cfg.embedder_channels()]                  # 6, 64, 128, 256, 512, 512, 512
        self.blocks = nn.ModuleList(
            DownBlock(a, b, first=k == 0) for k, (a, b) in enumerate(zip(widths, widths[1:])))
        if last_block:  # V's additional block at 4x4 (Sec. 3.4)
            self.blocks.append(DownBlock(widths[-1], widths[-1], down=False))
        self.attention_after = int(math.log2(cfg.image_size // 32))  # 3 blocks lead to 32x32
        self.attention = SelfAttention(widths[self.attention_after])

    def forward(self, x, y):
        h, features = torch.cat([x, y], dim=1), []              # (B, 6, S, S)
        for k, block in enumerate(self.blocks, 1):
            h = block(h)                                        # (B, widths[k], S/2^k, S/2^k), at least 4x4
            features.append(h)
            if k == self.attention_after:
                h = self.attention(h)                           # (B, 256, 32, 32)
        vector = F.relu(h).sum(dim=(2, 3), dtype=torch.float32)  # (B, N): ReLU, then sum (A.4)
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

    The paper's psi are all weights of this module except P's; psi_hat is P e_hat, or psi' in fine-tuning.
    """

    def __init__(self, cfg):
        super().__init__()
        N = cfg.N
        down = [3, *cfg.channels]                                       # 3, 64, 128, 256, 512
        up = [N, *reversed(cfg.channels)]                               # 512, 512, 256, 128, 64
        self.down = nn.ModuleList(
            DownBlock(a, b, first=k == 0, norm=True) for k, (a, b) in enumerate(zip(down, down[1:])))
        self.bottleneck = nn.ModuleList(AdaBlock(N, N) for _ in range(4))
        self.up = nn.ModuleList(AdaBlock(a, b, up=True) for a, b in zip(up, up[1:]))
        self.to_rgb = conv(up[-1], 3, 3, "replicate")   # zeros would leave a line at the picture's border

        self.attention_down_after = int(math.log2(cfg.image_size // 32))    # in the encoder at 32x32
        self.attention_down = SelfAttention(down[self.attention_down_after])
        self.attention_up_after = 2         # in the decoder at 4 times the bottleneck: 64x64; --small: 32x32
        self.attention_up = SelfAttention(up[2])

        # One linear layer gives every gamma and beta (A.4), in the order in which render() uses them: two
        # slices for each block of the bottleneck and the decoder, one for the final AdaIN. Its bias carries
        # what all people have in common: P e, which spectral norm keeps small, need only tell them apart.
        self.psi_sizes = sum((block.psi_sizes for block in [*self.bottleneck, *self.up]), []) + [2 * up[-1]]
        self.P = spectral_norm(nn.Linear(N, sum(self.psi_sizes)))       # 512 -> 13,056
        nn.init.zeros_(self.P.bias)
        # ours: two constants. The mean centres e; with the gain, psi_hat can exceed spectral norm's limit.
        self.P.register_buffer("mean", torch.zeros(N))          # of e over people; beyond/teach.py sets it
        self.P.register_buffer("gain", torch.ones(()))          # teach.py and meta_train.py --small set it

    def project(self, e):
        """psi_hat = P e_hat, the person-specific parameters (Sec. 3.1): (B, N) -> (B, |psi_hat|)."""
        with torch.autocast(e.device.type, enabled=False):  # bfloat16 would lose a small gamma in 1 + gamma
            return self.P.gain * self.P(e - self.P.mean)

    def render(self, y, psi_hat):
        """G'(y; psi, psi') of Sec. 3.3: y (B, 3, S, S), psi_hat (B, |psi_hat|) -> (B, 3, S, S)."""
        slices = iter(psi_hat.split(self.psi_sizes, dim=1))     # (B, 2C): two for each block, one at the end
        h = y
        for k, block in enumerate(self.down, 1):
            h = block(h)                                        # (B, down[k], S/2^k, S/2^k)
            if k == self.attention_down_after:
                h = self.attention_down(h)                      # (B, 256, 32, 32)
        for block in self.bottleneck:
            h = block(h, next(slices), next(slices))            # (B, N, 16, 16)
        for k, block in enumerate(self.up, 1):
            h = block(h, next(slices), next(slices))            # (B, up[k], 16 * 2^k, 16 * 2^k)
            if k == self.attention_up_after:
                h = self.attention_up(h)                        # (B, 256, 64, 64)
        h = F.relu(adain(h, next(slices)), inplace=True)        # (B, 64, S, S): A.4
        return torch.tanh(self.to_rgb(h))                       # (B, 3, S, S)

    def forward(self, y, e):
        return self.render(y, self.project(e))                  # (B, 3, S, S)

    def fold(self):
        """Fold spectral normalisation and upsampling into the weights, for inference. Returns self."""
        self.eval()  # so that reading the weights does not run the power iteration
        for module in list(self.modules()):
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        for layer in (block.conv1 for block in self.up if block.conv1.weight.shape[-1] == 3):
            layer.weight = nn.Parameter(transposed_kernel(layer.weight.detach()))
        return self


class Discriminator(nn.Module):
    """D of eq. 5 and eq. 8, which are the same function of w: D(x, y, w) = V(x, y)^T w + b.

    Meta-learning calls it with w = D.rows(i) + D.w0 (eq. 5), fine-tuning with w = w' (eq. 8). theta, the
    weights of V, are under spectral normalisation; W, w0 and w' are not, because they are not layers.
    W (num_videos, N) has a row for each training video of this rank. In the paper they are columns.
    """

    def __init__(self, cfg):
        super().__init__()
        N = cfg.N
        self.V = ConvNet(cfg, last_block=True)
        self.w0 = nn.Parameter(torch.empty(N).uniform_(-N ** -0.5, N ** -0.5))     # as nn.Linear(N, 1) starts
        self.b = nn.Parameter(torch.zeros(()))
        self.W = nn.Parameter(torch.empty(cfg.num_videos, N))
        self.reset_rows()

    def reset_rows(self):
        # Embeddings end in a ReLU, so the rows start in their range: with a W around zero, L_MCH would pull
        # the embeddings to 0, where the ReLU has no gradient. The range is narrow, because embeddings should
        # not learn to match the initial differences between rows, which mean nothing.
        nn.init.uniform_(self.W, 0.4, 0.6)

    def rows(self, i):
        """W_i: i (B,) long -> (B, N)."""
        return F.embedding(i, self.W)

    def forward(self, x, y, w):
        """x, y (B, 3, S, S); w (B, N) or (N,) -> score (B,), [the output of each of V's blocks]."""
        v, features = self.V(x, y)                              # (B, N)
        return (v * w).sum(dim=1) + self.b, features            # (B,): eq. 5, eq. 8
