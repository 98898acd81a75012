"""pools_of_layers: the pool of channels last behind an integer layer with a float result."""

import torch
from torch import nn

from octav_fx.deploy.convert import rewritten
from octav_fx.ir.printer import graph_text
from octav_fx.passes import CONVERT, codes_between_layers, integer_layers, pools_of_layers
from tests.support.deployable import frozen
from tests.support.passes import made


class Block(nn.Module):
    """A pool that a layer and a sum read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.inner = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = nn.functional.max_pool2d(self.conv(x), 3, 2, padding=1)
        return y + self.inner(y)


def test_a_pool_that_a_sum_reads():
    x = torch.randn(2, 3, 9, 9)
    c = rewritten(frozen(Block(), x), CONVERT)
    for graph_pass in (integer_layers, codes_between_layers):
        made(c, graph_pass)
    before = c(x)
    assert [edit.verb for edit in made(c, pools_of_layers)] == ["pool"]
    assert "max_pool = max_pool(integer_conv, [3, 3], [2, 2], [1, 1], [1, 1], False)" in graph_text(c.graph)
    assert torch.equal(c(x), before)
    assert made(c, pools_of_layers) == []


def test_a_pool_of_something_else_stays():
    x = torch.randn(2, 3, 9, 9)
    c = rewritten(frozen(nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(3, 4, 3)), x), CONVERT)
    made(c, integer_layers)
    assert made(c, pools_of_layers) == []
