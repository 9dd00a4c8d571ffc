"""The recipe of Sec. 3.2 and 3.3: what the stages compute, against references that spell out the paper's
equations one frame at a time.

Each of 60 mutants of the code (one update of D, e of the first frame, a weight left out, a sign, ...)
fails one of these, or one of test_losses.py and test_model.py.
"""
import copy

import numpy as np
import pytest
import torch

import meta_train
from conftest import networks, pictures
from finetune import embed, finetune
from losses import ContentLoss
from meta_train import make_optimizers, train_step
from runtime import device
from runtime.resume import LOGGED


@pytest.fixture
def double(monkeypatch):
    """Compute everything in double precision, so that a reference agrees to many digits."""
    monkeypatch.setattr(device, "fast_dtype", lambda device: torch.float64)
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float)


def standing_still(*nets):
    """Stop the power iteration of spectral normalisation, because a reference has more forward passes."""
    for net in nets:
        for module in net.modules():
            if hasattr(module, "n_power_iterations"):
                module.n_power_iterations = 0


def near_the_hinge(D, w, x, y):
    """Set b so that scores of x (B, 3, S, S) with w (B, N) are around 1, on both sides of the hinge."""
    with torch.no_grad():
        D.b += 1 - ((D.V(x, y)[0] * w).sum(1) + D.b).mean()


def l1(a, b):
    return (a - b).abs().mean()


def descend(loss, parameters, lr):
    """Gradient descent by hand: p - lr * gradient."""
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    with torch.no_grad():
        for p, g in zip(parameters, gradients):
            p -= lr * (0 if g is None else g)


def agree(net, reference, start):
    """Check that every parameter is that of the reference. Returns the number of those that have moved."""
    moved = 0
    for (name, p), q, s in zip(net.named_parameters(), reference.parameters(), start.parameters()):
        step = (q - s).abs().max().item()
        assert (p - q).abs().max().item() <= 1e-4 * step + 1e-9, (name, (p - q).abs().max().item(), step)
        moved += step > 1e-8
    return moved


# ------------------------------------------------------------------------------------ Sec. 3.2, eq. 1-6

class Counted(torch.optim.SGD):
    """Plain gradient descent, because Adam would hide the scale of gradients. It counts its steps."""
    steps = 0

    def step(self, closure=None):
        self.steps += 1
        return super().step(closure)


def hinge(D, w, x, x_hat, y):
    """Eq. 6 and 10: x, x_hat, y lists of (1, 3, S, S), w of (N,)."""
    terms = []
    for w_, real, fake, y_ in zip(w, x, x_hat, y):
        real, fake = (D.V(image, y_)[0][0] @ w_ + D.b for image in (real, fake))
        terms.append(torch.stack([real, fake, (1 + fake).clamp(min=0) + (1 - real).clamp(min=0)]))
    real, fake, losses = torch.stack(terms).T
    assert (real < 1).any() and (fake > -1).any()       # otherwise the test would test nothing
    return losses.mean()


def content_adversarial_and_matching(D, w, x, x_hat, y):
    """The terms that eq. 3 and 9 share, for one frame. 300 times L1 stands for the content loss."""
    (v, fake), (_, real) = D.V(x_hat, y), D.V(x, y)
    score = v[0] @ w + D.b                                              # eq. 5, 8
    return [300 * l1(x_hat, x), -score, 10 * sum(map(l1, fake, real)) / len(real)]


def reference_step(E, G, D, row, x, y, lr_EG, lr_D, content_weight=1.0, match_weight=10.0):
    """Sec. 3.2 one frame at a time. x, y (B, K+1, 3, S, S), the target t first. Returns what is logged."""
    x, y = ([list(frames[:, None]) for frames in batch] for batch in (x, y))    # x[b][k] is (1, 3, S, S)
    terms, x_hats, norms = [], [], []
    for b, i in enumerate(row):
        e = [E(x_k, y_k)[0] for x_k, y_k in zip(x[b][1:], y[b][1:])]
        x_hat = G(y[b][0], (sum(e) / len(e))[None])                     # eq. 1, 2
        mch = match_weight * sum(l1(e_k, D.W[i]) for e_k in e) / len(e)
        terms.append([*content_adversarial_and_matching(D, D.W[i] + D.w0, x[b][0], x_hat, y[b][0]), mch])
        x_hats.append(x_hat.detach())
        norms.append([sum(e_k.norm().item() for e_k in e) / len(e), D.W[i].norm().item()])
    cnt, adv, fm, mch = torch.stack([torch.stack(t) for t in terms]).mean(0)
    cnt, norms = content_weight * cnt, torch.tensor(norms).mean(0)
    loss = cnt + adv + fm + mch                                                                 # eq. 3
    descend(loss, [*E.parameters(), *G.parameters()], lr_EG)
    for _ in range(2):                                                  # eq. 6
        w = [D.W[i] + D.w0 for i in row]
        dsc = hinge(D, w, [frames[0] for frames in x], x_hats, [frames[0] for frames in y])
        descend(dsc, [*D.V.parameters(), D.W, D.w0, D.b], lr_D)
    return torch.stack([cnt, adv, fm, mch, dsc, *norms]).detach()


