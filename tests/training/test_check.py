"""check: the graphs against the float model, on data of the user's own."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import octav_fx
from octav_fx import OctavError
from tests.support.graphs import model


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.norm(self.first(x)).relu()
        return self.second(y if mask is None else y * mask)


def test_equal_graphs_pass_and_nothing_changes() -> None:
    q = octav_fx.quantize(Net().train(), torch.randn(4, 8))
    before = {name: value.clone() for name, value in q.state_dict().items()}
    octav_fx.check(q, [torch.randn(3, 8), {"x": torch.randn(5, 8), "mask": torch.ones(8)}, (torch.randn(2, 8),)])
    assert len(q.graphs_of(True)) == 2
    for name, value in q.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_first_layer_that_differs_is_named() -> None:
    q = octav_fx.quantize(Net().eval(), torch.randn(4, 8))
    relu = next(node for node in q.graph.nodes if "relu" in node.name)
    relu.target = "sigmoid"
    q.recompile()
    words = "batch 1: the model computes something else than the float model, quantizers aside: .* differs is second"
    with pytest.raises(OctavError, match=words):
        octav_fx.check(q, [torch.full((2, 8), torch.nan), torch.randn(4, 8)])


def test_parts_get_the_inputs_of_the_float_model() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.one(x) if x.sum() > 0 else self.two(self.one(x))

    q = octav_fx.quantize(model(forward, one=Net().eval(), two=Net().eval()), -torch.ones(4, 8))
    octav_fx.check(q, [torch.ones(4, 8), -torch.ones(2, 8)])
    relu = next(node for node in q.two.graph.nodes if "relu" in node.name)
    relu.target = "sigmoid"
    q.two.recompile()
    octav_fx.check(q, [torch.ones(4, 8)])
    with pytest.raises(OctavError, match=re.escape("batch 0: two computes something else")):
        octav_fx.check(q, [-torch.ones(4, 8)])


def test_what_is_not_quantized() -> None:
    with pytest.raises(OctavError, match=r"holds no module that octav_fx\.quantize returned"):
        octav_fx.check(Net(), [])
