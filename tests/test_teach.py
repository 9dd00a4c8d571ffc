"""teach.py: E learns what a recognition network says, P to read it; what G made of e stays meanwhile."""
import copy

import numpy as np
import pytest
import torch
from torch import nn

from beyond import teach
from beyond.toy import ToyHeads
from conftest import TINY_FLAGS, fail, networks, succeed, tensors
from data import Episodes, to_float, to_tensors
from losses import ContentLoss, face_terms
from model import load_checkpoint, load_networks
from runtime.device import autocast
from test_evaluate import prepare


class Colour(nn.Module):
    """A stand-in for dlib's network: the mean colour of a picture, mixed, is what it says."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("matrix", torch.randn(3, 128))

    def forward(self, x):
        mean = x.mean(dim=(2, 3))
        return [mean, mean @ self.matrix]


@pytest.fixture
def nets():
    _, E, G, D = networks(max_channels=32)
    with torch.no_grad():
        G.P.bias.uniform_(-0.1, 0.1)
    return E.eval(), G.eval(), D.eval()


@pytest.fixture(autouse=True)
def smaller(monkeypatch):
    monkeypatch.setattr(teach, "FITTED", 20)


def episodes(K, slots, seed=0):
    return Episodes(ToyHeads(20), K, slots, seed)


def pictures(n=16):
    _, x, y = zip(*(episodes(1, 1, seed=9)[k] for k in range(n)))
    return to_float(torch.stack(x)[:, 0]), to_float(torch.stack(y)[:, 0])


def test_E_learns_what_the_teacher_says(nets):
    E, teacher, cpu = nets[0], Colour(), torch.device("cpu")
    before = copy.deepcopy(E)
    first = teach.teach_embedder(copy.deepcopy(E), 32, teacher, episodes(1, 8), 5, cpu)
    told = teach.teach_embedder(E, 32, teacher, episodes(1, 8), 150, cpu)
    assert told > 0.6 > 0.1 > first
    parameters = zip(before.net.blocks.parameters(), E.net.blocks.parameters())
    assert not any(torch.equal(p, q) for p, q in parameters)

    # told is R^2: e of new pictures tells as much to a linear map fitted on others
    x, y = pictures(64)
    with torch.no_grad():
        e, v = E(x, y), teacher(x)[-1]
    e = torch.cat([e, torch.ones(64, 1)], dim=1).double()
    fitted = torch.linalg.lstsq(e[:40], v[:40].double()).solution
    rest = v[40:].double()
    assert 1 - (e[40:] @ fitted - rest).square().sum() / (rest - rest.mean(0)).square().sum() > 0.4


def test_the_fitted_reader_says_what_P_said(nets):
    """Of an E that has not changed, nearly all."""
    E, G, _ = nets
    x, y = pictures()
    cpu = torch.device("cpu")
    with torch.no_grad():
        e = teach.embeddings(E, episodes(1, 8), cpu)
        reader = teach.fit_reader(e, G.project(e))
        psi, read = G.project(E(x, y)), reader(E(x, y))
    assert torch.allclose(reader.mean, E(x, y).mean(0), rtol=0.1, atol=0.2)
    assert (read - psi).square().sum() < 0.02 * (psi - psi.mean(0)).square().sum()


def test_P_is_the_reader(nets):
    E, G, _ = nets
    torch.manual_seed(1)
    reader = teach.Reader(torch.rand(32), torch.tensor(0.02), sum(G.psi_sizes))
    e = reader.mean + 0.02 * torch.randn(5, 32)
    gain = teach.become_P(G, reader)
    G.gain = gain
    assert float(f"{gain:g}") == gain
    with torch.no_grad():
        psi, expected = G.project(e), reader(e)
    assert torch.allclose(psi, expected, rtol=1e-3, atol=1e-3)
    original = G.P.parametrizations.weight.original
    assert original.square().mean().sqrt().item() == pytest.approx((3 * 32) ** -0.5, rel=1e-4)    # as fresh


def test_P_learns_to_show_whom_the_teacher_sees(nets):
    E, G, _ = nets
    cpu, content = torch.device("cpu"), ContentLoss("l1", face=10.0, face_vector=6.0)
    content.face = Colour()
    e = teach.embeddings(E, episodes(1, 8), cpu)
    reader = teach.fit_reader(e, G.project(e).detach())
    before = [p.clone() for p in G.parameters()]
    x, y = pictures()

    def distance():
        with torch.no_grad():
            x_hat = G.render(y, reader(E(x, y)))
            return float(face_terms(content.face, x_hat, x)[-1])

    first = distance()
    teach.teach_reader(reader, E, G, content, episodes(2, 4), 60, cpu)
    assert distance() < 0.8 * first
    assert all(torch.equal(a, b) for a, b in zip(before, G.parameters()))


def test_as_a_user_runs_it(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr(teach, "FITTED", 60)        # enough for w0's bound below
    loaded = [ToyHeads(3).load(i, lambda count: range(5)) for i in range(3)]
    for i, head in enumerate(loaded):
        prepare(tmp_path / f"prepared/head{i}.pt", *head, file=list(range(5)), seconds=[0.] * 5)
    untouched = checkpoint.read_bytes()
    flags = ["beyond.teach", "--checkpoint", checkpoint, "--steps-E", "2", "--steps-P", "2"]
    said = succeed(*flags, "--out", "taught.pt", cwd=tmp_path)
    assert checkpoint.read_bytes() == untouched
    gain = said.split("--psi-gain ")[1].split()[0]
    state = load_checkpoint(tmp_path / "taught.pt")
    assert state["config"].psi_gain == float(gain) and f"--grow-from taught.pt --psi-gain {gain}" in said

    # only E, P and what D adds to e have changed
    old, new = tensors(checkpoint), tensors(tmp_path / "taught.pt")
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    assert {key.split(".")[0] for key in changed} == {"E", "G", "w0"}
    assert all(key.startswith("G.P.") for key in changed if key.startswith("G."))

    # w0 + e is to D what it was, on average
    x, y = (to_float(part) for part in to_tensors(*map(np.concatenate, zip(*loaded))))
    average = []
    for path in (checkpoint, tmp_path / "taught.pt"):
        E, _, D = load_networks(load_checkpoint(path))
        with torch.no_grad(), autocast(x.device):       # as in the training
            average.append(D.w0 + E(x, y).mean(0))
    assert torch.allclose(*average, atol=0.02) and not torch.allclose(old["w0"], new["w0"], atol=0.1)

    # meta-learning goes on with it, under this gain alone
    train = ["meta_train.py", *TINY_FLAGS, "--steps", "1", "--grow-from", "taught.pt"]
    assert "taught.pt" in succeed(*train, "--out", "run", "--psi-gain", gain, cwd=tmp_path)
    assert f"--psi-gain {gain}" in fail(*train, "--out", "other", cwd=tmp_path)

    assert "--steps-E 0" in fail(*flags, "--out", "t.pt", "--steps-E", "0", cwd=tmp_path)
    assert "also an input" in fail(*flags, "--out", checkpoint, cwd=tmp_path)
    fan = load_checkpoint(checkpoint)
    fan["config"] = vars(fan["config"]) | {"landmarks": "fan"}
    torch.save(fan, tmp_path / "fan.pt")
    said = fail("beyond.teach", "--checkpoint", "fan.pt", "--out", "t.pt", cwd=tmp_path)
    assert "fan.pt trained with fan" in said
    assert "no prepared videos in nothing" in fail(*flags, "--out", "t.pt", "--data", "nothing", cwd=tmp_path)
