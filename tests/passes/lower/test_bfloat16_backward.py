"""bfloat16_backward: products in backward of bfloat16 gradients and codes, within the rounding of gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from octav_fx.ir.printer import graph_text
from octav_fx.passes import (
    LOWER,
    bfloat16_backward,
    filters_channels_last,
    levels_as_read,
    lower_passes,
    save_codes,
    split_quantizers,
)
from tests.support.joint import joint, kept, leaf, lower, quantized, weight

HALF = torch.bfloat16
# A gradient is rounded before the product, and the product after it, each by 2**-8 of it at most; steps, quotients and
# sums are rounded in float32, which the last term is ample for.
ROUNDING = 2 * 2**-8 + 2**-16


def linear(x: Tensor, w: Tensor, h: Tensor, hint: Tensor) -> tuple[Tensor]:
    return (F.linear(quantized(x.sin(), h), weight(w, hint)),)


def ready(function: Any, *inputs: Tensor) -> fx.GraphModule:
    gm = joint(function, *inputs)
    lower(gm, split_quantizers, save_codes, levels_as_read, filters_channels_last)
    return gm


def test_golden() -> None:
    gm = ready(linear, leaf(5, 3), leaf(4, 3), torch.ones(()), torch.ones(4))
    edits = lower(gm, bfloat16_backward)
    assert [(edit.verb, edit.detail) for edit in edits] == [
        ("backward in bfloat16", "dequantize_default"),
        ("backward in bfloat16", "fake_quantize_default_1"),
    ]
    assert graph_text(gm.graph) == (
        "sin = sin.default(primals_1)\n"
        "optimal_clip_default = optimal_clip.default(sin, primals_3, 'int4/tensor', 'octav')\n"
        "quantize_default = quantize.default(sin, optimal_clip_default, 'int4/tensor', None)\n"
        "dequantize_default = dequantize.default(quantize_default, optimal_clip_default, 'int4/tensor', "
        "torch.float32)\n"
        "optimal_clip_default_1 = optimal_clip.default(primals_2, primals_4, 'int4/channel.0', 'octav')\n"
        "fake_quantize_default_1 = fake_quantize.default(primals_2, optimal_clip_default_1, "
        "'int4/channel.0', 'mad', None)\n"
        "permute = permute.default(fake_quantize_default_1, [1, 0])\n"
        "mm = mm.default(dequantize_default, permute)\n"
        "permute_1 = permute.default(tangents_1, [1, 0])\n"
        "convert_element_type_default = convert_element_type.default(permute_1, torch.bfloat16)\n"
        "full_default = full.default([], 8.0, dtype=torch.float32)\n"
        "dequantize_default_1 = dequantize.default(quantize_default, full_default, 'int4/tensor', torch.bfloat16)\n"
        "mm_default = mm.default(convert_element_type_default, dequantize_default_1)\n"
        "convert_element_type_default_1 = convert_element_type.default(mm_default, torch.float32)\n"
        "div_tensor = div.Tensor(optimal_clip_default, 8.0)\n"
        "mul_tensor = mul.Tensor(convert_element_type_default_1, div_tensor)\n"
        "permute_2 = permute.default(mul_tensor, [1, 0])\n"
        "permute_3 = permute.default(permute, [1, 0])\n"
        "div_tensor_1 = div.Tensor(optimal_clip_default_1, 8.0)\n"
        "view_default = view.default(div_tensor_1, [1, -1])\n"
        "mul_tensor_1 = mul.Tensor(tangents_1, view_default)\n"
        "convert_element_type_default_2 = convert_element_type.default(mul_tensor_1, torch.bfloat16)\n"
        "div_tensor_2 = div.Tensor(optimal_clip_default_1, 8.0)\n"
        "view_default_1 = view.default(div_tensor_2, [-1, 1])\n"
        "gt_scalar = gt.Scalar(view_default_1, 0)\n"
        "where_scalar_other = where.ScalarOther(gt_scalar, view_default_1, 1.0)\n"
        "div_tensor_3 = div.Tensor(permute_3, where_scalar_other)\n"
        "convert_element_type_default_3 = convert_element_type.default(div_tensor_3, torch.bfloat16)\n"
        "mm_default_1 = mm.default(convert_element_type_default_2, convert_element_type_default_3)\n"
        "convert_element_type_default_4 = convert_element_type.default(mm_default_1, torch.float32)\n"
        "permute_4 = permute.default(permute_2, [1, 0])\n"
        "fake_quantize_backward = fake_quantize_backward.default(permute_4, primals_2, "
        "optimal_clip_default_1, 'int4/channel.0', 'mad')\n"
        "fake_quantize_backward_1 = fake_quantize_backward.default(convert_element_type_default_4, sin, "
        "optimal_clip_default, 'int4/tensor', 'pwl')\n"
        "cos = cos.default(primals_1)\n"
        "mul = mul.Tensor(fake_quantize_backward_1, cos)\n"
        "return [mm, mul, fake_quantize_backward, None, None]"
    )
    assert lower(gm, bfloat16_backward) == []


def convolution(**geometry: Any) -> Any:
    def forward(x: Tensor, w: Tensor, h: Tensor, hint: Tensor) -> tuple[Tensor]:
        return (F.conv2d(quantized(x.sin(), h), weight(w, hint), **geometry),)

    return forward


def tangent(gm: fx.GraphModule) -> Tensor:
    (found,) = (node for node in gm.graph.find_nodes(op="placeholder") if "tangents" in str(node.target))
    return torch.randn(found.meta["val"].shape)


def test_numbers_of_a_linear_layer() -> None:
    inputs = leaf(64, 48), leaf(32, 48), torch.ones(()), torch.ones(32)
    gm = ready(linear, *inputs)
    g = tangent(gm)
    before = gm(*inputs, g)
    assert len(lower(gm, bfloat16_backward)) == 2
    after = gm(*inputs, g)
    assert torch.equal(after[0], before[0])
    x, w = inputs[0].sin(), inputs[1]
    # What quantizers let through of a gradient is at most all of it, and so is the derivative of sin.
    _within(after[1], before[1], g.abs() @ _largest(w, 1))
    _within(after[2], before[2], g.abs().T @ _largest(x, None))


@pytest.mark.parametrize("geometry", [{"padding": 1}, {"stride": 2}, {"groups": 8, "stride": 2, "padding": 1}])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_numbers_of_a_convolution(geometry: dict[str, Any], layout: torch.memory_format) -> None:
    x = torch.randn(2, 8, 9, 7).to(memory_format=layout).requires_grad_()
    inputs = x, leaf(16, 8 // geometry.get("groups", 1), 3, 3), torch.ones(()), torch.ones(16)
    gm = ready(convolution(**geometry), *inputs)
    g = tangent(gm)
    before = gm(*inputs, g)
    assert len(lower(gm, bfloat16_backward)) == 1
    after = gm(*inputs, g)
    assert torch.equal(after[0], before[0])
    w, window = inputs[1], {"stride": 1, "padding": 0, "groups": 1, **geometry}
    _within(after[1], before[1], conv2d_input(x.shape, _largest(w, 1), g.abs(), **window))
    _within(after[2], before[2], conv2d_weight(_largest(x.sin(), None), w.shape, g.abs(), **window))


def _largest(x: Tensor, first: int | None) -> Tensor:
    """A bound of the magnitude of levels: half a step, an eighth of a clip that is no larger than the largest value."""
    largest = x.detach().abs().amax() if first is None else x.detach().abs().flatten(first).amax(1)
    return x.detach().abs() + (largest if first is None else largest.view(-1, *[1] * (x.dim() - 1))) / 16


def _within(found: Tensor, expected: Tensor, magnitudes: Tensor) -> None:
    assert found.dtype is torch.float32
    error = (found - expected).abs()
    assert error.max() > 0
    assert (error <= ROUNDING * magnitudes).all()


def test_a_channel_of_zeros_has_no_gradient_from_it() -> None:
    inputs = (
        leaf(6, 3),
        torch.cat([torch.zeros(1, 3), torch.randn(3, 3)]).requires_grad_(),
        torch.ones(()),
        torch.ones(4),
    )
    gm = ready(linear, *inputs)
    lower(gm, bfloat16_backward)
    _, dx, dw, *_ = gm(*inputs, tangent(gm))
    assert dx.isfinite().all()
    assert dw.isfinite().all()


def test_a_nan_is_one_in_the_gradient_of_what_multiplied_it() -> None:
    inputs = leaf(6, 3), leaf(4, 3), torch.ones(()), torch.ones(4)
    gm = ready(linear, *inputs)
    lower(gm, bfloat16_backward)
    with torch.no_grad():
        inputs[0][2, 1] = torch.nan
    _, _, dw, *_ = gm(*inputs, tangent(gm))
    assert dw[:, 1].isnan().all()
    assert dw[:, 0].isfinite().all()


def test_nothing_more_is_kept_for_backward() -> None:
    inputs = leaf(64, 48), leaf(32, 48), torch.ones(()), torch.ones(32)
    gm = ready(linear, *inputs)
    before = kept(gm)
    gm = ready(linear, *inputs)
    lower(gm, bfloat16_backward)
    assert kept(gm) == before


def test_grids_that_bfloat16_does_not_hold_and_other_factors_stay() -> None:
    def wide(x: Tensor, w: Tensor, h: Tensor) -> tuple[Tensor]:
        return (F.linear(quantized(x.sin(), h, 10), w.sin()),)

    assert lower(ready(wide, leaf(5, 3), leaf(4, 3), torch.ones(())), bfloat16_backward) == []


def test_forward_and_half_precision_stay() -> None:
    def inference(x: Tensor, w: Tensor, h: Tensor, hint: Tensor) -> tuple[Tensor]:
        with torch.no_grad():
            return (linear(x, w, h, hint)[0],)

    arguments = torch.randn(5, 3), torch.randn(4, 3), torch.ones(()), torch.ones(4)
    gm = joint(inference, *arguments, trace_joint=False)
    lower(gm, split_quantizers, save_codes, levels_as_read)
    assert lower(gm, bfloat16_backward) == []


def test_the_option_asks_for_it() -> None:
    assert bfloat16_backward in LOWER
    assert bfloat16_backward not in lower_passes()
    assert bfloat16_backward in lower_passes(backward="bfloat16")
