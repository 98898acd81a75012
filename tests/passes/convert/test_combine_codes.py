"""combine_codes: sums and means of codes, the bits of the definition."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from octav_fx import Config, calibrate, freeze, quantize
from octav_fx.deploy.codes import codes_of_quantizers, moved
from octav_fx.deploy.convert import rewritten
from octav_fx.ir.printer import graph_text
from octav_fx.passes import CONVERT, INTEGERS, combine_codes, multiply_codes
from tests.support.graphs import model
from tests.support.passes import made


def on_levels(join, x: Tensor, bits: int = 8, **parts: nn.Module):
    torch.manual_seed(0)
    parts = {"a": nn.Conv2d(3, 3, 1), "b": nn.Conv2d(3, 3, 1), "head": nn.Linear(3, 2), **parts}
    net = model(lambda self, x: join(self, self.a(x), self.b(x)), **parts).eval()
    q = quantize(net, x, Config(bits, bits, edge_bits=None, residual_bits=8))
    return rewritten(freeze(calibrate(q, [x])), CONVERT)


def pooled(self, a, b):
    return self.head(F.adaptive_avg_pool2d(F.relu(a + b), 1).flatten(1))


def test_a_sum_and_a_mean():
    c = on_levels(pooled, torch.randn(2, 3, 5, 5))
    names = ["quantizers.adaptive_avg_pool_x", "quantizers.head_input"]
    assert [edit.node for edit in made(c, combine_codes)] == names
    assert """\
integer_codes = integer_codes(a, quantizers_add_x_scale, 8, True)
quantizers_b_weight = self.quantizers.b_weight()
quantizers_b_bias = self.quantizers.b_bias()
b = conv2d(quantizers_a_input, quantizers_b_weight, quantizers_b_bias, (1, 1), (0, 0), (1, 1), 1)
quantizers_add_y_scale = self.quantizers.add_y.scale
integer_codes_1 = integer_codes(b, quantizers_add_y_scale, 8, True)
quantizers_adaptive_avg_pool_x_scale = self.quantizers.adaptive_avg_pool_x.scale
code_sum = code_sum(integer_codes, integer_codes_1, quantizers_add_x_scale, quantizers_add_y_scale, \
quantizers_adaptive_avg_pool_x_scale, 8, True, 8, True, 8, False)
quantizers_head_input_scale = self.quantizers.head_input.scale
code_mean = code_mean(code_sum, quantizers_adaptive_avg_pool_x_scale, quantizers_head_input_scale, 8, False, 8, False, \
True, axes=(-2, -1))
flatten = code_mean.flatten(1)
levels_3 = levels(flatten, quantizers_head_input_scale, 8, False)
""" in graph_text(c.graph)
    assert made(c, combine_codes) == []


JOINS = {
    "relu": pooled,
    "signed": lambda s, a, b: s.head((a + b).mean((2, 3))),
    "relu6": lambda s, a, b: s.head(F.relu6(a * 9 + b).mean((2, 3), keepdim=True).flatten(1)),
    "the sum itself goes on": lambda s, a, b: s.head((F.relu(a + b) + a).mean((2, 3))),
    "a pool between": lambda s, a, b: s.head(F.max_pool2d(a + b, 2).mean((2, 3))),
    "zeros around it": lambda s, a, b: s.head(F.pad(a + b, (0, 2, 1, 0)).mean((2, 3))),
    "cut by a clamp": lambda s, a, b: s.head(F.pad(a + b, (0, 2, 1, 0)).clamp(0.1, 0.3).mean((2, 3))),
    "of a clip": lambda s, a, b: s.head((a + b).reshape(-1, 1, 5, 5, 3).mean((2, 3))),
    "the last two axes of five": lambda s, a, b: s.head((a + b).unsqueeze(1).mean((-2, -1))),
    "its sizes": lambda s, a, b: s.head((y := a + b).reshape(y.size(0), 3, 5, y.shape[-1]).mean((2, 3))),
    "twice the same": lambda s, a, b: s.head((a + a).mean((2, 3))),
    "dropout": lambda s, a, b: s.head(s.drop(F.adaptive_avg_pool2d(F.relu(a + b), 1).flatten(1))),
}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("join", JOINS)
def test_codes_are_those_of_the_definition(join, bits):
    x = torch.randn(2, 3, 5, 5)
    c = on_levels(JOINS[join], x, bits, drop=nn.Dropout(0.5))
    rule = copy.deepcopy(c)
    made(rule, multiply_codes)
    assert made(c, combine_codes)
    # Layers are still on levels: their results differ from the rule's by roundings, far from ties for this input.
    found, expected = (codes_of_quantizers(g, (x,), {}) for g in (c, rule))
    assert found.keys() == expected.keys()
    assert set(moved(found, expected).values()) == {0.0}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("join", JOINS)
def test_nothing_is_float_between_layers(join, bits):
    x = torch.randn(2, 3, 5, 5)
    c = on_levels(JOINS[join], x, bits, drop=nn.Dropout(0.5))
    before = c(x)
    for graph_pass in INTEGERS:
        made(c, graph_pass)
    text = graph_text(c.graph)
    assert "code_mean" in text
    assert "self.quantizers.head_input(" not in text
    # A step of the last quantizer, which a code at a tie may be off.
    torch.testing.assert_close(c(x), before, rtol=0, atol=0.05 * float(before.abs().max()))


@pytest.mark.parametrize(
    "join",
    [
        # Read by more than a quantizer; a sum with a constant; one of another kind.
        lambda s, a, b: s.head((total := a + b).mean((2, 3))) + total.amax((2, 3))[:, :2],
        lambda s, a, b: (a + 1).flatten(1),
        lambda s, a, b: torch.add(a, b, alpha=2).flatten(1),
        lambda s, a, b: (a + b).flatten(1),
        lambda s, a, b: F.avg_pool2d(a, 2).flatten(1),
    ],
)
def test_what_stays(join):
    x = torch.randn(2, 3, 5, 5)
    c = on_levels(join, x)
    expected = c(x)
    assert [edit.node for edit in made(c, combine_codes) if "add" in edit.node] == []
    torch.testing.assert_close(c(x), expected, rtol=0, atol=0.05 * float(expected.abs().max()))


def test_a_model_in_half_precision_stays_on_levels():
    x = torch.randn(2, 3, 5, 5, dtype=torch.bfloat16)
    torch.manual_seed(0)
    net = model(lambda self, x: self.b(F.relu(self.a(x) + x)), a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 3, 1))
    q = quantize(net.eval().bfloat16(), x, Config(8, 8, residual_bits=8))
    c = rewritten(freeze(calibrate(q, [x])), CONVERT)
    assert made(c, combine_codes) == []
    assert c(x).dtype is torch.bfloat16
