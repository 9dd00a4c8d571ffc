"""The losses of Sec. 3.2 and 3.3. Images are (B, 3, S, S) in [-1, 1]; every loss is a scalar tensor.

    L   = L_CNT + L_ADV + L_MCH      for E and G in meta-learning    (eq. 3; L_ADV is eq. 4)
    L'  = L'_CNT + L'_ADV            for psi, psi' in fine-tuning    (eq. 9)
    L_DSC                            for D in both stages            (eq. 6, eq. 10)

The second half of the file has the fixed networks of L_CNT: VGG19 and VGGFace from MatConvNet's files
(Sec. 3.4), VGG19 and SqueezeNet 1.1 from torchvision.
"""
import os
import urllib.error
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
import torch.nn.functional as F
from torch import nn

from runtime.files import UserError, raise_if_out_of_memory, warn

FM_WEIGHT, MATCH_WEIGHT = 10.0, 10.0            # Sec. 3.4
VGG19_WEIGHT, VGGFACE_WEIGHT = 0.15, 0.025      # Sec. 3.4
BETAS = (0.0, 0.999)                            # Adam's; the paper does not give them, BigGAN uses these

# Ours, for small machines. With --content squeeze, the loss is about as large as with the VGG networks. The
# weight of L1 alone was chosen in fine-tuning, where it is used together with dlib's recognition network.
SQUEEZE_WEIGHT = 0.2
PIXEL_WEIGHT = {"vgg": 0.0, "squeeze": 40.0, "l1": 300.0}


def l1(a, b):
    """The mean absolute difference, computed in float32 even if autocast made the activations bfloat16."""
    return (a - b).abs().mean(dtype=torch.float32)


def hinge_loss(real_score, fake_score):
    """L_DSC, eq. 6 and 10: scores (B,) of real and generated frames -> mean over the batch."""
    return (F.relu(1 + fake_score) + F.relu(1 - real_score)).mean()


def adversarial_loss(fake_score):
    """The realism term of eq. 4: -D(x_hat, y, i), scores (B,) -> mean over the batch."""
    return -fake_score.mean()


def feature_matching_loss(fake_features, real_features):
    """L_FM of eq. 4: 10 times the mean L1 between V's outputs for x_hat and x, averaged over V's blocks.

    The paper's text reads as a sum over blocks; the authors' later code takes the mean.
    """
    terms = [l1(fake, real.detach()) for fake, real in zip(fake_features, real_features)]
    return FM_WEIGHT * sum(terms) / len(terms)


def match_loss(e, w_i, weight=MATCH_WEIGHT):
    """L_MCH of eq. 3: the weight times the L1 between each of the K embeddings e (B, K, N) and W_i (B, N).

    Like every L1 here, it is a mean over elements, not a sum. W_i is detached, because eq. 3 is minimised
    over phi, psi and P alone.
    """
    return weight * l1(e, w_i.detach()[:, None])


class ContentLoss(nn.Module):
    """L_CNT: weighted L1 between the activations of fixed networks on x_hat and x (Sec. 3.4).

    kind "vgg":      VGG19 and VGGFace from MatConvNet's files `vgg19` and `vggface`. Without the first,
                     torchvision's VGG19 is downloaded; without the second, its term is missing.
    kind "squeeze":  SqueezeNet 1.1 (a download of 5 MB) and L1 on pixels.
    kind "l1":       L1 on pixels alone.
    extra:           ours: a module (x_hat, x) -> scalar whose value is added if `vggface` is not given.
    weight:          ours: the factor of the whole loss.
    Raises UserError if a file is missing or of another kind, or if a download fails.
    """

    def __init__(self, kind, vgg19=None, vggface=None, extra=None, weight=1.0):
        super().__init__()
        if kind != "vgg" and (vgg19 or vggface):
            raise UserError(f"--vgg19 and --vggface belong to --content vgg, but the content loss is {kind}: "
                            "add --content vgg or leave them out")
        self.kind, self.pixel_weight, self.terms = kind, PIXEL_WEIGHT[kind], nn.ModuleList()
        self.extra, self.weight = extra, weight
        self.add_extra = extra is not None and not vggface      # beyond.likeness uses extra.net in any case
        if kind == "vgg":
            self.terms.append(vgg19_features(vgg19, VGG19_WEIGHT))
            if vggface:
                self.terms.append(vggface_features(vggface, VGGFACE_WEIGHT))
            elif not extra:
                warn("without --vggface FILE the content loss has no VGGFace term, so people will be less "
                     "recognisable; MatConvNet publishes the file as vgg-face.mat")
        elif kind == "squeeze":
            self.terms.append(squeezenet_features(SQUEEZE_WEIGHT))
        self.requires_grad_(False).eval()

    def forward(self, x_hat, x):                                # (B, 3, S, S) twice
        loss = self.pixel_weight * l1(x_hat, x)
        for term in self.terms:
            with torch.no_grad():
                target = term(x)                                # (B, C_k, S_k, S_k) of each layer k
            loss = loss + term.weight * sum(l1(f, t) for f, t in zip(term(x_hat), target))
        if self.add_extra:
            loss = loss + self.extra(x_hat, x)
        return self.weight * loss


