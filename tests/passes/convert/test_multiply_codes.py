"""multiply_codes: what a layer computes of codes, against whole numbers and single roundings in NumPy."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from octav_fx import Config, calibrate, freeze, quantize
from octav_fx.deploy.convert import rewritten
from octav_fx.ir.printer import graph_text
from octav_fx.passes import CONVERT, multiply_codes
from tests.support.deployable import trained
from tests.support.graphs import model
from tests.support.passes import made


def graphs(float_module: nn.Module, x: Tensor, *bits: int) -> tuple[nn.Module, nn.Module]:
    """On levels, as files are written, and on codes."""
    q = quantize(float_module.eval(), x, Config(*bits, edge_bits=None, residual_bits=8))
    c = rewritten(freeze(calibrate(q, [x])), CONVERT)
    before = copy.deepcopy(c)
    made(c, multiply_codes)
    return before, c


def f32(x: Tensor | np.ndarray) -> np.ndarray:
    return np.asarray(x, dtype=np.float32)


def quantized(x: Tensor, quantizer: nn.Module) -> np.ndarray:
    low, high = quantizer.range
    return np.clip(np.rint(f32(x) / f32(quantizer.scale)), low, high).astype(np.int64)


def test_the_graph():
    x = torch.randn(2, 3, 8, 8)
    _, c = graphs(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)), x, 4, 4)
    assert (
        graph_text(c.graph)
        == """\
