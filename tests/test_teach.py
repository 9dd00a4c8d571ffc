"""teach.py: E is taught by a recognition network, and P is fitted and trained; and the command."""
import copy

import pytest
import torch
from torch import nn

from beyond import teach
from beyond.augment import augment
from beyond.recognition import FaceTerm
from beyond.toy import ToyHeads
from conftest import TINY_DATA_FLAGS, fail, networks, prepare, succeed, tensors
from data import Episodes, PreparedVideos, to_float
from losses import ContentLoss
from runtime.checkpoint import load_checkpoint, load_networks


class Colour(nn.Module):
    """Stands in for dlib's network: its vector is a fixed linear map of the mean colour of a picture."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("matrix", torch.randn(3, 128))

    def forward(self, x):
        mean = x.mean(dim=(2, 3))
        return [mean, mean @ self.matrix]


@pytest.fixture
def nets():
    _, E, G, D = networks(channels=(8, 16, 32))
    with torch.no_grad():
        G.P.bias.uniform_(-0.1, 0.1)
    return E.eval(), G.eval(), D.eval()


@pytest.fixture(autouse=True)
def smaller(monkeypatch):
    monkeypatch.setattr(teach, "FIT_BATCHES", 20)


def episodes(K, slots, seed=0):
    return Episodes(ToyHeads(20), K, slots, seed)


def pictures(n=16):
    """x, y (n, 3, 64, 64): frames of heads from other episodes than those that are taught."""
    _, x, y = zip(*(episodes(1, 1, seed=9)[k] for k in range(n)))
    return to_float(torch.stack(x)[:, 0]), to_float(torch.stack(y)[:, 0])


def test_E_learns_to_predict_the_teachers_vectors(nets, monkeypatch):
    monkeypatch.setattr(teach, "LR_E", 5e-3)     # of 1e-3, so that fewer steps are enough
    E, teacher, cpu = nets[0], Colour(), torch.device("cpu")
    before = copy.deepcopy(E)
    r2_at_first = teach.teach_embedder(copy.deepcopy(E), 32, teacher, episodes(1, 4), 5, cpu)
    r2 = teach.teach_embedder(E, 32, teacher, episodes(1, 4), 120, cpu)
    assert r2 > 0.6 > 0.1 > r2_at_first
    parameters = zip(before.net.blocks.parameters(), E.net.blocks.parameters())
    assert not any(torch.equal(p, q) for p, q in parameters)

    # R^2 is also large for other pictures, with a linear map of e that is fitted to 40 and tested on 24
    x, y = pictures(64)
    with torch.no_grad():
        e, v = E(x, y), teacher(x)[-1]
    e = torch.cat([e, torch.ones(64, 1)], dim=1).double()
    fitted = torch.linalg.lstsq(e[:40], v[:40].double()).solution
    rest = v[40:].double()
    assert 1 - (e[40:] @ fitted - rest).square().sum() / (rest - rest.mean(0)).square().sum() > 0.4


def test_the_fitted_projection_agrees_with_P(nets):
    """With an E that has not changed, it explains nearly all of the variance of psi_hat."""
    E, G, _ = nets
    x, y = pictures()
    cpu = torch.device("cpu")
    with torch.no_grad():
        e = teach.embeddings(E, episodes(1, 8), cpu)
        projection = teach.fit_projection(e, G.project(e))
        psi, fitted = G.project(E(x, y)), projection(E(x, y))
    assert torch.allclose(projection.mean, E(x, y).mean(0), rtol=0.1, atol=0.2)
    assert (fitted - psi).square().sum() < 0.02 * (psi - psi.mean(0)).square().sum()


def test_P_computes_the_same_as_the_projection(nets):
    E, G, _ = nets
    torch.manual_seed(1)
    projection = teach.Projection(torch.rand(32), torch.tensor(0.02), sum(G.psi_sizes))
    e = projection.mean + 0.02 * torch.randn(5, 32)
    teach.write_P(G, projection)
    with torch.no_grad():
        psi, expected = G.project(e), projection(e)
    assert torch.allclose(psi, expected, rtol=1e-3, atol=1e-3)
    original = G.P.parametrizations.weight.original
    size = original.square().mean().sqrt().item()
    assert size == pytest.approx((3 * 32) ** -0.5, rel=1e-4)        # as in a fresh layer


def test_training_P_brings_generated_frames_closer_to_the_teachers_vectors(nets):
    E, G, _ = nets
    cpu, content = torch.device("cpu"), ContentLoss("l1", extra=FaceTerm(10.0, vector_weight=6.0))
    content.extra.net = Colour()
    e = teach.embeddings(E, episodes(1, 8), cpu)
    projection = teach.fit_projection(e, G.project(e).detach())
    before = [p.clone() for p in G.parameters()]
    x, y = pictures()

    def distance():
        with torch.no_grad():
            x_hat = G.render(y, projection(E(x, y)))
            generated, real = content.extra.net(x_hat)[-1], content.extra.net(x)[-1]
            return float((generated - real).abs().mean() / real.abs().mean())

    first = distance()
    teach.train_projection(projection, E, G, content, episodes(2, 4), 60, cpu)
    assert distance() < 0.8 * first
    assert all(torch.equal(a, b) for a, b in zip(before, G.parameters()))


def test_as_a_user_runs_it(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr(teach, "FIT_BATCHES", 5)
    for i in range(3):
        prepare(tmp_path / f"prepared/head{i}.pt", *ToyHeads(3).load(i, range(5)))
    untouched = checkpoint.read_bytes()
    flags = ["beyond.teach", "--checkpoint", checkpoint, "--steps-E", "2", "--steps-P", "2"]
    said = succeed(*flags, "--out", "taught.pt", cwd=tmp_path)
    assert checkpoint.read_bytes() == untouched
    assert "--grow-from taught.pt" in said

    # only E, P and w0 have changed
    old, new = tensors(checkpoint), tensors(tmp_path / "taught.pt")
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    assert {key.split(".")[0] for key in changed} == {"E", "G", "w0"}
    assert all(key.startswith("G.P.") for key in changed if key.startswith("G."))

    # the mean of w0 + e, which D gets, is as before for the frames to which P was fitted
    videos, average = PreparedVideos(tmp_path / "prepared", 64), []
    to_fit = Episodes(videos, 1, teach.BATCH // 2, seed=1, augment=augment, stills=teach.STILLS)
    for path in (checkpoint, tmp_path / "taught.pt"):
        E, _, D = load_networks(load_checkpoint(path))
        average.append(D.w0 + teach.embeddings(E, to_fit, torch.device("cpu")).mean(0))
    assert torch.allclose(*average, atol=1e-3) and not torch.allclose(old["w0"], new["w0"], atol=0.1)

    # meta-learning can go on from it, with its gain
    train = ["meta_train.py", *TINY_DATA_FLAGS, "--steps", "1", "--grow-from", "taught.pt"]
    assert "taught.pt" in succeed(*train, "--out", "run", cwd=tmp_path)
    assert torch.equal(tensors(tmp_path / "run/step-1.pt")["G.P.gain"], new["G.P.gain"])

    assert "--steps-E 0" in fail(*flags, "--out", "t.pt", "--steps-E", "0", cwd=tmp_path)
    assert "also an input" in fail(*flags, "--out", checkpoint, cwd=tmp_path)
    fan = load_checkpoint(checkpoint)
    fan["config"] = vars(fan["config"]) | {"landmarks": "fan"}
    torch.save(fan, tmp_path / "fan.pt")
    said = fail("beyond.teach", "--checkpoint", "fan.pt", "--out", "t.pt", cwd=tmp_path)
    assert "fan.pt was trained with fan" in said
    assert "no prepared videos in nothing" in fail(*flags, "--out", "t.pt", "--data", "nothing", cwd=tmp_path)