# ------------------------------------------------------------------------ the fixed networks of L_CNT

VGG19_LAYERS = (1, 6, 11, 20, 29)               # Sec. 3.4: relu1_1 ... relu5_1 of torchvision's `features`
VGGFACE_LAYERS = (1, 6, 11, 18, 25)             # the same layers of VGG16, VGGFace's architecture
SQUEEZE_LAYERS = (1, 4, 7, 9, 10, 11, 12)       # ours: the layers of LPIPS
IMAGENET_MEAN = [255 * m for m in (0.485, 0.456, 0.406)]
IMAGENET_STD = [255 * s for s in (0.229, 0.224, 0.225)]


class Features(nn.Module):
    """A fixed network that returns the activations of `layers`.

    forward() takes images in [-1, 1] and feeds the network with (RGB levels - mean) / std.
    """

    def __init__(self, net, layers, mean, std, weight):
        super().__init__()
        self.net, self.layers, self.weight = net[:max(layers) + 1], layers, weight
        for module in self.net:
            if isinstance(module, nn.ReLU):
                module.inplace = False  # it would overwrite the activation that we return
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
    """VGG19 from MatConvNet's file, or torchvision's if path is None.

    torchvision's VGG19 takes inputs that are about 58 times smaller than Caffe's. The paper's weight of 0.15
    belongs to Caffe's scale, so it is multiplied by 58. That this is right for all layers is a guess.
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
    """A VGG that was trained in Caffe, as Features.

    letter: torchvision's name for the architecture: E is VGG19, D is VGG16, which VGGFace uses.
    """
    from torchvision.models.vgg import cfgs, make_layers
    net = make_layers(cfgs[letter])[:max(layers) + 1]
    tensors, mean = read_matconvnet(path)
    convs = [m for m in net if isinstance(m, nn.Conv2d)]
    wanted = [(m.weight.shape, m.bias.shape) for m in convs]
    if [(filters.shape, bias.shape) for filters, bias in tensors[:len(convs)]] != wanted:
        name = "VGG19" if letter == "E" else "VGGFace (a VGG16)"
        raise UserError(f"{path} does not hold {name}: its layers have other shapes")
    for module, (filters, bias) in zip(convs, tensors):
        module.weight.data, module.bias.data = filters, bias
    return Features(net, layers, mean, (1.0, 1.0, 1.0), weight)


def read_matconvnet(path):
    """A MatConvNet .mat file -> ([(filters (out, in, H, W), bias (out,))] of the conv layers, mean (3,)).

    These networks were converted from Caffe and expect RGB levels of 0 to 255 minus the mean. The file is
    read in a process of its own, because some damaged files crash scipy. Raises UserError if it is not such a
    network.
    """
    if not os.path.isfile(path):
        raise UserError(f"no file {path}")
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            layers, mean = pool.submit(_matconvnet_arrays, path).result()
        layers = [tuple(torch.as_tensor(w, dtype=torch.float32) for w in layer) for layer in layers]
        mean = torch.as_tensor(mean, dtype=torch.float32).reshape(-1, 3).mean(0)
        # Filters are stored as (H, W, in, out). squeeze_me has removed axes of length 1, which only the
        # layers of the classifier have, and they are not needed.
        layers = [(f.permute(3, 2, 0, 1).contiguous(), b.flatten()) for f, b in layers if f.dim() == 4]
        return layers, mean
    except Exception as e:  # scipy raises many types of exception on foreign or damaged files
        raise_if_out_of_memory(e)
        reason = f"{type(e).__name__}: {' '.join(str(e).split())}"
        raise UserError(f"{path} is not a MatConvNet network ({reason})") from None


def _matconvnet_arrays(path):
    from scipy.io import loadmat  # installed with face-alignment; only this function needs it
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
    """The `features` part of torchvision weights, from torch hub's cache folder or by download."""
    name = os.path.basename(weights.url)
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    try:
        state = weights.get_state_dict(progress=True, check_hash=True, map_location="cpu")
    except (urllib.error.URLError, OSError, RuntimeError) as e:
        raise UserError(f"cannot download {name} ({e}): put the file into {folder}, "
                        f"or use {otherwise}") from None
    return {k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")}
