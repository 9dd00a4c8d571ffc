"""The losses of Sec. 3.2 and 3.3. Images are (B, 3, S, S) in [-1, 1]; every loss is a scalar tensor.

    L   = L_CNT + L_ADV + L_MCH      of E and G in meta-learning     (eq. 3; L_ADV is eq. 4)
    L'  = L_CNT + L_ADV              of psi, psi' in fine-tuning     (eq. 9)
    L_DSC                            of D in both                    (eq. 6, eq. 10)
"""
import os
import sys
import urllib.error
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from faces import dlib_model
from files import UserError

FM_WEIGHT = 10.0                                # Sec. 3.4
BETAS = (0.0, 0.999)                            # of every Adam; not in the paper; as BigGAN and SAGAN
VGG19_WEIGHT, VGGFACE_WEIGHT = 0.15, 0.025      # Sec. 3.4
VGG19_LAYERS, VGGFACE_LAYERS = (1, 6, 11, 20, 29), (1, 6, 11, 18, 25)  # relu1_1 ... relu5_1 of torchvision's `features`
SQUEEZE_LAYERS, SQUEEZE_WEIGHT = (1, 4, 7, 9, 10, 11, 12), 0.2  # ours: the layers of LPIPS
FACE_WEIGHT, FACE_LAYERS = 10.0, (3, 7, 10, 13, 14)  # ours: in fine-tuning; the last blocks of 32, 64, 128 and 256 channels
PIXEL_WEIGHT = {"squeeze": 40.0, "l1": 100.0}  # ours: pixel L1, weighted to weigh what the paper's term does beside L_MCH


def l1(a, b):
    """Mean absolute difference, summed up in float32 also where autocast made the activations bfloat16."""
    return (a - b).abs().mean(dtype=torch.float32)


def hinge_loss(real_score, fake_score):
    """L_DSC, eq. 6 and 10: scores (B,) of real and generated frames -> mean over the batch."""
    return (F.relu(1 + fake_score) + F.relu(1 - real_score)).mean()


def adversarial_loss(fake_score):
    """The realism term of eq. 4: -D(x_hat, y, i), scores (B,) -> mean over the batch."""
    return -fake_score.mean()


def feature_matching_loss(fake_features, real_features):
    """L_FM of eq. 4: mean L1 per block of V, averaged over the blocks; no gradient to the real side."""
    return sum(l1(f, r.detach()) for f, r in zip(fake_features, real_features)) / len(fake_features)


def match_loss(e, w_i):
    """L_MCH of eq. 3: e (B, K, N), each of the K embeddings, against W_i (B, N).

    W_i is detached: eq. 3 is minimised over phi, psi and P alone.
    """
    return l1(e, w_i.detach()[:, None])


# ------------------------------------------------------------------------------------------ content loss

class ContentLoss(nn.Module):
    """L_CNT: weighted L1 between the activations of fixed networks on x_hat and x.

    kind "vgg":     VGG19 and VGGFace (Sec. 3.4) from MatConvNet files `vgg19` and `vggface`. Without the first,
                    torchvision's VGG19 (a download); without the second, that term is left out and a warning said.
    kind "squeeze": SqueezeNet 1.1 (a download of 5 MB) and L1 on pixels.      kind "l1": L1 on pixels alone.
    face: the weight of the term that stands in for VGGFace's, which needs no download; it is for where `vggface` is not.
    UserError where a file or a download cannot be had.
    """

    def __init__(self, kind, vgg19=None, vggface=None, face=0.0):
        super().__init__()
        self.kind, self.terms = kind, nn.ModuleList()
        if kind == "vgg":
            self.terms.append(caffe_features(vgg19, "E", VGG19_LAYERS, VGG19_WEIGHT) if vgg19 else torchvision_vgg19())
            if vggface:
                self.terms.append(caffe_features(vggface, "D", VGGFACE_LAYERS, VGGFACE_WEIGHT))
            elif not face:
                print("warning: no --vggface FILE, so the content loss lacks its VGGFace term and identity will suffer; "
                      "the file is vgg-face.mat, published by MatConvNet", file=sys.stderr)
        elif kind == "squeeze":
            self.terms.append(torchvision_squeezenet())
        self.face, self.face_weight = FaceFeatures() if face and not vggface else None, face
        self.requires_grad_(False).eval()

    def forward(self, x_hat, x):                                                # (B, 3, S, S) twice
        loss = PIXEL_WEIGHT[self.kind] * l1(x_hat, x) if self.kind in PIXEL_WEIGHT else 0.0
        for term in self.terms:
            with torch.no_grad():
                target = term(x)
            loss = loss + term.weight * sum(l1(f, t) for f, t in zip(term(x_hat), target))
        if self.face:
            with torch.no_grad():
                target = self.face(x)
            relative = [l1(f, t) / t.abs().mean(dtype=torch.float32) for f, t in zip(self.face(x_hat), target)]
            loss = loss + self.face_weight * sum(relative)
        return loss


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

    def forward(self, x):                                                       # (B, 3, S, S) in [-1, 1]
        h, features = ((x + 1) * 127.5 - self.mean) / self.std, []              # (B, 3, S, S), RGB
        for k, layer in enumerate(self.net):
            h = layer(h)
            if k in self.layers:
                features.append(h)                                              # (B, C_k, S_k, S_k)
        return features


