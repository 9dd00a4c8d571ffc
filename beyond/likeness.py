"""Ours, a further loss of fine-tuning (Sec. 3.3): who it is should show in other poses than the photo's, too.

Eq. 9 compares with the photos, which show few poses, while the driver takes the face to others. So in every
step G' also draws the person's 3-D face in random poses and with random expressions, and dlib's recognition
network, which stands in for VGGFace, must know the person there.
"""
import numpy as np
import torch
import torch.nn.functional as F

from beyond.adapt import describe, random_poses
from beyond.face3d import load_face3d
from data import landmark_images
from runtime.device import autocast

LIKENESS_WEIGHT = 20.0
POSES = 2       # drawn in every step


class OtherPoses:
    """A person in endless other poses, and how far frames of these are from who it is."""

    def __init__(self, x, points, network):
        """x: photos (T, 3, S, S) in [-1, 1].  points: landmarks (m, 68, 2) of each photo (m = 1) and clip.

        network: perceptual.FaceFeatures, on the device of x.
        """
        self.network, self.size, self.device = network, x.shape[-1], x.device
        self.who = self._vectors(x, np.concatenate(points)).mean(0)             # (128,)
        face = load_face3d()
        self.poses = random_poses(describe(points, face), face)

    @torch.no_grad()
    def _vectors(self, x, points):
        parts = zip(x.split(8), np.array_split(points, range(8, len(points), 8)))
        return torch.cat([self.network.vectors(*part) for part in parts])       # (T, 128)

    def draw(self):
        """-> the landmarks of some more poses as images, (n, 3, S, S)."""
        self.points = np.stack([next(self.poses) for _ in range(POSES)])        # (n, 68, 2)
        return landmark_images(self.points, self.size, self.device)

    def loss(self, x_o):
        """1 - cosine of dlib's vectors: of frames (n, 3, S, S) in the poses drawn last, and of the photos."""
        with autocast(x_o.device):
            vectors = self.network.vectors(x_o, self.points)                    # (n, 128)
            return LIKENESS_WEIGHT * (1 - F.cosine_similarity(vectors, self.who[None]).mean())


def other_poses(x, points, content):
    """OtherPoses, or None where `content` does without dlib's network, which has to know the person."""
    return OtherPoses(x, points, content.face) if content and content.face else None
