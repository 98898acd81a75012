"""gates_on_codes: squeeze and excitation without floats of the size of an image."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from octav_fx import Config, calibrate, freeze, quantize
from octav_fx.deploy.convert import rewritten
from octav_fx.ir.printer import graph_text
from octav_fx.passes import CONVERT, combine_codes, functions_of_codes, gates_on_codes, integer_layers
from tests.support.graphs import model
from tests.support.passes import made

pytestmark = pytest.mark.usefixtures("as_with_vnni")

X = torch.randn(2, 3, 5, 5)


def on_codes(forward):
    torch.manual_seed(0)
    parts = {name: nn.Conv2d(3, 3, 1) for name in "abc"}
    q = quantize(model(forward, **parts).eval(), X, Config(8, 8, edge_bits=None, residual_bits=8))
    c = rewritten(freeze(calibrate(q, [X])), CONVERT)
    for graph_pass in (combine_codes, integer_layers, functions_of_codes):
        made(c, graph_pass)
    return c


def excited(self, x):
    x = F.silu(self.a(x))
    return self.c(torch.sigmoid(self.b(F.adaptive_avg_pool2d(x, 1))) * x)


def test_squeeze_and_excitation():
    c = on_codes(excited)
    expected = c(X)
    assert [edit.node for edit in made(c, gates_on_codes)] == ["mul"]
    assert """\
gated_codes = gated_codes(lookup, quantizers_adaptive_avg_pool_x_scale, sigmoid, quantizers_c_input_scale, 8, True, \
8, True)
""" in graph_text(c.graph)
    assert torch.equal(c(X), expected)
    assert made(c, gates_on_codes) == []


OTHERS = {
    "a number": lambda s, x: s.c(F.silu(s.a(x)).mean((2, 3), keepdim=True) * 2),
    "written in place, seen by a view": lambda s, x: (
        (y := F.adaptive_avg_pool2d(x, 1)) + (z := s.b(y)),
        (gate := y.sigmoid())[:, :2],
        s.c(gate.mul_(z)),
    ),
    "read twice": lambda s, x: s.c(y := F.adaptive_avg_pool2d(x, 1).sigmoid() * s.b(F.silu(s.a(x)))) + y,
}


@pytest.mark.parametrize("forward", OTHERS.values(), ids=list(OTHERS))
def test_what_is_no_gate(forward):
    assert made(on_codes(forward), gates_on_codes) == []


def test_any_other_shape_is_the_product():
    c = on_codes(lambda s, x: s.c(F.adaptive_avg_pool2d(y := F.silu(s.a(x)), 1) + y * x.mean(1, keepdim=True)))
    expected = c(X)
    made(c, gates_on_codes)
    assert torch.equal(c(X), expected)
