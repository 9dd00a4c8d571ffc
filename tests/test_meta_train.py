"""meta_train.py: the defaults of a run, its flags, and the moving average."""
import functools
import sys

import numpy as np
import pytest
import torch
from torch import nn

import meta_train
from beyond.average import update_average
from beyond.toy import ToyHeads
from model import Config
from runtime.checkpoint import load_checkpoint
from runtime.files import UserError
from runtime.resume import LOGGED


class Few(ToyHeads):
    """Three people with one frame each, which are drawn only once, to be fast."""
    draw = functools.cache(ToyHeads.draw)

    def load(self, i, ts):
        frames, points = self.draw(i, 0)
        return np.stack([frames] * len(ts)), np.stack([points] * len(ts))


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A function run(step, *flags): meta_train.main() on three people, with `step` instead of train_step."""
    def start(step, *flags, rates=[]):
        def train_step(E, G, D, content, optimizers, row, x, y, match_weight):
            assert match_weight == (0 if "--no-match" in flags else 10)
            rates.append([o.param_groups[0]["lr"] for o in optimizers])
            step(E, G, D, row, x)
            return {name: torch.zeros(()) for name in LOGGED}
        monkeypatch.setattr(meta_train, "train_step", train_step)
        monkeypatch.setattr(meta_train, "PreparedVideos", lambda folder, size, *rest: Few(3, size))
        monkeypatch.setattr(meta_train, "sample_grid", lambda *rest, **names: None)
        small = "--image-size 64 --channels 8 16 16 --content l1 --out".split()
        monkeypatch.setattr(sys, "argv", ["meta_train.py", *small, str(tmp_path / "run"), *map(str, flags)])
        meta_train.main()
        return tmp_path / "run"
    return start


@pytest.mark.parametrize("flags,steps", [([], 113), (["--no-match"], 225)])     # 3 people, batches of 2
def test_default_epochs(run, flags, steps):
    """An epoch has as many episodes as there are videos. There are 75 epochs, or 150 for the FF variant."""
    seen = []
    folder = run(lambda E, G, D, row, x: seen.append(tuple(x.shape[:2])), "--batch", 2, "--K", 1, *flags)
    assert len(seen) == steps and set(seen) == {(2, 2)}
    state = load_checkpoint(folder / f"step-{steps}.pt")
    assert state["step"] == steps and state["config"].match == (not flags)


def test_the_rates_of_a_run_with_linear_decay(run):
    rates = []
    flags = "--steps", 4, "--batch", 1, "--K", 1, "--lr", 1e-3, "--lr-d", 2e-3
    run(lambda *step: None, *flags, "--linear-decay", rates=rates)
    assert np.allclose(rates, np.array([[1e-3, 2e-3]]) * [[1], [0.75], [0.5], [0.25]])


def test_another_content_loss_is_another_run(run, monkeypatch, tmp_path):
    """Otherwise `--resume` without --vgg19 and --vggface would continue with another content loss."""
    monkeypatch.setattr(meta_train, "ContentLoss", lambda *files: torch.nn.Identity())
    flags = "--batch", 1, "--K", 1, "--content", "vgg", "--steps"
    for name in ("a.mat", "b.mat"):
        (tmp_path / name).touch()
    vgg = "--vgg19", tmp_path / "a.mat", "--vggface", tmp_path / "b.mat"
    run(lambda *step: None, *flags, 1, *vgg)
    with pytest.raises(UserError, match="--vgg19 was a.mat, now None; --vggface was b.mat, now None"):
        run(lambda *step: None, *flags, 2, "--resume")
    assert (run(lambda *step: None, *flags, 2, *vgg, "--resume") / "step-2.pt").exists()


def test_default_batch_and_k_are_the_papers(run):
    seen = []
    folder = run(lambda E, G, D, row, x: seen.append((x.shape, row, D.W.detach().clone())), "--steps", 1)
    (shape, row, W), = seen
    assert shape == (48, 9, 3, 64, 64) and set(row.tolist()) == {0, 1, 2}   # 1 + 8 frames (A.1)
    assert load_checkpoint(folder / "step-1.pt")["config"] == Config(64, (8, 16, 16), 3, "dlib", content="l1")
    # the initial W of a run
    assert W.shape == (3, 16) and 0.4 <= W.min() < 0.45 and 0.55 < W.max() <= 0.6


def test_moving_average_by_hand(run, monkeypatch):
    """The checkpoint holds a := d a + (1 - d) p of every step n, d = min(decay, n / (n + 10))."""
    numbers, at_first = {1: 2.0, 2: -1.0, 3: 5.0}, []

    def step(E, G, D, row, x):
        pick = E.net.blocks[0].conv1.bias, G.to_rgb.bias
        at_first.append([p.detach().clone() for p in pick])
        for p in pick:
            p.data.fill_(numbers[len(at_first)])
    monkeypatch.setitem(meta_train.PAPER, "ema", 0.15)
    state = load_checkpoint(run(step, "--steps", 3, "--batch", 1, "--K", 1) / "step-3.pt")
    for key, a in zip(("E.net.blocks.0.conv1.bias", "G.to_rgb.bias"), at_first[0]):
        for n, d in ((1, 1 / 11), (2, 0.15), (3, 0.15)):
            a = d * a + (1 - d) * numbers[n]
        assert torch.allclose(state[key], a, atol=1e-5), key


def test_a_moving_average_leaves_what_has_no_mean():
    """The vectors of spectral normalisation and all other buffers are copied, not averaged."""
    average, net = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    nn.init.constant_(average.weight, 1.0), nn.init.constant_(net.weight, 3.0), net.running_mean.fill_(7.0)
    update_average([average], [net], 0.75)
    assert average.weight.tolist() == [1.5, 1.5] and net.weight.tolist() == [3, 3]
    assert average.running_mean.tolist() == [7, 7] and average.weight.requires_grad
