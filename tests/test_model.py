"""model.py against the paper's numbers and against plain references."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from conftest import networks, pictures
from model import (AdaBlock, Config, Discriminator, DownBlock, Embedder, Generator, InstanceNorm,
                   SelfAttention, adain, instance_norm, upsample_conv)
from runtime.checkpoint import load_checkpoint


def millions(module):
    return sum(p.numel() for p in module.parameters()) / 1e6


def test_parameter_counts_are_the_papers():
    cfg = Config()
    E, G, D = Embedder(cfg), Generator(cfg), Discriminator(cfg)     # the meta device is no faster
    assert [round(millions(m)) for m in (E, G, D.V)] == [15, 38, 20]            # Sec. 3.4
    assert sum(G.psi_sizes) == G.P.weight.shape[0] == 13056
    assert [b.conv2.out_channels for b in E.net.blocks] == [64, 128, 256, 512, 512, 512]
    assert [b.conv2.out_channels for b in D.V.blocks] == [64, 128, 256, 512, 512, 512, 512]
    assert [b.conv2.out_channels for b in G.up] == [512, 256, 128, 64]
    attention = (E.net.attention, D.V.attention, G.attention_down, G.attention_up)
    assert {net.out.out_channels for net in attention} == {256}


@pytest.mark.parametrize("size", [64, 128, 256, 512])
def test_shapes_and_where_attention_sits(size):
    cfg, E, G, D = networks(size, channels=(8,) * {64: 2, 128: 3, 256: 4, 512: 5}[size] + (16,))
    seen = {}
    for name, net in (("E", E), ("G", G), ("D", D)):
        for path, module in net.named_modules():
            if isinstance(module, SelfAttention):
                note = lambda m, a, out, key=f"{name}.{path}": seen.update({key: out.shape[-1]})
                module.register_forward_hook(note)
    x, y = torch.rand(2, 3, size, size) * 2 - 1, torch.rand(2, 3, size, size) * 2 - 1
    e = E(x, y)
    x_hat = G(y, e)
    score, features = D(x_hat, y, D.rows(torch.tensor([0, 3])) + D.w0)
    assert e.shape == (2, 16) and (e >= 0).all()
    assert x_hat.shape == x.shape and x_hat.abs().max() <= 1
    assert score.shape == (2,)
    assert [f.shape[-1] for f in features] == [size >> k for k in range(1, len(features))] + [4]
    assert seen == {"E.net.attention": 32, "D.V.attention": 32, "G.attention_down": 32,
                    "G.attention_up": 32}       # four times the bottleneck: 8 here, 16 in the paper
    assert G.attention_up_after == 2 and cfg.bottleneck == 8 and Config().bottleneck == 16


def test_spectral_norm_on_every_conv_and_linear_layer_and_nothing_else():
    for net in networks()[1:]:
        for name, module in net.named_modules():
            if name.endswith("parametrizations") or ".parametrizations." in name:
                continue
            assert parametrize.is_parametrized(module) == isinstance(module, (nn.Conv2d, nn.Linear)), name
    G = networks()[2]
    for _ in range(100):
        G.P.weight  # each access in training mode is a step of the power iteration
    for m in (G.P, G.bottleneck[0].conv1):
        assert torch.linalg.matrix_norm(m.weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-2)


def test_every_parameter_gets_a_gradient():
    cfg, E, G, D = networks()
    x, y = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    D(G(y, E(x, y)), y, D.rows(torch.tensor([0, 1])) + D.w0)[0].sum().backward()
    assert [n for net in (E, G, D) for n, p in net.named_parameters() if p.grad is None] == []


def test_folding_changes_nothing():
    cfg, E, G, D = networks()
    G.P.gain.fill_(2.0)
    G.eval()
    y, e = torch.rand(2, 3, 64, 64), torch.rand(2, 16) * 5
    with torch.no_grad():
        full, psi = G(y, e), G.project(e)
        assert G.fold() is G and not any(parametrize.is_parametrized(m) for m in G.modules())
        assert full.std() > 0.01 and (G(y, e) - full).abs().max() < 1e-4
        assert torch.allclose(G.project(e), psi, atol=1e-5)


def test_discriminator_is_eq_5():
    cfg, E, G, D = networks()
    D.eval()
    x, y, w = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64), torch.randn(2, 16)
    v = D.V(x, y)[0]
    with torch.no_grad():
        D.b.fill_(0.7)
    assert torch.allclose(D(x, y, w)[0], torch.stack([v[0] @ w[0], v[1] @ w[1]]) + 0.7, atol=1e-5)


def test_blocks_against_their_definition():
    """The shortcuts change nothing: pooling before the 1x1 skip, upsampling after it, and the blur after the
    first convolution, but for the two pixels at each border."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, 16, 16)
    block = DownBlock(8, 16, norm=True).eval()
    h = block.conv1(F.relu(F.instance_norm(x)))
    h = block.conv2(F.relu(F.instance_norm(h)))
    assert torch.allclose(block(x), F.avg_pool2d(h + block.skip(x), 2), atol=1e-5)
    first = DownBlock(8, 16, first=True).eval()
    h = first.conv2(F.relu(first.conv1(x)))
    assert torch.allclose(first(x), F.avg_pool2d(h + first.skip(x), 2), atol=1e-5)
    up, a, b = AdaBlock(8, 4, up=True).eval(), torch.randn(2, 16), torch.randn(2, 8)
    double = lambda t: F.interpolate(t, scale_factor=2.0, mode="bilinear")
    kernel = up.conv1.weight                                                    # 3x3, spectrally normalised
    h = F.conv2d(double(F.relu(adain(x, a))), kernel, up.conv1.bias, padding=1)
    inside = lambda t: t[..., 2:-2, 2:-2]
    mine = upsample_conv(F.relu(adain(x, a)), up.conv1)
    assert torch.allclose(inside(mine), inside(h), atol=1e-5)
    assert (mine - h).abs().max() < 0.5 * h.abs().max()         # and the border is neither dark nor extreme
    h = up.conv2(F.relu(adain(mine, b)))
    assert torch.allclose(up(x, a, b), h + up.skip(double(x)), atol=1e-5)


