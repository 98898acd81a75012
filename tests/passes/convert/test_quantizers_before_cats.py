"""quantizers_before_cats: the same levels, each part of a concatenation quantized by itself."""

import copy

import pytest
import torch
from torch.nn import functional as F

from octav_fx.ir.printer import graph_text
from octav_fx.passes import CONVERT, quantizers_before_cats
from tests.support.concatenations import X, joined
from tests.support.passes import made


def before(join):
    return joined(join, CONVERT[: CONVERT.index(quantizers_before_cats)])


def test_each_part_has_a_quantizer():
    c = before(lambda a, b, x: torch.cat([a.relu(), b], 1))
    whole = copy.deepcopy(c)
    assert [edit.detail for edit in made(c, quantizers_before_cats)] == ["2 parts of cat"]
    assert """\
quantizers_c_input_0 = self.quantizers.c_input_0(relu)
quantizers_c_input_1 = self.quantizers.c_input_1(b)
cat = cat([quantizers_c_input_0, quantizers_c_input_1], 1)
c_bias = self.c.bias
quantizers_c_input = self.quantizers.c_input(cat)
""" in graph_text(c.graph)
    assert torch.equal(c(3 * X), whole(3 * X))
    assert made(c, quantizers_before_cats) == []


@pytest.mark.parametrize(
    "join",
    [
        lambda a, b, x: torch.cat((a, b), dim=1),
        lambda a, b, x: torch.concat([a, b, a], -3),
        lambda a, b, x: F.max_pool2d(torch.cat([F.relu6(a), F.relu6(9 * b)], 1), 3, 2),
        lambda a, b, x: F.relu6(torch.cat([a, 9 * b], 1)),
        lambda a, b, x: F.pad(torch.cat([a, b], 2).clamp(-0.5, 0.3), (0, 1, 0, 1)).transpose(2, 3),
        # One part is an input, one is read by something else, too.
        lambda a, b, x: torch.cat([a, x], 1),
        lambda a, b, x: torch.cat([a, b + x.mean()], 1),
    ],
)
def test_levels_are_the_same(join):
    c = before(join)
    whole = copy.deepcopy(c)
    assert len(made(c, quantizers_before_cats)) == 1
    for factor in (1, 5):
        assert torch.equal(c(factor * X), whole(factor * X))


@pytest.mark.parametrize(
    "join",
    [
        # Neither part is of codes.
        lambda a, b, x: torch.cat([x, x.exp()], 1),
        # The whole is read by something else.
        lambda a, b, x: (y := torch.cat([a, b], 1)) * y.mean(),
        # It is computed with.
        lambda a, b, x: F.gelu(torch.cat([a, b], 1)),
        # Both parts are read by something else: a layer that writes codes for one would have to write floats, too.
        lambda a, b, x: torch.cat([a, b], 1) + (a + b).mean(),
        lambda a, b, x: torch.stack([a, b], 2).flatten(1, 2),
        # Zeros around the whole are saturated, too.
        lambda a, b, x: F.pad(torch.cat([a, b], 1), (0, 1, 0, 1)).clamp(0.1, 0.3),
    ],
)
def test_what_stays(join):
    assert made(before(join), quantizers_before_cats) == []
