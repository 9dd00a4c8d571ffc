"""likeness.py: the losses of fine-tuning in other poses, by hand."""
import numpy as np
import pytest
import torch

from beyond import likeness
from beyond.likeness import OtherPoses, other_poses
from beyond.recognition import FaceTerm
from beyond.toy import ToyHeads
from conftest import networks, pictures
from data import draw_landmarks, to_float
from finetune import learn_person
from losses import ContentLoss
from media.folders import Photo
from runtime.checkpoint import load_checkpoint


def test_other_poses_are_for_dlibs_network():
    """They need the network of a FaceTerm, which cartoon heads do without."""
    points, x = [ToyHeads(1).load(0, [0])[1]], torch.zeros(1, 3, 64, 64)
    assert not any(other_poses(x, points, content, None, None) for content in (None, ContentLoss("l1")))
    content = ContentLoss("l1", extra=FaceTerm())
    _, _, G, _ = networks()
    others = other_poses(x, points, content, G, torch.zeros(len(G.P.bias)))
    first, second = others.draw(), others.draw()
    assert first.shape[1:] == (3, 64, 64) and first.min() == -1 < first.max() <= 1
    assert not torch.equal(first, second)
    again = other_poses(x, points, content, G, torch.zeros(len(G.P.bias)))
    assert torch.equal(first, again.draw())     # so the same photo gives the same person file


class Seen:
    """Stands in for FaceFeatures. Its vectors are the colours and the place of the face."""

    def vectors(self, x, points):
        self.points = points
        return torch.cat([x.mean((2, 3)), torch.as_tensor(points).mean(1) / 64], dim=1)     # (B, 5)


def test_likeness_by_hand():
    """The target is the mean vector of the photos with their landmarks. The loss is 20 (1 - cosine).

    Between the lips, the frames are as before fine-tuning here.
    """
    _, points = ToyHeads(1).load(0, range(9))
    x, network = pictures(9), Seen()
    others = OtherPoses(x, [points[:1], points[1:]], network, lambda y: x_o)
    who = torch.stack([network.vectors(x[t:t + 1], points[t:t + 1])[0] for t in range(9)]).mean(0)
    for _ in range(2):
        y, x_o = others.draw(), pictures(2)
        loss = others.loss(x_o)
        drawn = np.stack([draw_landmarks(p, 64) for p in network.points])
        assert torch.equal(y, to_float(torch.from_numpy(drawn).movedim(-1, 1)))
        v = network.vectors(x_o, network.points)
        cosine = (v * who).sum(1) / (v.norm(dim=1) * who.norm())
        assert loss.item() == pytest.approx(20 * (1 - cosine.mean().item()), rel=1e-4)


def test_mouth_by_hand(monkeypatch):
    """1000 times the mean over all pixels of the L1 between the lips, here a rectangle of 20 x 5."""
    monkeypatch.setattr(likeness, "LIKENESS_WEIGHT", 0.0)
    points = ToyHeads(1).load(0, [0])[1]
    others = OtherPoses(pictures(1), [points], Seen(), lambda y: torch.full((2, 3, 64, 64), 0.25))
    others.draw()
    corners = [(20, 30), (39, 30), (39, 34), (20, 34)]
    others.points[:, 60:68] = np.repeat(corners, 2, axis=0)
    x_o = torch.full((2, 3, 64, 64), 0.75, requires_grad=True)
    loss = others.loss(x_o)
    assert loss.item() == pytest.approx(1000 * 0.5 * 20 * 5 / 64 ** 2)
    loss.backward()
    inside = torch.zeros(2, 3, 64, 64)
    inside[..., 30:35, 20:40] = 1
    assert torch.equal(x_o.grad != 0, inside != 0)


def test_the_mouth_is_compared_with_an_untouched_generator(checkpoint, monkeypatch):
    """A copy of G once followed the training, because parametrize.cached() gave it the weights of G."""
    frames, points = ToyHeads(1, first=5).load(0, [0])
    seen, y = [], pictures(1)
    loss = OtherPoses.loss

    def watched(self, x_o):
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            seen.append(self.before(y))
        return loss(self, x_o)
    monkeypatch.setattr(OtherPoses, "loss", watched)
    state, content = load_checkpoint(checkpoint), ContentLoss("l1", extra=FaceTerm())
    G, psi, _ = learn_person(state, [Photo(frames, points)], content, 3, "cpu", progress=False)
    untouched, psi_hat, _ = learn_person(state, [Photo(frames, points)], None, 0, "cpu", progress=False)
    with torch.no_grad():
        expected, learned = untouched.render(y, psi_hat[None]), G.render(y, psi[None])
    assert len(seen) == 3 and all(torch.allclose(frame, expected, atol=1e-5) for frame in seen)
    assert not torch.allclose(learned, expected, atol=1e-3)
