"""Formats and granularities through the whole house: quantize, train, compile, freeze, checkpoint, convert."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import octav_fx
from octav_fx import Config, OctavError, quantize
from octav_fx.nn import FakeQuantizer


class Net(nn.Module):
    """A convolution over 8 channels, products of activations, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3, padding=1)
        self.fc, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.stem(x).relu()).flatten(2).transpose(1, 2)
        y = self.fc(x)
        z = F.scaled_dot_product_attention(y, x, x) + (y @ y.transpose(1, 2)).softmax(-1) @ x
        return self.head(z.mean(1))


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 6, 6)


SMALL = {"weight_granularity": "group-8", "activation_granularity": "group-8"}
CONFIGS = {
    "groups": Config(**SMALL),
    "groups, max": Config(**SMALL, clip="max"),
    "groups, grid": Config(**SMALL, clip="octav-grid"),
    "tokens": Config(weight_granularity="group-4", activation_granularity="token", activation_bits=8),
    "mx": dataclasses.replace(Config.preset("mxfp4"), **SMALL),
    "nv": dataclasses.replace(Config.preset("nvfp4"), **SMALL),
    "ternary": Config(weight_format="ternary", activation_bits=8),
    "float8": Config(weight_format="e4m3", activation_format="e5m2", weight_granularity="tensor"),
    "levels of each tensor": Config(
        weight_format="kmeans", weight_granularity="tensor", activation_format="kmeans", activation_bits=3
    ),
    "straight": Config(**SMALL, weight_gradient="ste", activation_gradient="ste"),
    "narrow": Config.preset("tensorrt"),
    "weights only": Config(activation_bits=None, weight_granularity="group-8", scale_format="float16"),
    "activations only": Config(weight_bits=None, activation_granularity="token"),
}
# What attention sums over is the sequence: 16 positions in groups of 8.
each_config = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@each_config
def test_trains_with_the_keys_of_the_float_model_and_restarts(net: Net, name: str) -> None:
    q, x = quantize(net, images(), CONFIGS[name]), images()
    assert sorted(q.state_dict()) == sorted(net.state_dict())
    # Another batch size has other rows, and as many clips.
    y = q(images(5))
    assert y.shape == (5, 4)
    y = q(x)
    y.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in q.parameters())
    again = quantize(Net(), images(), CONFIGS[name])
    again.load_state_dict(q.state_dict())
    # A clip is a fixed point to float32's rounding, or the same search: no code differs here.
    torch.testing.assert_close(again(x), y, rtol=1e-4, atol=1e-5)
    assert octav_fx.coverage(q).total_macs > 0
    assert octav_fx.table(q)


@each_config
def test_frozen_and_converted_it_computes_the_same(name: str) -> None:
    # Of seed 0 a mean lies within 1e-5, which rounding moves it by, of the middle between two codes of the head.
    torch.manual_seed(1)
    net, x = Net(), images()
    q = quantize(net, x, CONFIGS[name])
    octav_fx.calibrate(q, [x])
    octav_fx.freeze(q)
    q.eval()
    expected = q(x)
    restored = quantize(Net(), x, CONFIGS[name]).eval()
    restored.load_state_dict(q.state_dict())
    assert torch.equal(restored(x), expected)
    converted = octav_fx.convert(q)
    # Codes are the same; sums of products are rounded in another order, some hundred products of magnitude one.
    torch.testing.assert_close(converted(x), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.compile
@pytest.mark.parametrize("name", ["groups", "tokens"])
def test_compiled_is_eager(net: Net, name: str) -> None:
    x = images()
    eager, compiled = (quantize(net, x, CONFIGS[name]) for _ in range(2))
    run = torch.compile(compiled, backend="octav", fullgraph=True)
    y, z = eager(x), run(x)
    # A product rounded another way moves a code that lies at a tie.
    torch.testing.assert_close(z, y, rtol=1e-2, atol=1e-2)
    y.square().sum().backward()
    z.square().sum().backward()
    # A gradient is a sum over all of y, in which such a code is a step of one summand.
    for one, two in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, rtol=5e-2, atol=5e-2)


def test_a_step_learned_for_each_group(net: Net) -> None:
    x = images()
    q = quantize(net, x, Config(clip="lsq", weight_granularity="group-8"))
    q(x).square().sum().backward()
    learned = q.quantizers.conv_weight.learned
    assert learned.shape == (16, 1, 3, 3)
    assert learned.grad.abs().sum() > 0