class FaceFeatures(nn.Module):
    """dlib's recognition network, which knows identity where VGGFace cannot be had: public domain, no download.

    A ResNet of 29 convolutions; face-recognition-models holds it as a C++ program wrote it.
    """

    def __init__(self):
        super().__init__()
        read = DlibTensors(dlib_model("dlib_face_recognition_resnet_model_v1.dat"))
        self.stem = read.conv(3, 32, 7, stride=2)
        widths = [32, 32, 32, 32, 64, 64, 64, 64, 128, 128, 128, 256, 256, 256, 256]
        strides = [1, 1, 1, 2, 1, 1, 1, 2, 1, 1, 2, 1, 1, 2]
        self.blocks = nn.ModuleList(nn.Sequential(read.conv(a, b, 3, stride), nn.ReLU(), read.conv(b, b, 3))
                                    for a, b, stride in zip(widths, widths[1:], strides))
        self.register_buffer("matrix", read.tensor(256, 128))
        self.register_buffer("mean", torch.tensor([122.782, 117.001, 104.298]).view(1, 3, 1, 1))

    def forward(self, x):                                                       # (B, 3, S, S) in [-1, 1]
        """Looks at the middle three quarters, about what dlib's own alignment keeps, at the size that it was trained on."""
        a, b = x.shape[-1] // 8, x.shape[-1] - x.shape[-1] // 8
        return self.activations(F.interpolate(x[..., a:b, a:b], size=(150, 150), mode="bilinear", antialias=True))

    def activations(self, x):                                                   # (B, 3, 150, 150) in [-1, 1], RGB
        h = F.relu(self.stem(((x + 1) * 127.5 - self.mean) / 256))              # (B, 32, 72, 72)
        features = [h := F.max_pool2d(h, 3, 2)]                                 # (B, 32, 35, 35)
        for block in self.blocks:
            skip, h = h, block(h)                                               # (B, C, H, W): ... (B, 256, 3, 3)
            if h.shape != skip.shape:  # dlib pools the skip and fills up with zeros, whichever of the two is smaller
                skip = F.avg_pool2d(skip, 2)
                c, H, W = (max(pair) for pair in zip(h.shape[1:], skip.shape[1:]))
                h, skip = (F.pad(t, (0, W - t.shape[3], 0, H - t.shape[2], 0, c - t.shape[1])) for t in (h, skip))
            features.append(h := F.relu(h + skip))
        return [features[k] for k in FACE_LAYERS] + [h.mean((2, 3)) @ self.matrix]      # ..., (B, 128)


