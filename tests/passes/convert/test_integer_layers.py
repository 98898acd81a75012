"""integer_layers: convolutions and linear layers on codes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from octav_fx import Config, calibrate, freeze, quantize
from octav_fx.deploy.convert import rewritten
from octav_fx.ir.printer import graph_text
from octav_fx.ops import onednn
from octav_fx.passes import CONVERT, integer_layers
from tests.support.deployable import frozen
from tests.support.graphs import model, parameter
from tests.support.passes import declined, made

# Products and sums on codes are exact, those of levels are rounded: a few units in the last place of the largest.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def on_levels(float_module: nn.Module, x: torch.Tensor):
    return rewritten(frozen(float_module, x), CONVERT)


def test_layers_multiply_codes():
    x = torch.randn(2, 4, 6, 6)
    c = on_levels(nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1, groups=2), nn.Flatten(), nn.Linear(54, 2, bias=False)), x)
    expected = c(x)
    assert [edit.node for edit in made(c, integer_layers)] == ["0", "2"]
    assert (
        graph_text(c.graph)
        == """\
quantizers_0_input_scale = self.quantizers.0_input.scale
integer_codes = integer_codes(input_1, quantizers_0_input_scale, 4, True)
quantizers_0_bias_codes = self.quantizers.0_bias.codes
quantizers_0_weight_codes = self.quantizers.0_weight.codes
quantizers_0_weight_scale = self.quantizers.0_weight.scale
integer_conv = integer_conv(integer_codes, quantizers_0_input_scale, 4, True, quantizers_0_weight_codes, \
quantizers_0_weight_scale, (6, 2, 3, 3), quantizers_0_bias_codes, [2, 2], [1, 1], [1, 1], 2, fraction=4)
_1 = self.1(integer_conv)
quantizers_2_input_scale = self.quantizers.2_input.scale
integer_codes_1 = integer_codes(_1, quantizers_2_input_scale, 4, True)
quantizers_2_bias_codes = self.quantizers.2_bias.codes
quantizers_2_weight_codes = self.quantizers.2_weight.codes
quantizers_2_weight_scale = self.quantizers.2_weight.scale
integer_linear = integer_linear(integer_codes_1, quantizers_2_input_scale, 4, True, quantizers_2_weight_codes, \
quantizers_2_weight_scale, (2, 54), quantizers_2_bias_codes, fraction=4)
return integer_linear"""
    )
    torch.testing.assert_close(c(x), expected, **CLOSE)
    assert made(c, integer_layers) == []


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_every_rank(rank):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    x = torch.randn(2, 4, *[7] * rank)
    c = on_levels(nn.Sequential(conv(4, 8, 3, padding=1, dilation=2), conv(8, 8, 3, groups=8), conv(8, 3, 1)), x)
    expected = c(x)
    assert len(made(c, integer_layers)) == 3
    torch.testing.assert_close(c(x), expected, **CLOSE)


def test_one_quantizer_of_two_layers_makes_one_tensor_of_codes():
    x = torch.randn(3, 5)
    c = on_levels(model(lambda self, x: self.a(x) + self.b(x), a=nn.Linear(5, 4), b=nn.Linear(5, 4)), x)
    assert len(made(c, integer_layers)) == 2
    assert graph_text(c.graph).count(" = integer_codes(") == 1


def test_a_shared_weight():
    x = torch.randn(2, 5)
    c = on_levels(model(lambda self, x: self.a(self.a(x)), a=nn.Linear(5, 5)), x)
    expected = c(x)
    assert len(made(c, integer_layers)) == 2
    torch.testing.assert_close(c(x), expected, **CLOSE)


@pytest.mark.parametrize(
    ("forward", "x", "reason"),
    [
        (
            lambda s, x: F.conv2d(x, s.w[..., :2, :2], None, 1, "same"),
            (1, 3, 5, 5),
            "padding 'same', more at one end than at the other",
        ),
        (lambda s, x: F.conv2d(x, s.w, None, 1, s.w.shape[-1] - 1), (1, 3, 5, 5), "a padding that the graph computes"),
        (
            lambda s, x: F.conv_transpose2d(x, s.t),
            (1, 3, 5, 5),
            "oneDNN has no conv_transpose2d of two quantized operands",
        ),
        (lambda s, x: x.flatten(2) @ x.flatten(2).mT, (1, 3, 5, 5), "oneDNN has no matmul of two quantized operands"),
    ],
)
def test_what_stays_float_has_its_reason(forward, x, reason):
    x = torch.randn(x)
    c = on_levels(model(forward, w=parameter(4, 3, 3, 3), t=parameter(3, 4, 3, 3)), x)
    expected = c(x)
    ((_, _, found),) = declined(c, integer_layers)
    assert found == reason
    assert torch.equal(c(x), expected)


@pytest.mark.parametrize(("padding", "sizes"), [("same", "[2, 1]"), ("valid", "[0, 0]")])
def test_a_padding_by_its_name(padding, sizes):
    x = torch.randn(2, 3, 7, 7)
    c = on_levels(nn.Sequential(nn.Conv2d(3, 4, 3, padding=padding, dilation=(2, 1))), x)
    expected = c(x)
    assert len(made(c, integer_layers)) == 1
    assert f"[1, 1], {sizes}, [2, 1]" in graph_text(c.graph)
    torch.testing.assert_close(c(x), expected, **CLOSE)


@pytest.mark.parametrize(
    ("layer", "x", "reason"),
    [
        # 255 * 7 for each product.
        (nn.Linear(1_300_000, 1), (1, 1_300_000), "sums beyond 32 bits, exact in float64"),
        (nn.Conv2d(3, 4, 1, padding=1), (1, 3, 5, 5), "filters that fit into the padding, exact in float64"),
    ],
)
def test_what_no_kernel_adds_up_has_its_reason(layer, x, reason):
    x = torch.rand(x)
    nn.init.constant_(layer.weight, 0.5)
    q = quantize(nn.Sequential(nn.ReLU(), layer).eval(), x, Config(4, 8, edge_bits=None))
    c = rewritten(freeze(calibrate(q, [x])), CONVERT)
    expected = c(x)
    ((_, _, found),) = declined(c, integer_layers)
    assert found == reason
    assert "integer_" in graph_text(c.graph)
    torch.testing.assert_close(c(x), expected, **CLOSE)


def test_a_float_operand_stays_float():
    x = torch.randn(2, 5)
    q = quantize(nn.Sequential(nn.Linear(5, 4)), x, Config(overrides={"0": None}))
    c = rewritten(freeze(calibrate(q, [x])), CONVERT)
    assert declined(c, integer_layers) == [("0", None, "an operand is float")]


def test_half_precision_stays():
    x = torch.randn(2, 5, dtype=torch.bfloat16)
    c = on_levels(nn.Sequential(nn.Linear(5, 4)).to(torch.bfloat16), x)
    assert declined(c, integer_layers) == [("0", None, "computes in torch.bfloat16")]


def test_widths_that_saturate_stay_float(monkeypatch):
    monkeypatch.setattr(onednn, "largest_product", lambda: 16383)
    x = torch.randn(20, 5)
    net = nn.Sequential(nn.Linear(5, 40), nn.ReLU(), nn.Linear(40, 5)).eval()
    c = rewritten(freeze(calibrate(quantize(net, x), [x])), CONVERT)
    # The last layer has 8 bits.
    reason = "8-bit codes times 128 saturate in 16 bits on this CPU, which has no VNNI"
    assert declined(c, integer_layers) == [("2", None, reason)]
    assert graph_text(c.graph).count("integer_linear(") == 1
