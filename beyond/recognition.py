"""Ours: dlib's face recognition network, which says who somebody is.

It stands in for VGGFace in the content loss where that file cannot be had, tells whether two pictures show
one person, and is what E is taught in teach.py. It is in the public domain, and face-recognition-models
holds it as dlib, a C++ library, wrote it, so that nothing has to be downloaded.
"""
import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data import to_float
from losses import l1
from media.faces import dlib_model, five_points
from media.following import Recognition

FACE_LAYERS = (3, 7, 10, 13, 14)    # the last blocks of 32, 64, 128 and 256 channels
FACE_WEIGHT = 10.0                  # of FaceTerm in fine-tuning


class FaceTerm(nn.Module):
    """A term of the content loss: the relative L1 of each output of dlib's network, weighted.

    vector_weight: of its last output, which says who it is, beside 1 of each other.
    """

    def __init__(self, weight=FACE_WEIGHT, vector_weight=1.0):
        super().__init__()
        self.net, self.weight, self.vector_weight = FaceFeatures(), weight, vector_weight

    def forward(self, x_hat, x):                                # (B, 3, S, S) twice
        with torch.no_grad():
            target = self.net(x)
        sizes = [t.abs().mean(dtype=torch.float32) for t in target]
        *look, who = [l1(f, t) / size for f, t, size in zip(self.net(x_hat), target, sizes)]
        return self.weight * (sum(look) + self.vector_weight * who)


# The cosine of two photos' vectors by dlib_recognition(), measured on 1,609 people of LFW:
STRANGERS = 0.90    # below it lie 0.7 % of the pairs of one person's photos, and 98 % of those of strangers
SAME = 0.92         # above it lie 0.2 % of the pairs of strangers, and 96 % of those of one person's photos


def dlib_recognition():
    """-> vector(frame uint8 (S, S, 3), points (68, 2)): 128 numbers of norm 1 that say who it is.

    The network is built when it is first asked.
    """
    net = functools.cache(lambda: FaceFeatures().eval())

    @torch.no_grad()
    def vector(frame, points):
        x = to_float(torch.from_numpy(np.array(frame)).movedim(-1, 0)[None])
        v = net().vectors(x, points[None])[0].double().numpy()
        return v / np.linalg.norm(v)

    return vector


def tell_apart():
    """-> a Recognition, by which a video's Follower goes back to a person."""
    return Recognition(dlib_recognition(), SAME)


class FaceFeatures(nn.Module):
    """dlib's recognition network, a ResNet of 29 convolutions, in PyTorch."""

    def __init__(self):
        super().__init__()
        read = DlibTensors(dlib_model("dlib_face_recognition_resnet_model_v1.dat"))
        self.stem = read.conv(3, 32, 7, stride=2)
        widths = [32, 32, 32, 32, 64, 64, 64, 64, 128, 128, 128, 256, 256, 256, 256]
        strides = [1, 1, 1, 2, 1, 1, 1, 2, 1, 1, 2, 1, 1, 2]
        self.blocks = nn.ModuleList(
            nn.Sequential(read.conv(c_in, c_out, 3, stride), nn.ReLU(), read.conv(c_out, c_out, 3))
            for c_in, c_out, stride in zip(widths, widths[1:], strides))
        self.register_buffer("matrix", read.tensor(256, 128))
        self.register_buffer("mean", torch.tensor([122.782, 117.001, 104.298]).view(1, 3, 1, 1))

    def forward(self, x):                                       # (B, 3, S, S) in [-1, 1]
        """Looks at the middle three quarters, about what dlib's own alignment keeps, at its own size."""
        edge = x.shape[-1] // 8
        middle = x[..., edge:-edge, edge:-edge]                 # (B, 3, 3/4 S, 3/4 S)
        middle = F.interpolate(middle, size=(150, 150), mode="bilinear", antialias=True)
        return self.activations(middle)

    def vectors(self, x, points):
        """Who they are: x (B, 3, S, S), landmarks (B, 68, 2) in its pixels -> (B, 128)."""
        return self.activations(face_chips(x, points))[-1]

    def activations(self, x):                                   # (B, 3, 150, 150) in [-1, 1], RGB
        h = F.relu(self.stem(((x + 1) * 127.5 - self.mean) / 256))  # (B, 32, 72, 72)
        h = F.max_pool2d(h, 3, 2)                               # (B, 32, 35, 35)
        features = [h]
        for block in self.blocks:
            skip, h = h, block(h)                               # (B, C, H, W): ... (B, 256, 2, 2)
            if h.shape != skip.shape:
                h, skip = padded_alike(h, F.avg_pool2d(skip, 2))
            h = F.relu(h + skip)
            features.append(h)
        return [features[k] for k in FACE_LAYERS] + [h.mean((2, 3)) @ self.matrix]      # ..., (B, 128)


