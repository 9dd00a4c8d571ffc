"""Ours: an identity loss of fine-tuning (Sec. 3.3) for poses that the photos do not show.

Eq. 9 compares generated frames with the photos, which show few poses, while the driver turns the head to many
others. So in every step G' also draws the person's 3-D face in random poses and with random expressions. A
face recognition network (dlib's, which stands in for VGGFace) compares the identity in these frames with that
on the photos.
"""
import numpy as np
import torch
import torch.nn.functional as F

from beyond.adapt import describe, random_poses
from beyond.face3d import load_face3d
from data import landmark_images
from runtime.device import autocast

LIKENESS_WEIGHT = 20.0
POSES = 2       # the number of random poses in each step


class OtherPoses:
    """An endless supply of other poses of a person, and the identity loss of frames in these poses."""

    def __init__(self, x, points, network):
        """x: photos (T, 3, S, S) in [-1, 1].

        points: a list of landmarks (m, 68, 2), one for each photo (m = 1) or clip, T faces in all.
        network: media.recognition.FaceFeatures, on the device of x.
        """
        self.network, self.size, self.device = network, x.shape[-1], x.device
        self.identity = self._vectors(x, np.concatenate(points)).mean(0)        # (128,)
        model = load_face3d()
        self.poses = random_poses(describe(points, model), model)

    @torch.no_grad()
    def _vectors(self, x, points):
        batches = zip(x.split(8), np.array_split(points, range(8, len(points), 8)))
        return torch.cat([self.network.vectors(*batch) for batch in batches])   # (T, 128)

    def draw(self):
        """Draw the next poses -> their landmark images, (POSES, 3, S, S) in [-1, 1]."""
        self.points = np.stack([next(self.poses) for _ in range(POSES)])        # (n, 68, 2)
        return landmark_images(self.points, self.size, self.device)

    def loss(self, x_o):
        """The weighted loss of frames x_o (n, 3, S, S) in [-1, 1], generated in the poses drawn last.

        It is 1 - the cosine between the recognition network's vectors of the frames and of the photos.
        """
        with autocast(x_o.device):
            vectors = self.network.vectors(x_o, self.points)                    # (n, 128)
            return LIKENESS_WEIGHT * (1 - F.cosine_similarity(vectors, self.identity[None]).mean())


def other_poses(x, points, content):
    """-> OtherPoses, or None if the content loss has no FaceTerm, whose network this uses."""
    return OtherPoses(x, points, content.extra.net) if content and content.extra else None
