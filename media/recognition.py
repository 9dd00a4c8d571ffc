"""dlib's face recognition network in PyTorch, and whether two faces are one person's by its vectors.

    vector = dlib_recognition()
    same = vector(frame_a, points_a) @ vector(frame_b, points_b) > SAME     # uint8 (S, S, 3), (68, 2)

The network's weights are in the public domain. The package face-recognition-models contains them as dlib (a
C++ library) stored them, so nothing has to be downloaded.
"""
import functools
from collections.abc import Callable
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from media.faces import dlib_model, five_points

# Thresholds for the cosine of two vectors of dlib_recognition(), measured on 1,609 people of LFW (Labeled
# Faces in the Wild):
STRANGERS = 0.90    # below: 98 % of the pairs of strangers, and 0.7 % of the pairs of one person's photos
SAME = 0.92         # above: 96 % of the pairs of one person's photos, and 0.2 % of the pairs of strangers


class Recognition(NamedTuple):
    """How to tell people apart: by a network's vectors, and thresholds for the cosine of two of them."""
    vector: Callable    # (frame uint8 (S, S, 3), landmarks (68, 2)) -> vector (d,) of norm 1
    same: float         # two vectors whose cosine is above this show the same person
    strangers: float    # two vectors whose cosine is below this show two people


def dlib_recognition():
    """-> a function (frame uint8 (S, S, 3), landmarks (68, 2)) -> vector (128,) float64 of norm 1.

    The network is built at the first call of that function.
    """
    net = functools.cache(lambda: FaceFeatures().eval())

    @torch.no_grad()
    def vector(frame, points):
        x = torch.from_numpy(np.array(frame)).movedim(-1, 0)[None].float() / 127.5 - 1      # (1, 3, S, S)
        v = net().vectors(x, points[None])[0].double().numpy()
        return v / np.linalg.norm(v)

    return vector


def tell_apart():
    """-> the Recognition by which a Follower finds the same person again in a video."""
    return Recognition(dlib_recognition(), SAME, STRANGERS)


def are_several(vectors):
    """Whether photos seem to show several people. vectors: from dlib_recognition(), one for each photo.

    They do if at least half of the pairs of photos look like strangers. With up to four photos of each of
    1,609 people of LFW, this is wrong for 9 people (1 in 179). It is right for all of 300 sets of four photos
    of four people, and for 98 % of 300 sets with two photos of each of two people.
    """
    strangers = [a @ b < STRANGERS for a, b in combinations(vectors, 2)]
    return bool(strangers) and np.mean(strangers) >= 0.5


# --------------------------------------------------------------------------------------------- the network

FACE_LAYERS = (3, 7, 10, 13, 14)    # the last blocks with 32, 64 and 128 channels, and the last two with 256


class FaceFeatures(nn.Module):
    """dlib's recognition network, a ResNet with 29 convolutions.

    It returns the activations of FACE_LAYERS, and last the vector (B, 128) that identifies the person.
    """

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
        """Sees the middle three quarters of a crop, which is about what dlib's own alignment keeps."""
        edge = x.shape[-1] // 8
        middle = x[..., edge:-edge, edge:-edge]                 # (B, 3, 3/4 S, 3/4 S)
        middle = F.interpolate(middle, size=(150, 150), mode="bilinear", antialias=True)
        return self.activations(middle)

    def vectors(self, x, points):
        """x (B, 3, S, S) in [-1, 1], landmarks (B, 68, 2) in its pixels -> (B, 128), not normalised."""
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
        return [features[k] for k in FACE_LAYERS] + [h.mean((2, 3)) @ self.matrix]      # [..., (B, 128)]


# Where five_points() lie in dlib's aligned face of 150 pixels: means over photos of LFW.
CHIP_POINTS = [(48.1, 46.6), (100.0, 46.7), (73.3, 75.3), (50.8, 104.3), (97.9, 104.3)]


def face_chips(x, points, size=150):
    """Faces rotated, scaled and cropped as dlib aligns them for its network, which it calls chips.

    x (B, 3, S, S), landmarks (B, 68, 2) in its pixels -> (B, 3, size, size), differentiable in x.
    """
    S = x.shape[-1]
    if S > 256:     # because grid_sample would skip pixels
        x = F.avg_pool2d(x, S // 256)

    # The similarity transform from the chip to the picture, both with borders at -1 and 1, by least squares
    # in complex numbers: end = turn * start + shift.
    ends = (five_points(points) + 0.5) * 2 / S - 1                              # (B, 5, 2)
    starts = (np.array(CHIP_POINTS) + 0.5) * 2 / size - 1                       # (5, 2)
    A = np.stack([starts @ [1, 1j], np.ones(5)], axis=1)                        # (5, 2)
    turn, shift = np.linalg.lstsq(A, (ends @ [1, 1j]).T, rcond=None)[0]         # (B,), (B,)
    theta = np.array([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]])
    theta = torch.as_tensor(theta.transpose(2, 0, 1), dtype=x.dtype, device=x.device)       # (B, 2, 3)
    grid = F.affine_grid(theta, (len(x), 3, size, size), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def padded_alike(a, b):
    """Pad both with zeros at the end of C, H and W to the larger of their sizes, as dlib does to add them."""
    C, H, W = (max(pair) for pair in zip(a.shape[1:], b.shape[1:]))
    pad = lambda t: F.pad(t, (0, W - t.shape[3], 0, H - t.shape[2], 0, C - t.shape[1]))
    return pad(a), pad(b)


class DlibTensors:
    """Reads the tensors of a dlib network file in their order; each is found by the sizes in its header."""

    def __init__(self, path):
        with open(path, "rb") as file:
            self.bytes, self.position = file.read(), 0

    def tensor(self, *shape):
        """The next tensor of this shape.

        The format is: version 2, four sizes (for each the number of its bytes, then these bytes), float32
        values. Only matrices keep their shape; all other tensors are stored flat.
        """
        def number(n):
            length = (n.bit_length() + 7) // 8
            return bytes([length]) + n.to_bytes(length, "little")

        sizes = shape if len(shape) == 2 else (int(np.prod(shape)), 1)
        header = b"\1\2" + b"".join(map(number, (*sizes, 1, 1)))
        start = self.bytes.index(header, self.position) + len(header)
        self.position = start + 4 * int(np.prod(shape))
        return torch.from_numpy(np.frombuffer(self.bytes[start:self.position], "<f4").copy()).view(shape)

    def conv(self, c_in, c_out, size, stride=1):
        """The next convolution, merged with the affine layer (a folded batch norm) that follows it."""
        both = self.tensor(c_out * (c_in * size * size + 1))
        scale, shift = self.tensor(2 * c_out).chunk(2)
        conv = nn.Conv2d(c_in, c_out, size, stride, padding=size // 2 if stride == 1 else 0)
        conv.weight.data = both[:-c_out].view(c_out, c_in, size, size) * scale[:, None, None, None]
        conv.bias.data = both[-c_out:] * scale + shift
        return conv