# Where dlib's aligned face of 150 pixels has the person's right eye, left eye, nose and corners of the mouth:
# means over photos of LFW.
CHIP_POINTS = [(48.1, 46.6), (100.0, 46.7), (73.3, 75.3), (50.8, 104.3), (97.9, 104.3)]


def face_chips(x, points, size=150):
    """Faces turned, scaled and cut as dlib does it before its network looks at them; differentiable.

    x (B, 3, S, S), landmarks (B, 68, 2) in its pixels -> (B, 3, 150, 150).
    """
    S = x.shape[-1]
    if S > 256:     # not to skip pixels
        x = F.avg_pool2d(x, S // 256)

    # the similarity from the chip to the picture, least squares of complex numbers; -1 and 1 are the borders
    ends = (five_points(points) + 0.5) * 2 / S - 1                              # (B, 5, 2)
    starts = (np.array(CHIP_POINTS) + 0.5) * 2 / size - 1                       # (5, 2)
    A = np.stack([starts @ [1, 1j], np.ones(5)], axis=1)                        # (5, 2)
    turn, shift = np.linalg.lstsq(A, (ends @ [1, 1j]).T, rcond=None)[0]         # (B,), (B,)
    theta = np.array([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]])
    theta = torch.as_tensor(theta.transpose(2, 0, 1), dtype=x.dtype, device=x.device)       # (B, 2, 3)
    grid = F.affine_grid(theta, (len(x), 3, size, size), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def padded_alike(a, b):
    """Both filled up with zeros behind, to the larger one's size in every dimension: so dlib adds them."""
    C, H, W = (max(pair) for pair in zip(a.shape[1:], b.shape[1:]))
    pad = lambda t: F.pad(t, (0, W - t.shape[3], 0, H - t.shape[2], 0, C - t.shape[1]))
    return pad(a), pad(b)


class DlibTensors:
    """The tensors of a network that dlib wrote, in their order, found by the sizes that precede them."""

    def __init__(self, path):
        with open(path, "rb") as file:
            self.bytes, self.position = file.read(), 0

    def tensor(self, *shape):
        """The next tensor of this shape: version 2, four sizes (each its length in bytes, then its bytes),
        float32s. All but a matrix are stored flat."""
        def number(n):
            length = (n.bit_length() + 7) // 8
            return bytes([length]) + n.to_bytes(length, "little")

        sizes = shape if len(shape) == 2 else (int(np.prod(shape)), 1)
        header = b"\1\2" + b"".join(map(number, (*sizes, 1, 1)))
        start = self.bytes.index(header, self.position) + len(header)
        self.position = start + 4 * int(np.prod(shape))
        return torch.from_numpy(np.frombuffer(self.bytes[start:self.position], "<f4").copy()).view(shape)

    def conv(self, c_in, c_out, size, stride=1):
        """A convolution and the affine layer behind it, the rest of a batch norm, in one."""
        both = self.tensor(c_out * (c_in * size * size + 1))
        scale, shift = self.tensor(2 * c_out).chunk(2)
        conv = nn.Conv2d(c_in, c_out, size, stride, padding=size // 2 if stride == 1 else 0)
        conv.weight.data = both[:-c_out].view(c_out, c_in, size, size) * scale[:, None, None, None]
        conv.bias.data = both[-c_out:] * scale + shift
        return conv
