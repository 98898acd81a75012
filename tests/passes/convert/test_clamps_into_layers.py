"""clamps_into_layers: relu and its like at the end of an integer layer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from octav_fx.deploy.convert import rewritten
from octav_fx.passes import CONVERT, clamps_into_layers, integer_layers
from octav_fx.passes.convert.clamps_into_layers import within
from tests.support.deployable import frozen
from tests.support.graphs import model
from tests.support.passes import made


def layers(after, x: torch.Tensor):
    """What follows a linear layer, and the layer on codes."""
    c = rewritten(frozen(model(lambda self, x: after(self.a(x)), a=nn.Linear(5, 4)), x), CONVERT)
    made(c, integer_layers)
    return c


@pytest.mark.parametrize(
    ("after", "low", "high"),
    [
        (F.relu, 0.0, None),
        (lambda y: y.relu_(), 0.0, None),
        (F.relu6, 0.0, 6.0),
        (lambda y: y.clamp(-0.25, 0.5), -0.25, 0.5),
        (lambda y: torch.clamp(y, max=0.5), None, 0.5),
        (F.hardtanh, -1.0, 1.0),
        (lambda y: F.hardtanh(y, max_val=0.1), -1.0, 0.1),
        (lambda y: F.relu(y).clamp(-1, 0.1), 0.0, 0.1),
        (nn.Hardtanh(-0.1, 0.2), -0.1, 0.2),
    ],
)
def test_clamps(after, low, high):
    x = torch.randn(30, 5)
    c = layers(after, x)
    expected = c(x)
    assert made(c, clamps_into_layers)
    (node,) = [node for node in c.graph.nodes if node.name == "integer_linear"]
    assert dict(node.kwargs) == {"fraction": 4, "low": low, "high": high}
    assert [user.op for user in node.users] == ["output"]
    assert torch.equal(c(x), expected)
    assert made(c, clamps_into_layers) == []


@pytest.mark.parametrize("after", [lambda y: y.relu() + y, F.gelu, lambda y: y.clamp(y.mean(), 1)])
def test_what_is_no_clamp_or_has_other_readers_stays(after):
    assert made(layers(after, torch.randn(30, 5)), clamps_into_layers) == []


BOUND = st.one_of(st.none(), st.integers(-3, 3).map(float))


@given(first=st.tuples(BOUND, BOUND), second=st.tuples(BOUND, BOUND))
def test_two_clamps_are_one(first, second):
    (low, high), x = first, torch.arange(-5, 5.5, 0.5)
    if low is not None and high is not None and low > high:
        low = high
    known = {"low": low, "high": high}

    def clamp(x, low, high):
        return x if low is None and high is None else x.clamp(low, high)

    one = within(known, *second)
    assert torch.equal(clamp(x, one["low"], one["high"]), clamp(clamp(x, low, high), *second))
