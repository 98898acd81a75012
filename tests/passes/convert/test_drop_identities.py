"""drop_identities: dropout and stochastic depth are nothing in eval mode."""

import pytest
import torch
from torch import nn

from octav_fx import Config, calibrate, freeze, quantize, zoo
from octav_fx.deploy.convert import rewritten
from octav_fx.ir.printer import graph_text
from octav_fx.passes import CONVERT, drop_identities
from tests.support.graphs import model
from tests.support.passes import made

ops = zoo.torchvision().ops
X = torch.randn(2, 3, 5, 5)


def before(forward, **parts: nn.Module):
    net = model(forward, a=nn.Conv2d(3, 3, 1), **parts).eval()
    q = quantize(net, X, Config(edge_bits=None))
    return rewritten(freeze(calibrate(q, [X])), CONVERT[: CONVERT.index(drop_identities)])


@pytest.mark.parametrize("part", [nn.Dropout(0.3), nn.Identity(), ops.StochasticDepth(0.3, "row")], ids=type)
def test_the_input_takes_its_place(part):
    c = before(lambda s, x: s.a(s.f(x)), f=part)
    expected = c(X)
    assert len(made(c, drop_identities)) == 1
    text = graph_text(c.graph)
    assert "quantizers_a_input = self.quantizers.a_input(x)\n" in text and "training" not in text
    assert torch.equal(c(X), expected)
    assert made(c, drop_identities) == []


def test_what_has_hooks_stays():
    c = before(lambda s, x: s.a(s.f(x)), f=nn.Identity())
    c.f.register_forward_hook(lambda *_: None)
    assert made(c, drop_identities) == []
