"""round_biases: biases in fractions of what a sum of codes counts, and channels that count nothing."""

import copy
import math

import pytest
import torch
from torch import nn

from octav_fx import Config, calibrate, freeze, quantize
from octav_fx.deploy.convert import rewritten
from octav_fx.ir.printer import graph_text
from octav_fx.nn import IntegerBias
from octav_fx.passes import CONVERT, round_biases
from tests.support.deployable import frozen, trained
from tests.support.graphs import model
from tests.support.passes import declined, made

BEFORE = CONVERT[: CONVERT.index(round_biases)]


def test_a_layer_with_and_one_without_bias():
    x = torch.randn(2, 3, 6, 6)
    layers = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(80, 4))
    c = rewritten(frozen(layers, x), BEFORE)
    before = copy.deepcopy(c)
    assert [edit.node for edit in made(c, round_biases)] == ["quantizers.0_bias", "quantizers.3_bias"]
    assert (
        graph_text(c.graph)
        == """\
quantizers_0_input = self.quantizers.0_input(input_1)
quantizers_0_weight = self.quantizers.0_weight()
quantizers_0_bias = self.quantizers.0_bias()
_0 = conv2d(quantizers_0_input, quantizers_0_weight, quantizers_0_bias, (1, 1), (0, 0), (1, 1), 1)
_2 = self.2(_0)
quantizers_3_input = self.quantizers.3_input(_2)
quantizers_3_weight = self.quantizers.3_weight()
quantizers_3_bias = self.quantizers.3_bias()
_3 = linear(quantizers_3_input, quantizers_3_weight, quantizers_3_bias)
return _3"""
    )
    assert not c.get_submodule("quantizers.0_bias").codes.any()
    bias = c.get_submodule("quantizers.3_bias")
    scale = c.get_submodule("quantizers.3_input").scale * c.get_submodule("quantizers.3_weight").scale
    assert torch.equal(bias.step, scale)
    unit = scale / 2**bias.fraction
    assert ((bias() - layers[3].bias).abs() <= 0.5001 * unit).all()
    # Half a unit of the bias, and float32's rounding of sums below 10.
    assert ((c(x) - before(x)).abs() <= 0.5001 * unit + 80 * 10 * 2**-24).all()
    assert made(c, round_biases) == []


@pytest.mark.parametrize(
    ("bits", "fraction"),
    # 2 * 255 * 128 is above 2**15 as it is; 2 * 15 * 8 * 2**4 fills the byte of a weight; 2 * 255 * 8 * 2**3 < 2**15.
    [((8, 8), 0), ((4, 4), 4), ((4, 8), 3), ((2, 2), 6), ((8, 4), 0), ((6, 4), 2)],
)
def test_the_fraction_leaves_two_products_in_16_bits(bits, fraction):
    x = torch.randn(64, 8)
    q = quantize(nn.Sequential(nn.Linear(8, 4)).eval(), x, Config(*bits, edge_bits=None))
    c = rewritten(freeze(calibrate(q, [x])), CONVERT)
    assert c.get_submodule("quantizers.0_bias").fraction == fraction
    weight, activation = bits
    assert weight + fraction <= 8
    assert 2 * (2**activation - 1) * 2 ** (weight - 1 + fraction) < 2**15 or fraction == 0


@pytest.mark.parametrize("factor", [0.0, 1e-30, -1e-12, 1e-7])
def test_a_channel_that_counts_nothing_beside_its_bias(factor):
    x = torch.randn(2, 3, 6, 6)
    norm = trained(nn.BatchNorm2d(5))
    with torch.no_grad():
        norm.weight[2], norm.bias[2], norm.weight[3], norm.bias[3] = factor, 3.0, factor, 0.0
    norm.running_mean[3] = 0
    layers = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), norm)
    c = rewritten(frozen(layers, x), BEFORE)
    before = copy.deepcopy(c)
    made(c, round_biases)
    bias = c.get_submodule("quantizers.0_bias")
    assert bias.codes.abs().max() <= 2**30
    assert (c.get_submodule("quantizers.0_weight").scale != 0).all()
    # A bias of 30 bits, beside products that are rounded to as little.
    torch.testing.assert_close(c(x)[:, 2:4], before(x)[:, 2:4], rtol=1e-6, atol=1e-6)


def test_what_stays():
    def forward(self, x, y):
        z = self.shared(x) + self.shared(y)
        return torch.nn.functional.conv2d(z, self.conv.weight, z.mean((0, 2, 3))), self.up(x)

    parts = {"shared": nn.Conv2d(3, 3, 1), "conv": nn.Conv2d(3, 3, 1, bias=False), "up": nn.ConvTranspose2d(3, 3, 2)}
    x, y = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    q = quantize(model(forward, **parts).eval(), (x, y), Config(edge_bits=None))
    c = rewritten(freeze(calibrate(q, [(x, y)])), BEFORE)
    assert [reason for _, _, reason in declined(c, round_biases)] == [
        *["not in integers: its weight has other readers"] * 2,
        "not in integers: its bias is computed from data",
    ]
    assert not [part for part in c.modules() if isinstance(part, IntegerBias)]


def test_an_input_that_is_always_zero():
    x = torch.zeros(2, 8)
    c = rewritten(frozen(nn.Sequential(nn.Linear(8, 4)), x), BEFORE)
    assert declined(c, round_biases) == [("0", None, "not in integers: its input is zero whatever the data is")]
    assert math.isfinite(float(c(x).sum()))