quantizers_0_input = self.quantizers.0_input(input_1)
quantizers_0_weight = self.quantizers.0_weight()
quantizers_0_input_scale = self.quantizers.0_input.scale
codes_of = codes_of(quantizers_0_input, quantizers_0_input_scale, torch.float32)
_0 = conv2d(codes_of, quantizers_0_weight, None, (1, 1), (0, 0), (1, 1), 1)
quantizers_0_bias_1 = self.quantizers.0_bias(_0)
_2 = self.2(quantizers_0_bias_1)
quantizers_3_input = self.quantizers.3_input(_2)
quantizers_3_weight = self.quantizers.3_weight()
quantizers_3_input_scale = self.quantizers.3_input.scale
codes_of_1 = codes_of(quantizers_3_input, quantizers_3_input_scale, torch.float32)
_3 = linear(codes_of_1, quantizers_3_weight, None)
quantizers_3_bias_1 = self.quantizers.3_bias(_3)
return quantizers_3_bias_1"""
    )
    assert made(c, multiply_codes) == []


@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (4, 4), (3, 5), (2, 2)])
@pytest.mark.parametrize("width", [8, 600])
def test_two_linear_layers(bits, width):
    x = torch.randn(16, width)
    before, c = graphs(nn.Sequential(nn.Linear(width, 24), nn.ReLU(), nn.Linear(24, 5)), x, *bits)
    first, second = (before.get_submodule(f"quantizers.{i}_input") for i in (0, 2))
    codes = quantized(x, first)
    for i, source in ((0, first), (2, second)):
        weight, bias = (before.get_submodule(f"quantizers.{i}_{kind}") for kind in ("weight", "bias"))
        step = f32(source.scale) * f32(weight.scale)
        assert np.array_equal(step, f32(bias.step))
        products = codes @ weight.integers().numpy().astype(np.int64).T
        whole = products * 2**bias.fraction + bias.codes.numpy().astype(np.int64)
        sums = f32(whole) / f32(2**bias.fraction)
        if i == 0:
            low, high = second.range
            # The relu is where the codes begin.
            codes = np.clip(np.rint(sums * (step / f32(second.scale))), max(low, 0), high).astype(np.int64)
    assert np.array_equal(f32(c(x)), sums * step)
    # Rounded once instead of three times: what the graph on levels computes, but for ties.
    torch.testing.assert_close(c(x), before(x), rtol=0.1, atol=0.1 * float(before(x).abs().max()))


def test_sums_that_float32_does_not_hold_are_taken_in_float64():
    x = torch.rand(4, 4096) + 1
    layer = nn.Linear(4096, 3)
    with torch.no_grad():
        layer.weight.fill_(0.5)
    _, wide = graphs(nn.Sequential(layer), x, 8, 8)
    _, narrow = graphs(nn.Sequential(nn.Linear(4096, 3)), x, 4, 4)
    assert wide.get_submodule("quantizers.0_weight").codes_as is torch.float64
    assert narrow.get_submodule("quantizers.0_weight").codes_as is torch.float32
    assert wide(x).dtype is torch.float32


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_of_any_rank_padded_strided_grouped(dims):
    conv, norm = (
        (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1],
        (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1],
    )
    x = torch.randn(2, 4, *[7] * dims)
    layers = nn.Sequential(conv(4, 6, 3, 2, 1, groups=2), trained(norm(6)), nn.ReLU(), conv(6, 4, 3, padding="same"))
    before, c = graphs(layers, x, 8, 8)
    # 54 products and a bias, rounded to float32 each on levels, and a code of 8 bits that moves at a tie.
    assert relative(c(x), before(x)) < 0.01
    # The same calls with codes in float64 are the same bits: every sum is exact.
    exact = copy.deepcopy(c)
    for part in exact.modules():
        if getattr(part, "codes_as", None) is not None:
            part.codes_as = torch.float64
    for node in exact.graph.nodes:
        if getattr(node.target, "__name__", "") == "codes_of":
            node.args = (*node.args[:2], torch.float64)
    exact.recompile()
    assert torch.equal(exact(x), c(x))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


class Joined(nn.Module):
    """Two paths of either sign, joined and pooled."""

    def __init__(self, relu: bool) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Linear(4, 2)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.left(x) + self.right(x).relu()
        return self.head(F.adaptive_avg_pool2d(x.relu() if self.relu else x, 1).flatten(1))


@pytest.mark.parametrize("relu", [True, False])
def test_a_sum_and_a_mean(relu):
    x = torch.randn(2, 3, 6, 6)
    before, c = graphs(Joined(relu), x, 8, 8)
    names = ("add_x", "add_y", "adaptive_avg_pool_x", "head_input")
    left, right, joined, pooled = (before.get_submodule(f"quantizers.{name}") for name in names)
    kept: dict[str, Tensor] = {}
    for name in names:
        c.get_submodule(f"quantizers.{name}").register_forward_hook(lambda m, a, y, name=name: kept.update({name: y}))
    c(x)
    zeros = [128 if q.signed else 0 for q in (left, right, joined)]
    codes = [np.rint(f32(kept[n]) / f32(q.scale)) + z for n, q, z in zip(names, (left, right), zeros, strict=False)]
    r1, r2 = f32(left.scale) / f32(joined.scale), f32(right.scale) / f32(joined.scale)
    constant = f32(zeros[2]) - (r1 * f32(zeros[0]) + r2 * f32(zeros[1]))
    inner = f32(np.float64(r2) * codes[1] + np.float64(constant))
    outer = f32(np.float64(r1) * codes[0] + np.float64(inner))
    expected = np.clip(np.rint(outer) - zeros[2], *joined.range)
    found = np.rint(f32(kept["adaptive_avg_pool_x"]) / f32(joined.scale))
    assert np.array_equal(found, expected)
    multiplier = f32(joined.scale) / (f32(pooled.scale) * f32(36))
    means = np.clip(np.rint(f32(found.sum((2, 3))) * multiplier), *pooled.range)
    assert np.array_equal(np.rint(f32(kept["head_input"]) / f32(pooled.scale)), means)


def test_what_stays_on_levels():
    def forward(self, x):
        y = self.conv(x)
        # Read by more than a quantizer, and a product of two activations.
        return self.last(y) + y.mean(), torch.matmul(x, y)

    x = torch.randn(2, 3, 3, 3)
    before, c = graphs(model(forward, conv=nn.Conv2d(3, 3, 1), last=nn.Conv2d(3, 3, 1)), x, 8, 8)
    assert not c.get_submodule("quantizers.last_input").in_steps
    bias = before.get_submodule("quantizers.conv_bias")
    assert torch.equal(c.get_submodule("quantizers.conv_bias").multiplier, bias.step)
    assert "matmul" in graph_text(c.graph)
    for found, expected in zip(c(x), before(x), strict=True):
        assert relative(found, expected) < 0.02
