"""fold_affine: a batch norm in the scale and bias of the convolution before it."""

import torch
from torch import nn

from octav_fx import convert
from octav_fx.ir.printer import graph_text
from octav_fx.passes import fold_affine
from tests.support.deployable import frozen, trained
from tests.support.graphs import model
from tests.support.passes import made


def on_levels(float_module: nn.Module, x: torch.Tensor):
    return convert(frozen(float_module, x), integers=False)


def test_the_factor_goes_into_the_scale_and_the_offset_into_the_bias():
    x = torch.randn(2, 3, 6, 6)
    c = on_levels(nn.Sequential(nn.Conv2d(3, 5, 3), trained(nn.BatchNorm2d(5)), nn.ReLU()), x)
    expected, codes = c(x), c.get_submodule("quantizers.0_weight").codes.clone()
    assert [edit.node for edit in made(c, fold_affine)] == ["1"]
    assert (
        graph_text(c.graph)
        == """\
quantizers_0_input = self.quantizers.0_input(input_1)
quantizers_0_weight = self.quantizers.0_weight()
folded__1_bias = self.folded._1.bias
_0 = conv2d(quantizers_0_input, quantizers_0_weight, folded__1_bias, (1, 1), (0, 0), (1, 1), 1)
_2 = self.2(_0)
return _2"""
    )
    stored = c.get_submodule("quantizers.0_weight")
    assert torch.equal(stored.codes, codes)
    # Factors of both signs, one of them zero.
    assert (stored.scale < 0).any()
    assert stored.scale[1] == 0
    # Sums of 27 products, each rounded once more.
    torch.testing.assert_close(c(x), expected, rtol=1e-5, atol=1e-5)
    assert sorted(c.state_dict()) == [
        *("folded._1.bias", "quantizers.0_input.scale", "quantizers.0_weight.codes", "quantizers.0_weight.scale")
    ]
    assert made(c, fold_affine) == []


def test_other_readers_keep_it():
    x = torch.randn(2, 3, 6, 6)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y), y

    c = on_levels(model(forward, conv=nn.Conv2d(3, 5, 3), norm=trained(nn.BatchNorm2d(5).eval())), x)
    assert made(c, fold_affine) == []


def test_a_weight_that_two_layers_share_keeps_its_scale():
    x = torch.randn(2, 3, 6, 6)

    def forward(self, x):
        return self.norm(self.conv(x)) + self.conv(2 * x)

    c = on_levels(model(forward, conv=nn.Conv2d(3, 5, 3), norm=trained(nn.BatchNorm2d(5).eval())), x)
    assert made(c, fold_affine) == []
