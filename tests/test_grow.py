"""grow.py: a network of 128 pixels starts with what one of 64 has learned; where bfloat16 is used."""
import pytest
import torch
import torch.nn.functional as F

import meta_train
from beyond.grow import grow
from beyond.toy import ToyHeads
from conftest import ROOT, TINY_FLAGS, fail, networks, tensors, torchrun
from data import Episodes, to_float, to_tensors
from model import save_checkpoint
from runtime.device import fast_dtype
from runtime.files import UserError


def save(path, cfg, E, G, D):
    save_checkpoint(path, "meta", cfg, E=E, G=G, V=D.V, w0=D.w0, b=D.b)


def episodes(size):
    return Episodes(ToyHeads(4, size), K=1, slots=1)


def test_a_grown_network_sees_what_the_small_one_saw(tmp_path):
    """From 64 to 128 pixels: E, V and P start as they were, on the halved pictures."""
    cfg, *small = networks(64, min_channels=16, max_channels=32)
    large_cfg, *large = networks(128, min_channels=8, max_channels=32)
    with torch.no_grad():
        small[1].P.bias.uniform_(-1, 1)
    save(tmp_path / "small.pt", cfg, *small)
    grow(*large, str(tmp_path / "small.pt"), large_cfg, episodes(128))

    frames, points = ToyHeads(4, 64).load(0, lambda count: range(4))
    x, y = (to_float(part) for part in to_tensors(frames, points))      # (4, 3, 64, 64)
    # what averages to x and y again
    X, Y = (F.interpolate(part, scale_factor=2.0) for part in (x, y))
    with torch.no_grad():
        one = torch.ones(1, 32)
        psi, grown = small[1].eval().project(one), large[1].eval().project(one)
        assert torch.allclose(grown[:, :psi.shape[1]], psi, atol=1e-3)
        e, e_grown = small[0].eval()(x, y), large[0].eval()(X, Y)
        v, v_grown = small[2].eval().V(x, y)[0], large[2].eval().V(X, Y)[0]
    for old, new in ((e, e_grown), (v, v_grown)):
        assert (old - new).norm() < 0.1 * old.norm()        # not equal: the borders differ
    frames, points = ToyHeads(4, 128).load(3, lambda count: [0, 32])
    with torch.no_grad():
        e_3 = large[0].eval()(*(to_float(part) for part in to_tensors(frames, points))).mean(0)
    assert torch.allclose(large[2].W[3], e_3, atol=1e-4)    # the row is what E makes of two frames


def test_sizes_and_widths_that_do_not_fit(tmp_path):
    cfg, *small = networks(64, min_channels=16, max_channels=32)
    save(tmp_path / "small.pt", cfg, *small)
    path = str(tmp_path / "small.pt")
    same_cfg, *same = networks(64, min_channels=16, max_channels=32)
    grow(*same, path, same_cfg, episodes(64))
    assert torch.equal(same[1].to_rgb.bias, small[1].to_rgb.bias)
    for size, widths in ((256, (8, 32)), (128, (16, 32)), (128, (8, 16))):
        cfg, *nets = networks(size, min_channels=widths[0], max_channels=widths[1])
        with pytest.raises(UserError, match="64 and twice --min-channels"):
            grow(*nets, path, cfg, episodes(size))


@pytest.mark.parametrize("old, new", [(128, 256), (256, 512)])
def test_other_sizes_are_not_inside_each_other(tmp_path, old, new):
    """P and G's decoder would stay random, and the run go on as if nothing were wrong."""
    cfg, *small = networks(old, min_channels=16, max_channels=32)
    save(tmp_path / "small.pt", cfg, *small)
    cfg, *large = networks(new, min_channels=8, max_channels=32)
    with pytest.raises(UserError, match=f"it has {old} pixels"):
        grow(*large, str(tmp_path / "small.pt"), cfg, episodes(new))


def test_grow_from_as_a_user_runs_it(tmp_path, monkeypatch):
    few = lambda heads, size, first=0: ToyHeads(min(heads, 20), size, first)
    monkeypatch.setattr(meta_train, "ToyHeads", few)
    def train(out, *flags):
        command = ["meta_train.py", *TINY_FLAGS, "--steps", 1, "--out", tmp_path / out, *flags]
        monkeypatch.setattr("sys.argv", list(map(str, command)))
        meta_train.main()
    train("small", "--min-channels", 16)
    train("large", "--image-size", 128, "--grow-from", tmp_path / "small/step-1.pt")
    a, b = tensors(tmp_path / "small/step-1.pt"), tensors(tmp_path / "large/step-1.pt")
    key = "G.bottleneck.0.conv1.parametrizations.weight.original"
    assert (a[key] - b[key]).abs().max() < 1e-3                                 # one step of Adam further


def test_a_fixed_embedder_stays_as_it_came(tmp_path, checkpoint):
    """Under two ranks, too, where DDP would refuse a network that learns nothing."""
    flags = ["meta_train.py", *TINY_FLAGS, "--steps", "1", "--out", "run", "--fix-embedder"]
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