@pytest.mark.parametrize("B", [1, 3])
def test_instance_normalisation_against_pytorch(B):
    x, scale, shift = torch.randn(B, 8, 5, 7), torch.randn(B, 8), torch.randn(B, 8)
    expected = F.instance_norm(x) * scale[..., None, None] + shift[..., None, None]
    for h in (x, x.to(memory_format=torch.channels_last)):
        assert torch.allclose(instance_norm(h, scale, shift), expected, atol=1e-5)
    affine = InstanceNorm(8, affine=True)
    affine.load_state_dict({"weight": scale[0], "bias": shift[0]})
    assert torch.allclose(affine(x)[0], expected[0], atol=1e-5)


def test_a_picture_keeps_its_memory_format_in_all_blocks():
    """Each change of it copies all activations, which took a fifth of the time at 256 pixels."""
    G, kept = networks()[2].eval().fold().to(memory_format=torch.channels_last), []

    def note(layer, inputs):
        x, = inputs
        kept.append(x.stride() == torch.empty(x.shape, memory_format=torch.channels_last).stride())
    for layer in nn.ModuleList([*G.down, *G.bottleneck, *G.up, G.to_rgb]).modules():
        if isinstance(layer, nn.Conv2d) and layer.in_channels > 3:
            layer.register_forward_pre_hook(note)
    with torch.inference_mode():
        G.render(torch.rand(1, 3, 64, 64), torch.rand(1, sum(G.psi_sizes)))
    assert len(kept) > 20 and all(kept)


def test_the_last_convolution_leaves_no_line_at_the_border():
    G = Generator(Config(64, (8, 16, 16))).eval()
    flat = torch.rand(1, 8, 1, 1).expand(1, 8, 16, 16)
    colour = G.to_rgb(flat)
    assert torch.allclose(colour, colour[:, :, 8:9, 8:9].expand_as(colour), atol=1e-6)


def test_an_untrained_generator_has_no_mesh():
    """Nearest upsampling copies the centre of the spectrum to a half and a quarter of the sampling frequency,
    where it shows as a mesh of 2 and 4 pixels on skin. With it, the ratios below are 17 and 5."""
    cfg, E, G, D = networks(128, channels=(16, 16, 32, 64))
    y = torch.zeros(8, 3, 128, 128)
    y[:, :, 32:96, 32:96] = torch.rand(8, 3, 64, 64).round()
    with torch.no_grad():
        grey = G.eval()(y, torch.rand(8, 64) * 5).mean(1)                       # (8, 128, 128)
    window = torch.hann_window(128)
    power = torch.fft.fft2((grey - grey.mean((1, 2), keepdim=True)) * window * window[:, None]).abs().square()
    power, f = power.mean(0), torch.fft.fftfreq(128).abs() * 128
    radius = (f[:, None] ** 2 + f ** 2) ** 0.5
    for period in (4, 2):
        c = 128 / period
        box = ((f - c).abs() <= 5)[:, None] & (f <= 5)
        ring = ((radius - c).abs() <= 4) & (f > 8) & (f > 8)[:, None]
        assert power[box | box.T].mean() < 3 * power[ring].mean(), period


def test_adain_sets_mean_and_deviation():
    x, psi = torch.randn(2, 3, 8, 8) * 5 + 2, torch.tensor([[.5, 0, -.5, 1, 2, 3.]]).expand(2, -1)
    out = adain(x, psi)
    assert torch.allclose(out.mean((2, 3)), psi[:, 3:], atol=1e-4)
    assert torch.allclose(out.std((2, 3), correction=0), 1 + psi[:, :3], atol=1e-3)