# the paper's; the FF variant's; ours
@pytest.mark.parametrize("content_weight,match_weight", [(1.0, 10.0), (1.0, 0.0), (0.25, 0.3)])
def test_train_step_is_eq_1_to_6(content_weight, match_weight, double):
    """Two steps with two batches and different learning rates: gradients, updates, and what is logged."""
    cfg, *nets = networks()
    nets[1].P.gain.fill_(3.0)
    standing_still(*nets)
    lr_EG, lr_D = 2e-4, 1e-4
    rows = torch.tensor([2, 0]), torch.tensor([3, 2])
    x, y = pictures(2, 2, 3), pictures(2, 2, 3)          # steps, B, K + 1
    near_the_hinge(nets[2], nets[2].W[rows[0]] + nets[2].w0, x[0, :, 0], y[0, :, 0])
    with torch.no_grad():   # start where nothing is zero
        for net in nets:
            for name, p in net.named_parameters():
                if name.endswith("gamma"):
                    p.fill_(0.5)
    start, reference = copy.deepcopy(nets), copy.deepcopy(nets)
    E, G, D = nets
    optimizers = [Counted([*E.parameters(), *G.parameters()], lr_EG), Counted(D.parameters(), lr_D)]
    for row, a, b in zip(rows, x, y):
        content = ContentLoss("l1", weight=content_weight)
        logged = train_step(E, G, D, content, optimizers, row, a, b, match_weight)
        expected = reference_step(*reference, row, a, b, lr_EG, lr_D, content_weight, match_weight)
        values = torch.stack([logged[name] for name in LOGGED])
        assert torch.allclose(values, expected, rtol=1e-6), (values, expected)
        moved = [agree(*three) for three in zip(nets, reference, start)]
    assert [o.steps for o in optimizers] == [2, 4]                  # two updates of D for each of G
    assert all(m > 0.7 * len(list(net.parameters())) for m, net in zip(moved, nets)), moved


def test_the_optimizers_hold_every_parameter_once_at_the_papers_rates():
    cfg, E, G, D = networks(lr=5e-5, lr_d=2e-4)
    optimizers = make_optimizers(E, G, D, cfg)
    held = [{id(p) for group in o.param_groups for p in group["params"]} for o in optimizers]
    assert held == [{id(p) for p in group} for group in ([*E.parameters(), *G.parameters()], D.parameters())]
    assert [o.defaults["lr"] for o in optimizers] == [5e-5, 2e-4]
    assert all(o.defaults["betas"] == (0, 0.999) and isinstance(o, torch.optim.Adam) for o in optimizers)


def test_rows_of_W_are_trained_by_adam():
    """Compare it with a dense Adam by hand, in steps that draw a row once, twice and never."""
    cfg, E, G, D = networks(num_videos=5)
    optimizers = make_optimizers(E, G, D, cfg)
    W, v, n, gradients = D.W.detach().clone(), torch.zeros_like(D.W), 0, []
    D.W.register_hook(lambda g: gradients.append(g.clone()))
    before, start = ContentLoss("l1"), W.clone()
    for rows in ([0, 1], [1, 2], [1, 1]):
        train_step(E, G, D, before, optimizers, torch.tensor(rows), pictures(2, 3), pictures(2, 3))
    assert len(gradients) == 6
    for g in gradients:
        n += 1
        v = 0.999 * v + 0.001 * g ** 2
        W = W - cfg.lr_d * g / ((v / (1 - 0.999 ** n)).sqrt() + 1e-8)
    assert torch.allclose(D.W, W, atol=1e-7)
    moved = (W - start).abs().amax(1)
    assert (moved[:3] > cfg.lr_d / 2).all() and not moved[3:].any()


