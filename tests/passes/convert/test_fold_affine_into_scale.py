"""fold_affine_into_scale: the factor of a channel in the weight's scale, of its sign."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import octav_fx
from octav_fx import Config, quantize
from octav_fx.deploy.convert import rewritten
from octav_fx.ir.printer import graph_text
from octav_fx.passes import CONVERT, fold_affine_into_scale
from tests.support.deployable import frozen, trained
from tests.support.graphs import model, parameter
from tests.support.passes import declined, made


def converted(float_module: nn.Module, x: torch.Tensor) -> nn.Module:
    return rewritten(frozen(float_module, x), CONVERT[: CONVERT.index(fold_affine_into_scale)])


@pytest.mark.parametrize("bias", [True, False])
def test_factors_of_both_signs(bias):
    x = torch.randn(2, 3, 6, 6)
    c = converted(nn.Sequential(nn.Conv2d(3, 5, 3, bias=bias), trained(nn.BatchNorm2d(5))), x)
    before = copy.deepcopy(c)
    codes = c.get_submodule("quantizers.0_weight").codes.clone()
    assert [edit.node for edit in made(c, fold_affine_into_scale)] == ["1"]
    assert (
        graph_text(c.graph)
        == """\
quantizers_0_input = self.quantizers.0_input(input_1)
quantizers_0_weight = self.quantizers.0_weight()
folded__1_bias = self.folded._1.bias
_0 = conv2d(quantizers_0_input, quantizers_0_weight, folded__1_bias, (1, 1), (0, 0), (1, 1), 1)
return _0"""
    )
    weight, affine = c.get_submodule("quantizers.0_weight"), before.get_submodule("1")
    assert torch.equal(weight.codes, codes)
    assert torch.equal(weight.scale.sign(), affine.factor.sign())
    # 27 products and the folded factor, each rounded to 2**-24 of values below 30.
    torch.testing.assert_close(c(x), before(x), rtol=0, atol=30 * 30 * 2**-24)
    # The factor of channel 1 is zero: nothing but its offset.
    assert torch.equal(c(x)[:, 1], before(x)[:, 1])
    assert made(c, fold_affine_into_scale) == []


def test_a_bias_that_is_trained_leaves_nothing_of_its_gradient():
    x = torch.randn(2, 3, 6, 6)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), trained(nn.BatchNorm2d(5))).eval()
    c = octav_fx.convert(octav_fx.freeze(quantize(model, x, Config(activation_bits=None))))
    assert all(value.is_leaf and not value.requires_grad for value in c.state_dict(keep_vars=True).values())
    assert torch.equal(copy.deepcopy(c)(x), c(x))


def test_one_dimension():
    x = torch.randn(2, 3, 6)
    c = converted(nn.Sequential(nn.Conv1d(3, 5, 3), trained(nn.BatchNorm1d(5))), x)
    before = copy.deepcopy(c)
    assert len(made(c, fold_affine_into_scale)) == 1
    torch.testing.assert_close(c(x), before(x), rtol=0, atol=30 * 30 * 2**-24)


def test_what_stays():
    def forward(self, x):
        y = self.conv(x)
        z = self.shared(x)
        return self.norm1(y) + y + self.norm2(z) + self.norm3(self.shared(x)) + self.norm4(x)

    parts = {f"norm{i}": trained(nn.BatchNorm2d(3)) for i in (1, 2, 3, 4)}
    convs = {"conv": nn.Conv2d(3, 3, 1), "shared": nn.Conv2d(3, 3, 1)}
    c = converted(model(forward, **convs, **parts), torch.randn(2, 3, 4, 4))
    reasons = {node: reason for node, _, reason in declined(c, fold_affine_into_scale)}
    assert reasons.keys() == {"norm1", "norm2", "norm3", "norm4"}
    assert "has other readers" in reasons["norm1"]
    assert "the weight of" in reasons["norm2"]
    assert "the weight of" in reasons["norm3"]
    assert "is not a convolution" in reasons["norm4"]


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: s.norm(F.conv2d(x, s.weight, bias=s.bias, padding=1)),
        lambda s, x: s.norm(F.conv2d(x, s.weight, padding=1, stride=1)),
    ],
    ids=["bias by name", "no bias"],
)
def test_a_functional_convolution(forward):
    parts = {"weight": parameter(5, 3, 3, 3), "bias": parameter(5), "norm": trained(nn.BatchNorm2d(5))}
    x = torch.randn(2, 3, 6, 6)
    c = converted(model(forward, **parts), x)
    before = copy.deepcopy(c)
    assert len(made(c, fold_affine_into_scale)) == 1
    torch.testing.assert_close(c(x), before(x), rtol=0, atol=30 * 30 * 2**-24)
