"""What is measured of the operands during training."""

import math

import pytest
import torch

import octav_fx
from benchmarks.study import measure, recipes
from benchmarks.study.data import TEST
from benchmarks.study.nets import MobileNet, ResNet, Transformer
from octav_fx.clips import newton
from octav_fx.formats.grid import Grid


@pytest.mark.slow
def test_kinds_of_operands():
    mobile = octav_fx.quantize(MobileNet(10, width=4), torch.randn(2, 1, 16, 16))
    kinds = measure.kinds(mobile)
    assert kinds["blocks.1.expand.0", "weight"] == "1x1"
    assert kinds["blocks.1.depthwise.0", "weight"] == "depthwise"
    assert kinds["blocks.1.depthwise.0", "input"] == "after relu6"
    assert kinds["stem.0", "weight"] == "3x3"
    assert kinds["stem.0", "input"] == "after input"
    resnet = measure.kinds(octav_fx.quantize(ResNet(10, width=4), torch.randn(2, 1, 16, 16)))
    assert resnet["blocks.1.second.0", "input"] == "after relu"
    text = octav_fx.quantize(
        Transformer(256, 16, 1, 2, 8), torch.zeros(2, 8, dtype=torch.long), octav_fx.Config(attention="full")
    )
    kinds = measure.kinds(text)
    assert kinds["blocks.0.down", "input"] == "after gelu"
    assert "after softmax" in kinds.values()
    assert kinds["blocks.0.qkv", "weight"] == "linear"


@pytest.mark.slow
def test_sqnr_is_that_of_the_operand():
    recipe = recipes.RECIPES["digits", "resnet", "small"]
    x = recipe.data(0, TEST).batch(0)[0]
    q = octav_fx.quantize(recipe.net(), x)
    (row,) = [r for r in measure.operands(q, x) if (r["node"], r["operand"]) == ("blocks.0.first.0", "weight")]
    weight = q.get_parameter("blocks.0.first.0.weight").detach()
    clip = octav_fx.optimal_clip(weight, 4, dim=0)
    noise = octav_fx.fake_quantize(weight, clip, 4, dim=0) - weight
    assert row["sqnr"] == pytest.approx(10 * math.log10(weight.square().sum() / noise.square().sum()), abs=1e-3)


@pytest.mark.parametrize(("bits", "least", "most"), [(4, 4, 8), (8, 8, 13)])
def test_newton_steps(bits, least, most):
    grid = Grid(bits, True)
    x = torch.randn(1, 100_000, generator=torch.Generator().manual_seed(0))
    cold = measure.newton_steps(x, torch.zeros(1), grid, newton.octav_step)
    assert least <= cold <= most
    exact = newton.octav(x, torch.zeros(1), grid)
    # One step shows that nothing moves any more; from 5 % off, a few.
    assert measure.newton_steps(x, exact, grid, newton.octav_step) == 1
    assert 2 <= measure.newton_steps(x, 0.95 * exact, grid, newton.octav_step) <= 4
    # A hint beyond every value begins anew.
    assert measure.newton_steps(x, 100 * exact, grid, newton.octav_step) >= least


def test_rows_of_nothing_and_of_one_value_settle():
    rows = torch.zeros(2, 9)
    rows[1, 4] = 3
    assert measure.newton_steps(rows, torch.zeros(2), Grid(4, True), newton.octav_step) <= 2
