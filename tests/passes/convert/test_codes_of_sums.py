"""codes_of_sums: where two paths meet."""

import operator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from octav_fx.deploy.convert import rewritten
from octav_fx.ir.printer import graph_text
from octav_fx.passes import CONVERT, codes_of_sums, integer_layers
from tests.support.deployable import frozen
from tests.support.graphs import model
from tests.support.passes import made


def layers(join, x: torch.Tensor):
    parts = {"a": nn.Conv2d(3, 3, 1), "b": nn.Conv2d(3, 2, 1)}
    c = rewritten(frozen(model(lambda self, x: join(self, self.a(x), x), **parts), x), CONVERT)
    made(c, integer_layers)
    return c


def residual(self, y, x):
    total = F.relu(y + x)
    return self.b(total) + total.mean()


def test_a_sum_and_its_codes():
    x = torch.randn(2, 3, 5, 5)
    c = layers(residual, x)
    expected = c(x)
    assert [edit.node for edit in made(c, codes_of_sums)] == ["add"]
    text = graph_text(c.graph)
    assert (
        """\
quantizers_b_input_scale_1 = self.quantizers.b_input.scale
integer_sum = integer_sum(integer_conv, x, True, quantizers_b_input_scale_1, 4, False)
getitem = getitem(integer_sum, 0)
getitem_1 = getitem(integer_sum, 1)
"""
        in text
    )
    assert "relu" not in text
    assert torch.equal(c(x), expected)
    assert made(c, codes_of_sums) == []


@pytest.mark.parametrize(
    "join",
    [
        lambda s, y, x: s.b(y + x),
        lambda s, y, x: s.b(F.relu(operator.iadd(y, x), inplace=True)),
        lambda s, y, x: s.b(x + y.mean((2, 3), keepdim=True)),
    ],
)
def test_sums(join):
    x = torch.randn(2, 3, 5, 5)
    c = layers(join, x)
    expected = c(x)
    assert len(made(c, codes_of_sums)) == 1
    assert torch.equal(c(x), expected)


@pytest.mark.parametrize(
    "join",
    [
        lambda s, y, x: s.b(torch.add(y, x, alpha=2)),
        lambda s, y, x: s.b(y + 1),
        lambda s, y, x: s.b(r := F.relu(total := y + x)) + r.mean() + total.mean(),
        lambda s, y, x: s.b((z := y * 2).add_(x)) + z.mean(),
        lambda s, y, x: s.b((z := y * 2)[:, :].add_(x)) + z.mean(),
        lambda s, y, x: s.b(F.relu((z := y * 2).view(2, 3, 5, 5).add_(x))) + z.mean(),
        lambda s, y, x: s.b((r := F.relu(y + x), r.mul_(2))[0]),
        lambda s, y, x: s.b((r := y + x, r[:, :1].clamp_(0.1))[0]),
    ],
)
def test_other_sums_stay(join):
    x = torch.randn(2, 3, 5, 5)
    c = layers(join, x)
    expected = c(x)
    assert made(c, codes_of_sums) == []
    assert torch.equal(c(x), expected)
