"""selects: nodes that return elements of their input, and zeros around them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from octav_fx.ir.movement import selects
from tests.support.graphs import captured, model

X = torch.randn(2, 4, 6, 6)
CASES = {
    "moved": (lambda s, x: x.flatten(1), True),
    "the largest": (lambda s, x: s.pool(x), True),
    "zeros around": (lambda s, x: F.pad(x, (0, 1)), True),
    "ones around": (lambda s, x: F.pad(x, (0, 1), value=1.0), False),
    "the nearest": (lambda s, x: F.interpolate(x, scale_factor=2), True),
    "the nearest, by a module": (lambda s, x: s.up(x), True),
    "between two": (lambda s, x: F.interpolate(x, scale_factor=2, mode="bilinear"), False),
    "a mean": (lambda s, x: F.avg_pool2d(x, 2), False),
    "computed": (lambda s, x: x.exp(), False),
}


@pytest.mark.parametrize(("forward", "expected"), CASES.values(), ids=list(CASES))
def test_what_selects(forward, expected):
    parts = {"pool": nn.MaxPool2d(2), "up": nn.Upsample(scale_factor=2, mode="nearest-exact")}
    graph = captured(model(forward, **parts), x=X).graph
    (output,) = graph.find_nodes(op="output")
    (node,) = output.all_input_nodes
    assert selects(node) is expected
    (given,) = graph.find_nodes(op="placeholder")
    assert not selects(given)
