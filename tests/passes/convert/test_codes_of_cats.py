"""codes_of_cats: bytes are concatenated, and no float is between the layers."""

import copy

import pytest
import torch
from torch.nn import functional as F

from octav_fx.deploy.codes import codes_of_quantizers, moved
from octav_fx.ir.printer import graph_text
from octav_fx.passes import CONVERT, INTEGERS, codes_of_cats, combine_codes, integer_layers, multiply_codes
from tests.support.concatenations import X, joined
from tests.support.passes import made


def on_levels(join, residual_bits: int | None = None):
    return joined(join, CONVERT, residual_bits)


def test_codes_are_concatenated():
    c = on_levels(lambda a, b, x: F.max_pool2d(torch.cat([a.relu(), b.relu()], 1), 2))
    for graph_pass in (combine_codes, integer_layers):
        made(c, graph_pass)
    expected = c(X)
    assert [edit.node for edit in made(c, codes_of_cats)] == ["cat"]
    assert """\
quantizers_c_input_0_scale = self.quantizers.c_input_0.scale
integer_codes_2 = integer_codes(integer_conv, quantizers_c_input_0_scale, 4, False)
quantizers_c_input_1_scale = self.quantizers.c_input_1.scale
integer_codes_3 = integer_codes(integer_conv_1, quantizers_c_input_1_scale, 4, False)
quantizers_c_input_scale_1 = self.quantizers.c_input.scale
code_cat = code_cat([integer_codes_2, integer_codes_3], quantizers_c_input_scale_1, 1)
max_pool = max_pool(code_cat, [2, 2], [2, 2], [0, 0], [1, 1], False)
""" in graph_text(c.graph)
    assert torch.equal(c(X), expected)
    assert made(c, codes_of_cats) == []


JOINS = {
    "relu": lambda a, b, x: torch.cat([a.relu(), b.relu()], 1),
    "clamps of their own": lambda a, b, x: torch.cat([F.relu6(a), 3 * b], 1),
    "one of them twice": lambda a, b, x: torch.cat([a, b, a], 1),
    "a sum and an input": lambda a, b, x: torch.cat([a + b, x], 1),
    "a function": lambda a, b, x: torch.cat([F.silu(a), F.hardswish(b)], 1),
    "a pool and zeros behind it": lambda a, b, x: F.pad(F.max_pool2d(torch.cat([a, b], 1), 2), (0, 1, 1, 0)),
    "one inside of another": lambda a, b, x: torch.cat([x, torch.cat([a.relu(), b], 1)], 1),
}


# Without quantizers for them, sums and functions are those of floats.
CASES = [
    (join, bits) for join in JOINS for bits in (8, None) if bits or join not in ("a sum and an input", "a function")
]


@pytest.mark.parametrize(("join", "residual_bits"), CASES)
def test_codes_are_those_of_the_definition(join, residual_bits):
    c = on_levels(JOINS[join], residual_bits)
    rule, before = copy.deepcopy(c), c(X)
    made(rule, multiply_codes)
    for graph_pass in INTEGERS:
        made(c, graph_pass)
    assert "code_cat" in graph_text(c.graph)
    # Layers round in another order than the definition: far from ties for this input.
    found, expected = (codes_of_quantizers(g, (X,), {}) for g in (c, rule))
    assert found.keys() == expected.keys()
    assert set(moved(found, expected).values()) == {0.0}
    torch.testing.assert_close(c(X), before, rtol=0, atol=0.05 * float(before.abs().max()))


def test_other_scales_stay_apart():
    c = on_levels(lambda a, b, x: torch.cat([a, b], 1))
    c.get_submodule("quantizers.c_input_1").scale.mul_(2)
    for graph_pass in (combine_codes, integer_layers):
        made(c, graph_pass)
    assert made(c, codes_of_cats) == []