def test_self_attention_against_a_loop():
    torch.manual_seed(0)
    attention, x = SelfAttention(16).eval(), torch.randn(1, 16, 4, 4)
    assert torch.equal(attention(x), x)                                         # gamma starts at 0
    attention.gamma.data.fill_(1.5)
    q, k = attention.query(x)[0], F.max_pool2d(attention.key(x), 2)[0]
    v = F.max_pool2d(attention.value(x), 2)[0]
    h = torch.zeros(8, 4, 4)
    for r in range(4):
        for c in range(4):
            weights = torch.stack([q[:, r, c] @ k[:, a, b] for a in range(2) for b in range(2)]).softmax(0)
            h[:, r, c] = sum(w * v[:, a, b] for w, (a, b) in zip(weights, [(0, 0), (0, 1), (1, 0), (1, 1)]))
    assert torch.allclose(attention(x), x + 1.5 * attention.out(h[None]), atol=1e-5)


@pytest.mark.parametrize("wrong", [dict(image_size=100), dict(image_size=1024), dict(channels=(4, 8, 16, 32)),
                                   dict(channels=(64, 128, 256)), dict(channels=(16,) * 6)])
def test_config_refuses_what_cannot_be_built(wrong):
    with pytest.raises(ValueError):
        Config(**wrong)


@pytest.mark.parametrize("size,channels,widths", [
    (256, (64, 128, 256, 512), [64, 128, 256, 512, 512, 512]),
    (128, (16, 32, 64, 256), [16, 32, 64, 128, 256]),
    (256, (16, 16, 32, 64, 256), [16, 16, 32, 64, 128, 256]), (64, (32, 64, 128), [32, 64, 128, 128])])
def test_the_widths_of_the_embedder_follow_from_those_of_the_generator(size, channels, widths):
    assert Config(size, channels).embedder_channels() == widths


def test_checkpoint_loads_under_weights_only_and_is_flat(checkpoint):
    state = torch.load(checkpoint, weights_only=True)
    names = {"config", "w0", "b", "E.net.attention.gamma", "V.attention.gamma", "G.attention_up.gamma"}
    assert names <= state.keys()
    assert all(isinstance(v, (torch.Tensor, str, int, dict)) for v in state.values())
    assert load_checkpoint(checkpoint)["config"] == networks()[0]


def test_w_can_be_trained_row_by_row():
    """A row that is drawn gets the gradient, and the others get zeros, which Adam with beta1 = 0 ignores."""
    D = networks()[3]
    D.rows(torch.tensor([1, 1])).sum().backward()
    assert D.W.grad.tolist() == [[0.0] * 16, [2.0] * 16, [0.0] * 16, [0.0] * 16]


def test_pooling_is_relu_then_the_sum_by_hand():
    """A.4: ReLU, then global sum pooling, of the last block's output."""
    cfg, E, G, D = networks()
    for net in (E.net, D.V):
        v, features = net.eval()(pictures(2), pictures(2))
        by_hand = torch.zeros(2, 16)
        for r in range(4):
            for c in range(4):
                by_hand += features[-1][:, :, r, c].clamp(min=0)
        assert (features[-1] < 0).any() and torch.allclose(v, by_hand, atol=1e-4)


def test_psi_gain_scales_psi():
    plain, gained = (networks()[2].eval() for _ in range(2))
    gained.P.gain.fill_(8.0)
    e, y = torch.rand(2, 16) * 5, pictures(2)
    assert torch.allclose(gained.project(e), 8 * plain.project(e), atol=1e-5)
    assert (gained(y, e) - plain.render(y, 8 * plain.project(e))).abs().max() < 1e-4
    assert torch.allclose(plain.project(2 * e), 2 * plain.project(e), atol=1e-6)    # P is a matrix


def test_the_generator_depends_on_the_person_and_on_the_pose():
    cfg, E, G, D = networks()
    with torch.no_grad():
        e, y = 20 * torch.rand(2, 16), pictures(2)
        same_y, same_e = G.eval()(y[:1].expand(2, -1, -1, -1), e), G(y, e[:1].expand(2, -1))
    assert all((pair[0] - pair[1]).abs().mean() > 0.01 for pair in (same_y, same_e))
    psi = G.project(e[:1]).detach().requires_grad_()
    G.render(y[:1], psi).square().sum().backward()
    assert (psi.grad != 0).float().mean() > 0.7     # every gamma and beta matters, except for dead units


def test_w_starts_like_the_embeddings():
    """W is uniform around 0.5, positive like embeddings and of little spread; w0 is around zero."""
    torch.manual_seed(0)
    D = Discriminator(Config(64, (8, 16, 64), num_videos=500))
    assert 0.4 <= D.W.min() < 0.41 and 0.59 < D.W.max() <= 0.6
    assert D.W.mean().item() == pytest.approx(0.5, abs=0.02)
    assert D.W.std().item() == pytest.approx(0.2 * 12 ** -.5, abs=0.005) and D.W[0].ne(D.W[1]).all()
    assert 0 < D.w0.abs().max() <= 1 / 8 and D.w0.min() < 0 < D.w0.max()
