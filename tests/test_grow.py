"""grow.py: a network starts with what one of half its image size has learned. And where bfloat16 is used."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import meta_train
from beyond.grow import grow
from beyond.toy import ToyHeads
from conftest import ROOT, TINY_DATA_FLAGS, TINY_FLAGS, fail, networks, prepare, tensors, torchrun
from data import Episodes, to_float, to_tensors
from runtime.checkpoint import save_checkpoint
from runtime.device import fast_dtype
from runtime.files import UserError


def save(path, cfg, E, G, D):
    save_checkpoint(path, "meta", cfg, E=E, G=G, V=D.V, w0=D.w0, b=D.b)


def episodes(size):
    return Episodes(ToyHeads(4, size), K=1, slots=1)


def grown(tmp_path, old_size, channels, first):
    """-> a small network with made-up statistics, and one of twice the size that was grown from it."""
    cfg, *small = networks(old_size, channels=channels)
    large_cfg, *large = networks(2 * old_size, channels=(first, *channels))
    with torch.no_grad():
        small[1].P.bias.uniform_(-0.5, 0.5)
        small[1].P.gain.fill_(3.0)
    save(tmp_path / "small.pt", cfg, *small)
    grow(*large, str(tmp_path / "small.pt"), large_cfg, episodes(2 * old_size))
    return [net.eval() for net in small], [net.eval() for net in large]


@pytest.mark.parametrize("old_size, channels, first", [
    (64, (16, 16, 32), 16), (64, (16, 16, 32), 24), (64, (16, 16, 32), 8), (128, (16, 16, 16, 32), 16),
    (256, (16, 16, 16, 16, 32), 16)])
def test_a_grown_network_sees_and_draws_what_the_small_one_did(tmp_path, old_size, channels, first):
    """On halved pictures, E, V and P compute what they did. G first draws the old picture, enlarged."""
    small, large = grown(tmp_path, old_size, channels, first)
    frames, points = ToyHeads(4, old_size).load(0, range(4))
    x, y = (to_float(part) for part in to_tensors(frames, points))      # (4, 3, S, S)
    # pictures of twice the size, whose averages are x and y
    X, Y = (F.interpolate(part, scale_factor=2.0) for part in (x, y))
    with torch.no_grad():
        e, e_grown = small[0](x, y), large[0](X, Y)
        v, v_grown = small[2].V(x, y)[0], large[2].V(X, Y)[0]
        pictures = F.interpolate(small[1](y, e), scale_factor=2.0, mode="bilinear")
        pictures_grown = large[1](Y, e)
    for old, new in ((e, e_grown), (v, v_grown)):
        assert (old - new).norm() < 0.1 * old.norm()        # not equal: the borders differ
    coarse = lambda images: F.avg_pool2d(images, 8).flatten()       # without the noise of an untrained G
    alike = np.corrcoef(coarse(pictures), coarse(pictures_grown))[0, 1]
    assert alike > 0.75 if first >= channels[0] else alike < 0.5
    frames, points = ToyHeads(4, 2 * old_size).load(3, [0, 32])
    with torch.no_grad():
        e_3 = large[0](*(to_float(part) for part in to_tensors(frames, points))).mean(0)
    assert torch.allclose(large[2].W[3], e_3, atol=1e-4)    # the row is what E makes of two frames


def test_the_numbers_of_psi_find_their_places(tmp_path):
    """P's rows of the old final AdaIN serve the new one, or the next block's if it is too narrow."""
    for first in (24, 16, 8):
        small, large = grown(tmp_path, 64, (16, 16, 32), first)
        with torch.no_grad():
            e = torch.rand(1, 32)
            old, new = small[1].project(e)[0], large[1].project(e)[0]
        before = sum(small[1].psi_sizes[:-1])
        assert torch.allclose(new[:before], old[:before], atol=1e-4)
        final = new[-2 * first:]
        if first >= 16:
            gammas, betas = final[:16], final[first:first + 16]
        else:
            gammas, betas = new[before:before + 32].chunk(2)
        assert torch.allclose(torch.cat([gammas, betas]), old[before:], atol=1e-4)
        assert old[before:].std() > 0.1


def test_sizes_and_widths_that_do_not_fit(tmp_path):
    cfg, *small = networks(64, channels=(16, 16, 32))
    save(tmp_path / "small.pt", cfg, *small)
    path = str(tmp_path / "small.pt")
    same_cfg, *same = networks(64, channels=(16, 16, 32))
    grow(*same, path, same_cfg, episodes(64))
    assert torch.equal(same[1].to_rgb.bias, small[1].to_rgb.bias)
    for size, channels in ((256, (16, 16, 16, 16, 32)), (128, (16, 16, 16, 32)[1:]), (128, (16, 8, 16, 32))):
        cfg, *nets = networks(size, channels=channels)
        with pytest.raises(UserError, match="has 64 pixels and channels 16 16 32"):
            grow(*nets, path, cfg, episodes(size))


def test_grow_from_as_a_user_runs_it(tmp_path, monkeypatch):
    few = lambda heads, size, first=0: ToyHeads(min(heads, 20), size, first)
    monkeypatch.setattr(meta_train, "ToyHeads", few)
    def train(out, *flags):
        command = ["meta_train.py", *TINY_FLAGS, "--steps", 1, "--out", tmp_path / out, *flags]
        monkeypatch.setattr("sys.argv", list(map(str, command)))
        meta_train.main()
    train("small")
    sizes = "--image-size", 128, "--channels", 8, 8, 16, 16
    train("large", *sizes, "--grow-from", tmp_path / "small/step-1.pt")
    a, b = tensors(tmp_path / "small/step-1.pt"), tensors(tmp_path / "large/step-1.pt")
    key = "G.bottleneck.0.conv1.parametrizations.weight.original"
    assert (a[key] - b[key]).abs().max() < 1e-3                                 # one step of Adam further


def test_a_fixed_embedder_stays_as_it_came(tmp_path, checkpoint):
    """With two ranks, too, because DDP refuses networks without trainable parameters."""
    for i in range(4):
        prepare(tmp_path / f"prepared/head{i}.pt", *ToyHeads(4).load(i, range(3)))
    flags = ["meta_train.py", *TINY_DATA_FLAGS, "--steps", "1", "--out", "run", "--fix-embedder"]
    result = torchrun(ROOT / flags[0], *flags[1:], "--grow-from", checkpoint, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    old, new = tensors(checkpoint), tensors(tmp_path / "run/step-1.pt")
    weights = [key for key in old if key.endswith((".bias", ".original"))]
    assert {key[0] for key in weights if not torch.equal(old[key], new[key])} == {"G", "V"}
    assert "--grow-from" in fail(*flags, cwd=tmp_path)


@pytest.mark.parametrize("capability, dtype", [
    ("amx_bf16", torch.bfloat16), ("avx512_bf16", torch.bfloat16), ("avx2", torch.float32)])
def test_bfloat16_where_the_processor_has_it(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True}, raising=False)
    assert fast_dtype("cpu") == dtype