def test_rows_of_data_have_no_state_and_weights_have_a_clip_for_each_group(net: Net) -> None:
    q = quantize(net, images(), CONFIGS["groups"])
    for name, quantizer in q.quantizers.named_children():
        assert isinstance(quantizer, FakeQuantizer)
        if quantizer.by_row:
            assert (quantizer.hint.shape, quantizer.mean) == ((), None), name
    assert q.quantizers.fc_weight.hint.shape == (16, 2)
    assert q.quantizers.conv_weight.hint.shape == (16, 1, 3, 3)
    rows = {(row.node, row.operand): row for row in octav_fx.rows(q)}
    values = next(row for row in rows.values() if row.operand == "value")
    assert rows["conv", "weight"].granularity == "group-8 1"
    assert rows["conv", "weight"].bits_per_element == 4 + 32 / 8
    # Of values the sequence, which the product with them sums over.
    assert values.granularity == "group-8 1"


class Applied(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.function(x, y)


@pytest.mark.parametrize("equation", ["bqd,bkd->bqk", "bqd,bde->bqe", "...qd,...kd->...qk"])
@pytest.mark.parametrize("shared", ["group-8", "token"])
def test_an_einsum_has_the_rows_of_the_matmul_that_it_is(equation: str, shared: str) -> None:
    x, y = torch.randn(2, 16, 16), torch.randn(2, 16, 16)
    config = Config(activation_granularity=shared)
    one = quantize(Applied(lambda x, y: torch.einsum(equation, x, y)), (x, y), config)
    two = quantize(Applied(torch.matmul if "de" in equation else lambda x, y: x @ y.mT), (x, y), config)
    # The same codes; einsum adds products up by way of bmm, too.
    assert torch.equal(one(x, y), two(x, y))


def test_an_einsum_of_heads_has_groups_along_the_last_axis_that_is_summed_over() -> None:
    weight = nn.Parameter(torch.randn(4, 16, 24))
    x = torch.randn(2, 5, 4, 16)

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bqhd,hdm->bqm", x, self.weight)

    q = quantize(Heads(), x, Config(weight_granularity="group-8", activation_granularity="group-8"))
    found = {name: str(part.spec.granularity) for name, part in q.quantizers.named_children()}
    assert found == {"einsum_operand0": "group-8.3", "einsum_operand1": "group-8.1"}
    with pytest.raises(OctavError, match=r"operand0 .* has no one axis that einsum sums over, which 'group-8' needs"):
        quantize(
            Applied(lambda x, y: torch.einsum("bi,bj->bij", x, y)),
            (torch.randn(2, 8), torch.randn(2, 8)),
            Config(activation_granularity="group-8"),
        )


def test_groups_that_do_not_come_out_even_name_the_node_or_are_left_float(net: Net) -> None:
    config = Config(weight_granularity="group-3")
    with pytest.raises(OctavError, match=r"conv: weight of shape .* 8 elements along axis 1, which groups of 3 do not"):
        quantize(net, images(), config)
    q = quantize(net, images(), dataclasses.replace(config, overrides={"conv": None, "fc": None}))
    assert {node for node, _, _ in octav_fx.coverage(q).skipped} == {"conv", "fc"}


def test_a_batch_that_groups_do_not_divide_is_an_error_not_another_grid(net: Net) -> None:
    q = quantize(net, images(), CONFIGS["groups"])
    with pytest.raises(OctavError, match=r"group-8.* does not divide"):
        q(torch.randn(2, 3, 7, 7))


def test_nothing_and_not_finite() -> None:
    for spec in ("int4/group-8.1", "e2m1/group-8.1/e4m3", "int8/token.1"):
        solve = torch.ops.octav.dynamic_fake_quantize
        y, clip = solve(torch.zeros(2, 16), torch.zeros(()), spec, "octav", "pwl")
        assert not y.any()
        assert not clip.any()
        assert solve(torch.zeros(0, 16), torch.zeros(()), spec, "octav", "pwl")[0].shape == (0, 16)
        x = torch.randn(2, 16)
        x[0, 0], x[1, 1] = torch.nan, torch.inf
        y, clip = solve(x, torch.zeros(()), spec, "octav", "pwl")
        assert clip.isfinite().all()
        assert torch.equal(y.isfinite(), x.isfinite())