class DlibTensors:
    """The tensors of a network that dlib serialised, in their order: found by their sizes, which stand before them."""

    def __init__(self, path):
        with open(path, "rb") as file:
            self.bytes, self.position = file.read(), 0

    def tensor(self, *shape):
        """Version 2, four sizes (each as its length in bytes, then its bytes), float32s. All but a matrix are stored flat."""
        number = lambda n: bytes([size := (n.bit_length() + 7) // 8]) + n.to_bytes(size, "little")
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


def read_matconvnet(path):
    """A MatConvNet .mat file -> ([(filters (out, in, H, W), bias (out,)) of every conv layer], mean (3,)).

    Its networks were converted from Caffe and expect RGB, 0-255, minus the mean. UserError on any other file.
    Read in a process of its own: on some damaged files scipy does not raise but crashes.
    """
    if not os.path.isfile(path):
        raise UserError(f"no file {path}")
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            layers, mean = pool.submit(_matconvnet_arrays, path).result()
        layers = [tuple(torch.as_tensor(w, dtype=torch.float32) for w in layer) for layer in layers]
        mean = torch.as_tensor(mean, dtype=torch.float32).reshape(-1, 3).mean(0)
        # H x W x in x out; squeeze_me took away axes of length 1, which only the classifier's 1x1 layers have: not needed
        return [(f.permute(3, 2, 0, 1).contiguous(), b.flatten()) for f, b in layers if f.dim() == 4], mean
    except Exception as e:  # scipy raises many types on foreign or damaged files
        raise UserError(f"{path} is not a MatConvNet network ({type(e).__name__}: {' '.join(str(e).split())})") from None


def _matconvnet_arrays(path):
    from scipy.io import loadmat  # arrives with face-alignment; only this function needs it
    mat = loadmat(path, squeeze_me=True, struct_as_record=False)
    meta = mat.get("meta")
    normalization = meta.normalization if meta is not None else mat["normalization"]    # the newer, the older files
    return [list(layer.weights) for layer in mat["layers"] if layer.type == "conv"], normalization.averageImage


def caffe_features(path, letter, layers, weight):
    """A Caffe-trained VGG (torchvision's letter E: VGG19, D: VGG16, which VGGFace is) as Features."""
    from torchvision.models.vgg import cfgs, make_layers
    net = make_layers(cfgs[letter])[:max(layers) + 1]
    tensors, mean = read_matconvnet(path)
    convs = [m for m in net if isinstance(m, nn.Conv2d)]
    if [(f.shape, b.shape) for f, b in tensors[:len(convs)]] != [(m.weight.shape, m.bias.shape) for m in convs]:
        raise UserError(f"{path} does not hold a {'VGG19' if letter == 'E' else 'VGG16, as VGGFace is'}: its layers differ")
    for module, (filters, bias) in zip(convs, tensors):
        module.weight.data, module.bias.data = filters, bias
    return Features(net, layers, mean, (1.0, 1.0, 1.0), weight)


def torchvision_vgg19():
    """Without the Caffe file: torchvision's VGG19 with its own mean and std.

    It sees inputs about 58 times smaller than Caffe's, so its activations are multiplied back by that much:
    the weight 0.15 makes sense on Caffe's scale only.
    """
    from torchvision.models import VGG19_Weights
    from torchvision.models.vgg import cfgs, make_layers
    mean, std = imagenet_mean_std()
    net = make_layers(cfgs["E"])
    net.load_state_dict(download(VGG19_Weights.IMAGENET1K_V1, "--vgg19 FILE or --content l1"))
    return Features(net, VGG19_LAYERS, mean, std, VGG19_WEIGHT * sum(std) / 3)


def torchvision_squeezenet():
    from torchvision.models import SqueezeNet1_1_Weights, squeezenet1_1
    mean, std = imagenet_mean_std()
    net = squeezenet1_1().features
    net.load_state_dict(download(SqueezeNet1_1_Weights.IMAGENET1K_V1, "--content l1"))
    return Features(net, SQUEEZE_LAYERS, mean, std, SQUEEZE_WEIGHT)


def imagenet_mean_std():
    """On the scale 0-255; torchvision's networks share them."""
    return [255 * m for m in (0.485, 0.456, 0.406)], [255 * s for s in (0.229, 0.224, 0.225)]


def download(weights, otherwise):
    """The `features` part of torchvision weights, from torch hub's cache folder or the network."""
    name = os.path.basename(weights.url)
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    try:
        state = weights.get_state_dict(progress=True, check_hash=True, map_location="cpu")
    except (urllib.error.URLError, OSError, RuntimeError) as e:
        raise UserError(f"cannot download {name} ({e}): put it into {folder} yourself, or use {otherwise}") from None
    return {k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")}
