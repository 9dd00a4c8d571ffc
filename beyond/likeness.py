"""Ours: two losses of fine-tuning (Sec. 3.3) for poses that the photos do not show.

Eq. 9 compares generated frames with the photos, which show few poses, while the driver turns the head to many
others. So in every step G' also draws the person's 3-D face in random poses and with random expressions.

(1) A face recognition network (dlib's, which stands in for VGGFace) compares the identity in these frames
    with that on the photos.
(2) Between the lips, the frames have to stay as they were before fine-tuning. Otherwise a person whose photo
    shows a shut mouth opens it to show more skin, or a bluish grey, instead of teeth.
"""
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from beyond.adapt import describe, random_poses
from beyond.face3d import load_face3d
from data import landmark_images
from runtime.device import autocast

LIKENESS_WEIGHT = 20.0
MOUTH_WEIGHT = 1000.0   # with 300, the weight of L1 on the photos, teeth stayed dull
POSES = 2               # the number of random poses in each step


class OtherPoses:
    """An endless supply of other poses of a person, and the losses of frames in these poses."""

    def __init__(self, x, points, network, before):
        """x: photos (T, 3, S, S) in [-1, 1].

        points: a list of landmarks (m, 68, 2), one for each photo (m = 1) or clip, T faces in all.
        network: media.recognition.FaceFeatures, on the device of x.
        before: draws the person without fine-tuning, landmark images (n, 3, S, S) -> frames (n, 3, S, S).
        """
        self.network, self.before, self.size, self.device = network, before, x.shape[-1], x.device
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
        self.y = landmark_images(self.points, self.size, self.device)
        return self.y

    def loss(self, x_o):
        """The weighted losses of frames x_o (n, 3, S, S) in [-1, 1], generated in the poses drawn last.

        (1) is 1 - the cosine between the recognition network's vectors of the frames and of the photos.
        (2) is the L1 between the lips, as a mean over all pixels.
        """
        with autocast(x_o.device):
            vectors = self.network.vectors(x_o, self.points)                    # (n, 128)
            likeness = 1 - F.cosine_similarity(vectors, self.identity[None]).mean()
            with torch.no_grad():
                x_before = self.before(self.y).float()                          # (n, 3, S, S)
        mouth = (between_lips(self.points, self.size, self.device) * (x_o - x_before).abs()).mean()
        return LIKENESS_WEIGHT * likeness + MOUTH_WEIGHT * mouth


def between_lips(points, size, device):
    """points (n, 68, 2) in pixels -> (n, 1, S, S): 1 within the inner lips, 0 elsewhere."""
    masks = [Image.new("L", (size, size)) for _ in points]
    for mask, p in zip(masks, points):
        ImageDraw.Draw(mask).polygon([tuple(point) for point in p[60:68].tolist()], fill=1)
    return torch.from_numpy(np.stack(masks)).to(device)[:, None].float()


def other_poses(x, points, content, G, psi):
    """-> OtherPoses, or None if the content loss has no FaceTerm, whose network this uses.

    G, psi (|psi|,): a generator that is not fine-tuned, and psi_hat of the person. A copy of G' that
    copy.deepcopy() made will not do, because within parametrize.cached() it has the weights of the original.
    """
    if not content or not content.extra:
        return None
    return OtherPoses(x, points, content.extra.net, lambda y: G.render(y, psi.expand(len(y), -1)))
