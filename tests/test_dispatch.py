"""On a GPU a training step waits for Python, so the number of its operators must not grow unnoticed."""
import contextlib
from collections import Counter

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.vgg import cfgs, make_layers

import meta_train
from conftest import networks
from losses import VGG19_LAYERS, VGGFACE_LAYERS, ContentLoss, Features
from model import Config, Discriminator, Embedder, Generator


class Operators(TorchDispatchMode):
    """Counts the operators that are dispatched, except views and device queries, which are cheap."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if not operator.is_view and operator.namespace == "aten":
            self.seen[operator.name()] += 1
        return operator(*args, **(kwargs or {}))


class NoOptimizer:
    def zero_grad(self):
        pass

    def step(self):
        pass


def test_a_step_at_the_papers_sizes_dispatches_few_operators(monkeypatch):
    """At most 4,550 before the optimisers. There were 4,825 before part (1) cached V's weights."""
    monkeypatch.setattr(meta_train, "autocast", lambda device: contextlib.nullcontext())
    with FakeTensorMode():      # shapes only: no memory and no arithmetic
        cfg, content = Config(num_videos=10), ContentLoss("l1")
        E, G, D = Embedder(cfg), Generator(cfg), Discriminator(cfg)
        for letter, layers in (("E", VGG19_LAYERS), ("D", VGGFACE_LAYERS)):
            vgg = Features(make_layers(cfgs[letter]), layers, (0.,) * 3, (1.,) * 3, 1.0)
            content.terms.append(vgg.requires_grad_(False))
        x, y = torch.rand(2, 9, 3, 256, 256), torch.rand(2, 9, 3, 256, 256)
        row = torch.zeros(2, dtype=torch.long)
        with Operators() as operators:
            meta_train.train_step(E, G, D, content, [NoOptimizer()] * 2, row, x, y)
    assert operators.seen["aten::convolution"] > 150
    assert operators.seen.total() <= 4550


def test_the_networks_compile_without_a_graph_break():
    """On CUDA, meta_train.py compiles E, G and V. fullgraph=True raises an error at a graph break."""
    cfg, E, G, D = networks()
    x, y = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    e = torch.rand(2, 16)
    for net, inputs in ((E, (x, y)), (G, (y, e)), (D.V, (x, y))):
        net.eval()          # so that the power iteration does not run between the two calls
        with torch.no_grad(), parametrize.cached():
            expected = net(*inputs)
            net.compile(backend="eager", fullgraph=True)
            result = net(*inputs)
        first = lambda value: value if torch.is_tensor(value) else value[0]
        assert torch.equal(first(result), first(expected))
