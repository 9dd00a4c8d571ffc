"""The losses of Sec. 3.2 and 3.3. Images are (B, 3, S, S) in [-1, 1]; every loss is a scalar tensor.

    L   = L_CNT + L_ADV + L_MCH      of E and G in meta-learning     (eq. 3; L_ADV is eq. 4)
    L'  = L_CNT + L_ADV              of psi, psi' in fine-tuning     (eq. 9)
    L_DSC                            of D in both                    (eq. 6, eq. 10)
"""
import torch
import torch.nn.functional as F
from torch import nn

from perceptual import FaceFeatures, squeezenet_features, vgg19_features, vggface_features
from runtime.files import UserError, warn

FM_WEIGHT = 10.0                                # Sec. 3.4
BETAS = (0.0, 0.999)                            # of the adversarial Adams; not in the paper; as BigGAN
VGG19_WEIGHT, VGGFACE_WEIGHT = 0.15, 0.025      # Sec. 3.4

# Ours, for small machines: they weigh what the paper's term does beside L_MCH.
SQUEEZE_WEIGHT = 0.2
PIXEL_WEIGHT = {"vgg": 0.0, "squeeze": 40.0, "l1": 100.0}
FACE_WEIGHT = 10.0                              # in fine-tuning, where VGGFace's file is missing


def l1(a, b):
    """Mean absolute difference, in float32 also where autocast made the activations bfloat16."""
    return (a - b).abs().mean(dtype=torch.float32)


def hinge_loss(real_score, fake_score):
    """L_DSC, eq. 6 and 10: scores (B,) of real and generated frames -> mean over the batch."""
    return (F.relu(1 + fake_score) + F.relu(1 - real_score)).mean()


def adversarial_loss(fake_score):
    """The realism term of eq. 4: -D(x_hat, y, i), scores (B,) -> mean over the batch."""
    return -fake_score.mean()


def feature_matching_loss(fake_features, real_features):
    """L_FM of eq. 4: mean L1 per block of V, averaged over the blocks; no gradient to the real side."""
    terms = [l1(fake, real.detach()) for fake, real in zip(fake_features, real_features)]
    return sum(terms) / len(terms)


def match_loss(e, w_i):
    """L_MCH of eq. 3: e (B, K, N), each of the K embeddings, against W_i (B, N).

    W_i is detached: eq. 3 is minimised over phi, psi and P alone.
    """
    return l1(e, w_i.detach()[:, None])


def face_terms(net, x_hat, x):
    """Ours: the relative L1 of each output of perceptual.FaceFeatures; the last says who it is."""
    with torch.no_grad():
        target = net(x)
    sizes = [t.abs().mean(dtype=torch.float32) for t in target]
    return [l1(f, t) / size for f, t, size in zip(net(x_hat), target, sizes)]


class ContentLoss(nn.Module):
    """L_CNT: weighted L1 between the activations of fixed networks on x_hat and x (Sec. 3.4).

    kind "vgg":      VGG19 and VGGFace from MatConvNet's files `vgg19` and `vggface`. Without the first,
                     torchvision's VGG19 (a download); without the second, that term is missing.
    kind "squeeze":  SqueezeNet 1.1 (a download of 5 MB) and L1 on pixels.
    kind "l1":       L1 on pixels alone.
    face:            weight of our stand-in for VGGFace, which needs no download: the relative L1 of
                     dlib's recognition network. It is left out where `vggface` is given.
    face_vector:     in it, the weight of the network's last output, which says who it is.
    UserError where a file or a download cannot be had, or is of another kind.
    """

    def __init__(self, kind, vgg19=None, vggface=None, face=0.0, face_vector=1.0):
        super().__init__()
        if kind != "vgg" and (vgg19 or vggface):
            raise UserError(f"--vgg19 and --vggface are for --content vgg, and here it is {kind}: add it")
        self.kind, self.pixel_weight, self.terms = kind, PIXEL_WEIGHT[kind], nn.ModuleList()
        if kind == "vgg":
            self.terms.append(vgg19_features(vgg19, VGG19_WEIGHT))
            if vggface:
                self.terms.append(vggface_features(vggface, VGGFACE_WEIGHT))
            elif not face:
                warn("no --vggface FILE, so the content loss lacks its VGGFace term and identity will "
                     "suffer; the file is vgg-face.mat, published by MatConvNet")
        elif kind == "squeeze":
            self.terms.append(squeezenet_features(SQUEEZE_WEIGHT))
        self.face = FaceFeatures() if face and not vggface else None
        self.face_weight, self.vector_weight = face, face_vector
        self.requires_grad_(False).eval()

    def forward(self, x_hat, x):                                # (B, 3, S, S) twice
        loss = self.pixel_weight * l1(x_hat, x)
        for term in self.terms:
            with torch.no_grad():
                target = term(x)                                # (B, C_k, S_k, S_k) of each layer k
            loss = loss + term.weight * sum(l1(f, t) for f, t in zip(term(x_hat), target))
        if self.face:
            *look, who = face_terms(self.face, x_hat, x)
            loss = loss + self.face_weight * (sum(look) + self.vector_weight * who)
        return loss
