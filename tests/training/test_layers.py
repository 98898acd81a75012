"""Every layer from float to integers: quantized, trained for a step, frozen and converted, with the same numbers."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import octav_fx
from octav_fx import Config
from octav_fx.capture.rerun import without_quantizers
from octav_fx.nn import IntegerWeight
from octav_fx.nn.integer_rule import Rescale
from tests.support.layers import LAYERS, Layer

# Of the largest value: float32 sums of some dozens of levels.
ROUNDING = 2.0**-20


class AsFunction(nn.Module):
    """A layer as its function, the weight and the bias as parameters."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.function, self.rest = layer.functions[0], layer.rest
        for name, shape in layer.state.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        inputs = (x,) if y is None else (x, y)
        return self.function(*inputs, self.weight, self.bias, **self.rest)


def ways() -> list[Any]:
    """Each layer as a function and, where there is one, as a module."""
    found = [pytest.param(layer, AsFunction(layer), id=f"{layer.op}-function") for layer in LAYERS]
    modules = [(layer, layer.module(*layer.arguments)) for layer in LAYERS if layer.module is not None]
    return found + [pytest.param(layer, module, id=f"{layer.op}-module") for layer, module in modules]


@pytest.mark.parametrize(("layer", "module"), ways())
def test_a_layer_goes_all_the_way_to_integers(layer: Layer, module: nn.Module) -> None:
    module, inputs = copy.deepcopy(module), tuple(map(torch.randn, layer.inputs.values()))
    q = octav_fx.quantize(module, inputs, Config(edge_bits=None), strict=True)
    assert octav_fx.coverage(q) == octav_fx.Coverage(layer.macs, layer.macs, [])
    by_operand = {row.operand: row for row in octav_fx.rows(q)}
    assert list(by_operand) == [*layer.inputs, "weight"]
    assert by_operand["weight"].granularity == f"channel {layer.channel}"
    with without_quantizers(q):
        assert torch.equal(q(*inputs), module(*inputs))

    optimizer = torch.optim.SGD(q.parameters(), lr=0.01)
    before = {name: value.clone() for name, value in q.named_parameters()}
    q(*inputs).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in q.named_parameters())

    q.eval()
    octav_fx.freeze(octav_fx.calibrate(q, [inputs]))
    converted = octav_fx.convert(q, integers=False)
    assert sum(isinstance(part, IntegerWeight) for part in converted.modules()) == 1
    # A bias on the grid of its sums is half a unit of them off at most; what has none is the same to the bit.
    units = [float(part.multiplier.abs().max()) for part in converted.modules() if isinstance(part, Rescale)]
    expected = q(*inputs)
    bound = max(units) / 2 + ROUNDING * float(expected.abs().max()) if units else 0.0
    assert float((converted(*inputs) - expected).detach().abs().max()) <= bound
