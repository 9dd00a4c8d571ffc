"""Ours: a term of the content loss with dlib's recognition network, where VGGFace's file cannot be had."""
import torch
from torch import nn

from losses import l1
from media.recognition import FaceFeatures

FACE_WEIGHT = 10.0      # of FaceTerm in fine-tuning


class FaceTerm(nn.Module):
    """The relative L1 between the network's outputs on x_hat and x: a weighted sum over its outputs.

    vector_weight: the weight of the last output, which identifies the person; the others have weight 1.
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