def test_rates_fall_linearly_to_0():
    cfg, E, G, D = networks(lr=1e-4, lr_d=4e-4)
    optimizers = make_optimizers(E, G, D, cfg)
    meta_train.set_rates(optimizers, cfg, 0.25)
    assert [o.param_groups[0]["lr"] for o in optimizers] == [2.5e-5, 1e-4]


# ------------------------------------------------------------------------------------ Sec. 3.3, eq. 7-10

class Others:
    """Stands in for likeness.OtherPoses: draws a pose for each step, in which the picture should be grey."""

    def __init__(self, poses):
        self.poses, self.draw = poses, iter(poses).__next__

    def loss(self, x_o):
        return 10 * (x_o ** 2).mean()


def reference_finetuning(E, G, D, x, y, rates, adversarial, others=None):
    """Sec. 3.3, one frame at a time; each step uses all T. rates: those of G and D in each step."""
    x, y = x.split(1), y.split(1)
    e_new = sum(E(x_t, y_t)[0] for x_t, y_t in zip(x, y)).detach() / len(x)     # eq. 7
    psi = (2 * G.P(e_new[None])[0]).detach().requires_grad_()                   # the gain is 2
    w = (D.w0 + e_new).detach().requires_grad_()
    parameters_G = [p for name, p in G.named_parameters() if not name.startswith("P.")]
    history = []
    for lr, lr_D in rates:
        x_hat = [G.render(y_t, psi[None]) for y_t in y]
        terms = [torch.stack(content_adversarial_and_matching(D, w, *images)) for images in zip(x, x_hat, y)]
        cnt, adv, fm = torch.stack(terms).mean(0)
        x_hat = [image.detach() for image in x_hat]
        loss = cnt + (adv + fm if adversarial else 0)                           # eq. 9
        if others:
            loss = loss + others.loss(G.render(others.poses[len(history)], psi[None]))
        descend(loss, [*parameters_G, psi], lr)
        for _ in range(2):                                                      # eq. 10
            dsc = hinge(D, [w] * len(x), x, x_hat, y)
            descend(dsc, [*D.V.parameters(), w, D.b], lr_D)
        history.append([v.item() for v in (cnt, adv, fm, dsc)])
    return psi.detach(), w.detach(), history


@pytest.mark.parametrize("as_paper,adversarial,likeness", [
    (True, True, False), (True, False, False), (False, True, True)])
def test_finetune_is_eq_7_to_10(as_paper, adversarial, likeness, double, monkeypatch):
    """At the constant rates of meta-learning, as in the paper, or at falling ones with our other poses."""
    cfg, *nets = networks(lr=2e-4, lr_d=3e-6, finetune_lr=6e-4, finetune_lr_d=1e-5)
    nets[1].P.gain.fill_(2.0)
    standing_still(*nets)
    x, y = pictures(3), pictures(3)
    near_the_hinge(nets[2], (nets[2].w0 + embed(nets[0], x, y)).expand(3, -1), x, y)
    reference, start = copy.deepcopy(nets), copy.deepcopy(nets)
    others = Others([pictures(1), pictures(1)]) if likeness else None
    rates = []

    def adam(parameters, lr, betas):
        rates.append((lr, betas))
        return torch.optim.SGD(parameters, lr)
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim, "Adam", adam)
        psi, w, history = finetune(*nets, x, y, cfg, ContentLoss("l1"), epochs=2, adversarial=adversarial,
                                   as_paper=as_paper, others=others)
    steps = [(2e-4, 3e-6)] * 2 if as_paper else [(6e-4, 1e-5), (3e-4, 5e-6)]    # ours fall to 0
    assert rates == [(lr, (0, 0.999)) for lr in steps[0]]
    psi_start, w_start = reference_finetuning(*copy.deepcopy(reference), x, y, [], True)[:2]
    psi_, w_, history_ = reference_finetuning(*reference, x, y, steps, adversarial, others)
    history = [[losses[k] for k in ("cnt", "adv", "fm", "dsc")] for losses in history]
    assert np.allclose(history, history_, rtol=1e-6), (history, history_)
    for ours, theirs, began in ((psi, psi_, psi_start), (w, w_, w_start)):
        step = (theirs - began).abs().max()
        assert step > 1e-7 and (ours - theirs).abs().max() < 1e-4 * step
    E, G, D = (agree(*three) for three in zip(nets, reference, start))
    assert E == 0 and G > 20 and D > 20                                         # E is not trained
