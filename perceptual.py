"""The fixed networks of the content loss: what they see, which layers count, how their files are read.

VGG19 and VGGFace from MatConvNet's files (Sec. 3.4), VGG19 and SqueezeNet 1.1 from torchvision, and
dlib's recognition network, our stand-in for VGGFace where its file is missing.
"""
import os
import urllib.error
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from media.faces import dlib_model, five_points
from runtime.files import UserError

VGG19_LAYERS = (1, 6, 11, 20, 29)               # relu1_1 ... relu5_1 of torchvision's `features`
VGGFACE_LAYERS = (1, 6, 11, 18, 25)             # the same of a VGG16, which VGGFace is
SQUEEZE_LAYERS = (1, 4, 7, 9, 10, 11, 12)       # ours: the layers of LPIPS
FACE_LAYERS = (3, 7, 10, 13, 14)                # ours: the last blocks of 32, 64, 128 and 256 channels
IMAGENET_MEAN = [255 * m for m in (0.485, 0.456, 0.406)]
IMAGENET_STD = [255 * s for s in (0.229, 0.224, 0.225)]


class Features(nn.Module):
    """A fixed network that returns the activations of `layers`, fed with (pixels * 255 - mean) / std."""

    def __init__(self, net, layers, mean, std, weight):
        super().__init__()
        self.net, self.layers, self.weight = net[:max(layers) + 1], layers, weight
        for module in self.net:
            if isinstance(module, nn.ReLU):
                module.inplace = False  # an in-place ReLU would overwrite the activation we return
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32).view(1, 3, 1, 1))
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.float32).view(1, 3, 1, 1))

    def forward(self, x):                                       # (B, 3, S, S) in [-1, 1]
        h = ((x + 1) * 127.5 - self.mean) / self.std            # (B, 3, S, S), RGB
        features = []
        for k, layer in enumerate(self.net):
            h = layer(h)
            if k in self.layers:
                features.append(h)                              # (B, C_k, S_k, S_k)
        return features


# ---------------------------------------------------------------------------------- VGG19 and VGGFace

def vgg19_features(path, weight):
    """VGG19 from MatConvNet's file, or torchvision's where path is None.

    torchvision's sees inputs about 58 times smaller than Caffe's. The weight 0.15 makes sense on Caffe's
    scale only, so it is multiplied by that much: a guess, made for all layers alike.
    """
    if path:
        return matconvnet_features(path, "E", VGG19_LAYERS, weight)
    from torchvision.models import VGG19_Weights
    from torchvision.models.vgg import cfgs, make_layers
    net = make_layers(cfgs["E"])
    net.load_state_dict(download(VGG19_Weights.IMAGENET1K_V1, otherwise="--vgg19 FILE or --content l1"))
    return Features(net, VGG19_LAYERS, IMAGENET_MEAN, IMAGENET_STD, weight * sum(IMAGENET_STD) / 3)


def vggface_features(path, weight):
    return matconvnet_features(path, "D", VGGFACE_LAYERS, weight)


def matconvnet_features(path, letter, layers, weight):
    """A Caffe-trained VGG (torchvision's letter E: VGG19, D: VGG16, which VGGFace is) as Features."""
    from torchvision.models.vgg import cfgs, make_layers
    net = make_layers(cfgs[letter])[:max(layers) + 1]
    tensors, mean = read_matconvnet(path)
    convs = [m for m in net if isinstance(m, nn.Conv2d)]
    wanted = [(m.weight.shape, m.bias.shape) for m in convs]
    if [(filters.shape, bias.shape) for filters, bias in tensors[:len(convs)]] != wanted:
        name = "VGG19" if letter == "E" else "VGG16, as VGGFace is"
        raise UserError(f"{path} does not hold a {name}: its layers differ")
    for module, (filters, bias) in zip(convs, tensors):
        module.weight.data, module.bias.data = filters, bias
    return Features(net, layers, mean, (1.0, 1.0, 1.0), weight)


def read_matconvnet(path):
    """A MatConvNet .mat file -> ([(filters (out, in, H, W), bias (out,))] of the conv layers, mean (3,)).

    Its networks were converted from Caffe and expect RGB, 0-255, minus the mean. UserError on other
    files. Read in a process of its own: on some damaged files scipy does not raise but crashes.
    """
    if not os.path.isfile(path):
        raise UserError(f"no file {path}")
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            layers, mean = pool.submit(_matconvnet_arrays, path).result()
        layers = [tuple(torch.as_tensor(w, dtype=torch.float32) for w in layer) for layer in layers]
        mean = torch.as_tensor(mean, dtype=torch.float32).reshape(-1, 3).mean(0)
        # H x W x in x out. Axes of length 1 are gone, which only the classifier's layers had: not needed
        layers = [(f.permute(3, 2, 0, 1).contiguous(), b.flatten()) for f, b in layers if f.dim() == 4]
        return layers, mean
    except Exception as e:  # scipy raises many types on foreign or damaged files
        reason = f"{type(e).__name__}: {' '.join(str(e).split())}"
        raise UserError(f"{path} is not a MatConvNet network ({reason})") from None


def _matconvnet_arrays(path):
    from scipy.io import loadmat  # arrives with face-alignment; only this function needs it
    mat = loadmat(path, squeeze_me=True, struct_as_record=False)
    meta = mat.get("meta")
    normalization = meta.normalization if meta is not None else mat["normalization"]  # newer, older
    layers = [list(layer.weights) for layer in mat["layers"] if layer.type == "conv"]
    return layers, normalization.averageImage


# ----------------------------------------------------------------------------------------- SqueezeNet

def squeezenet_features(weight):
    from torchvision.models import SqueezeNet1_1_Weights, squeezenet1_1
    net = squeezenet1_1().features
    net.load_state_dict(download(SqueezeNet1_1_Weights.IMAGENET1K_V1, otherwise="--content l1"))
    return Features(net, SQUEEZE_LAYERS, IMAGENET_MEAN, IMAGENET_STD, weight)


def download(weights, otherwise):
    """The `features` part of torchvision weights, from torch hub's cache folder or the network."""
    name = os.path.basename(weights.url)
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    try:
        state = weights.get_state_dict(progress=True, check_hash=True, map_location="cpu")
    except (urllib.error.URLError, OSError, RuntimeError) as e:
        raise UserError(f"cannot download {name} ({e}): put it into {folder} yourself, "
                        f"or use {otherwise}") from None
    return {k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")}


# ------------------------------------------------------------------- dlib's recognition network

class FaceFeatures(nn.Module):
    """dlib's recognition network, which knows identity where VGGFace cannot be had. Public domain.

    A ResNet of 29 convolutions; face-recognition-models holds it as dlib, a C++ library, wrote it.
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
