"""bounds_as_numbers: clamps to buffers are clamps to what is in them."""

import math

import pytest
import torch
from torch import Tensor, nn

from octav_fx import Config, calibrate, convert, export_onnx, freeze, quantize
from octav_fx.deploy.convert import rewritten
from octav_fx.deploy.runtimes import run_onnx
from octav_fx.ir.printer import graph_text
from octav_fx.passes import CONVERT, bounds_as_numbers
from tests.support.deployable_models import relative
from tests.support.passes import made

X = torch.randn(5, 8)


class Bounded(nn.Module):
    def __init__(self, low: object, high: object, call=torch.clamp) -> None:
        super().__init__()
        self.layer, self.call = nn.Linear(8, 6), call
        self.register_buffer("low", low if low is None else torch.as_tensor(low))
        self.register_buffer("high", high if high is None else torch.as_tensor(high))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.call(x, self.low, self.high))


def frozen(model: nn.Module, x: Tensor = X) -> nn.Module:
    q = quantize(model.eval(), x, Config(4, 4, edge_bits=None))
    return freeze(calibrate(q, [x]))


def before(model: nn.Module) -> nn.Module:
    return rewritten(frozen(model), CONVERT[: CONVERT.index(bounds_as_numbers)])


@pytest.mark.parametrize(
    "model, text",
    [
        (Bounded(-0.5, 0.75), "clamp = clamp(x, -0.5, 0.75)"),
        (Bounded(-0.5, None), "clamp = clamp(x, -0.5, None)"),
        (Bounded(-math.inf, 0.75), "clamp = clamp(x, None, 0.75)"),
        (Bounded(-0.5, 0.75, lambda x, low, high: x.clamp(max=high)), "clamp = x.clamp(max=0.75)"),
        (Bounded(math.inf, math.inf), "clamp = clamp(x, inf, None)"),
        (Bounded(-math.inf, math.inf), "quantizers_layer_input = self.quantizers.layer_input(x)"),
    ],
)
def test_numbers_take_the_place_of_buffers(model, text):
    c = before(model)
    expected = c(X)
    assert len(made(c, bounds_as_numbers)) == 1
    assert text in graph_text(c.graph).splitlines()
    assert "self.low" not in graph_text(c.graph) and "self.high" not in graph_text(c.graph)
    assert torch.equal(c(X), expected)
    assert made(c, bounds_as_numbers) == []


@pytest.mark.parametrize(
    "model",
    [
        # For each column, of another dtype, none at all; and of what forward computes.
        Bounded([-0.5] * 8, [0.75] * 8),
        Bounded(torch.tensor(-0.5, dtype=torch.float64), None),
        Bounded(math.nan, None),
        Bounded(None, None, lambda x, low, high: x.clamp(max=x.mean())),
        Bounded(None, None, lambda x, low, high: x.clamp(max=0.5)),
    ],
)
def test_what_is_no_number_stays(model):
    assert made(before(model), bounds_as_numbers) == []


class Three(nn.Module):
    """Clamps one value for each of three layers, as Gemma's encoders of images do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 6) for _ in range(3))
        for index, bound in enumerate((0.5, 0.75, 1.0)):
            self.register_buffer(f"bound{index}", torch.tensor(bound))

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.5
        bounds = (self.bound0, self.bound1, self.bound2)
        return sum(layer(torch.clamp(x, -bound, bound)) for layer, bound in zip(self.layers, bounds, strict=True))


def test_clamps_of_one_value_are_exported(tmp_path):
    q = frozen(Three())
    assert torch.equal(convert(q, integers=False)(X), q(X))
    export_onnx(q, X, tmp_path / "three.onnx")
    (found,) = run_onnx(tmp_path / "three.onnx", X).values()
    # Sums of three layers in another order.
    assert relative(found, q(X)) < 1e-6
