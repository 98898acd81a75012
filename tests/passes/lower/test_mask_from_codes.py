"""mask_from_codes: what gradients ask about a value they ask its codes, and get the same answers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from octav_fx.ir.printer import graph_text
from octav_fx.passes import mask_from_codes, save_codes, split_quantizers
from tests.support.joint import (
    after_relu,
    codes_of,
    joint,
    kept,
    layer_inputs,
    leaf,
    linear,
    lower,
    quantized,
    results,
    tagged,
    targets,
    unchanged,
    weight,
)

aten, octav = torch.ops.aten, torch.ops.octav
SAVE = (split_quantizers, save_codes)
ALL = (*SAVE, mask_from_codes)


def test_golden() -> None:
    gm = joint(lambda x, w, hint: (F.linear(quantized(x.sin(), hint), w),), leaf(7, 30), leaf(4, 30), torch.ones(()))
    lower(gm, *SAVE)
    assert [(edit.node, edit.verb, edit.detail) for edit in lower(gm, mask_from_codes)] == [
        ("sin", "mask from codes", "1 of the clip, 0 of relu")
    ]
    assert graph_text(gm.graph) == (
        "sin = sin.default(primals_1)\n"
        "optimal_clip_default = optimal_clip.default(sin, primals_3, 'int4/tensor', 'octav')\n"
        "quantize_default = quantize.default(sin, optimal_clip_default, 'int4/tensor', None)\n"
        "dequantize_default = "
        "dequantize.default(quantize_default, optimal_clip_default, 'int4/tensor', torch.float32)\n"
        "permute = permute.default(primals_2, [1, 0])\n"
        "mm = mm.default(dequantize_default, permute)\n"
        "permute_1 = permute.default(tangents_1, [1, 0])\n"
        "mm_1 = mm.default(permute_1, dequantize_default)\n"
        "permute_2 = permute.default(mm_1, [1, 0])\n"
        "permute_3 = permute.default(permute, [1, 0])\n"
        "mm_2 = mm.default(tangents_1, permute_3)\n"
        "permute_4 = permute.default(permute_2, [1, 0])\n"
        "convert_element_type_default = convert_element_type.default(quantize_default, torch.float32)\n"
        # Not from -8 to 7.
        "sub_tensor = sub.Tensor(convert_element_type_default, -0.5)\n"
        "abs_default = abs.default(sub_tensor)\n"
        "gt_scalar = gt.Scalar(abs_default, 7.5)\n"
        "full_default = full.default([], 0.0, dtype=torch.float32, device=device(type='cpu'))\n"
        "where_self = where.self(gt_scalar, full_default, mm_2)\n"
        "cos = cos.default(primals_1)\n"
        "mul = mul.Tensor(where_self, cos)\n"
        "return [mm, mul, permute_4, None]"
    )


def test_golden_relu() -> None:
    inputs = (leaf(7, 30), leaf(4, 30), torch.ones(()))
    gm = joint(lambda x, w, hint: (F.linear(quantized(x.sin().relu(), hint, signed=False), w),), *inputs)
    lower(gm, *SAVE)
    assert [(edit.node, edit.verb, edit.detail) for edit in lower(gm, mask_from_codes)] == [
        ("relu", "mask from codes", "1 of the clip, 1 of relu")
    ]
    assert graph_text(gm.graph) == (
        "sin = sin.default(primals_1)\n"
        "relu = relu.default(sin)\n"
        "alias = alias.default(relu)\n"
        "optimal_clip_default = optimal_clip.default(relu, primals_3, 'uint4/tensor', 'octav')\n"
        "quantize_default = quantize.default(relu, optimal_clip_default, 'uint4/tensor', None)\n"
        "dequantize_default = "
        "dequantize.default(quantize_default, optimal_clip_default, 'uint4/tensor', torch.float32)\n"
        "permute = permute.default(primals_2, [1, 0])\n"
        "mm = mm.default(dequantize_default, permute)\n"
        "permute_1 = permute.default(tangents_1, [1, 0])\n"
        "mm_1 = mm.default(permute_1, dequantize_default)\n"
        "permute_2 = permute.default(mm_1, [1, 0])\n"
        "permute_3 = permute.default(permute, [1, 0])\n"
        "mm_2 = mm.default(tangents_1, permute_3)\n"
        "permute_4 = permute.default(permute_2, [1, 0])\n"
        "convert_element_type_default = convert_element_type.default(quantize_default, torch.float32)\n"
        "sub_tensor = sub.Tensor(convert_element_type_default, 7.0)\n"
        "abs_default = abs.default(sub_tensor)\n"
        "gt_scalar = gt.Scalar(abs_default, 8.0)\n"
        "full_default = full.default([], 0.0, dtype=torch.float32, device=device(type='cpu'))\n"
        "alias_1 = alias.default(alias)\n"
        "convert_element_type_default_1 = convert_element_type.default(quantize_default, torch.float32)\n"
        "lt_scalar = lt.Scalar(convert_element_type_default_1, 0)\n"
        "scalar_tensor = "
        "scalar_tensor.default(0, dtype=torch.float32, layout=torch.strided, device=device(type='cpu'))\n"
        "convert_element_type_default_2 = convert_element_type.default(quantize_default, torch.float32)\n"
        "sub_tensor_1 = sub.Tensor(convert_element_type_default_2, 7.5)\n"
        "abs_default_1 = abs.default(sub_tensor_1)\n"
        # Both masks: not a code from 0 to 15.
        "gt_scalar_1 = gt.Scalar(abs_default_1, 7.5)\n"
        "where = where.self(gt_scalar_1, scalar_tensor, mm_2)\n"
        "cos = cos.default(primals_1)\n"
        "mul = mul.Tensor(where, cos)\n"
        "return [mm, mul, permute_4, None]"
    )


@pytest.mark.parametrize("function", [linear(), linear(gradient="mad"), linear(bits=8), after_relu])
def test_twice_changes_nothing(function: Callable[..., Any]) -> None:
    gm = joint(function, *layer_inputs())
    lower(gm, *ALL)
    text, tags = graph_text(gm.graph), tagged(gm)
    assert lower(gm, *ALL) == []
    assert (graph_text(gm.graph), tagged(gm)) == (text, tags)


def test_straight_through_has_no_mask() -> None:
    gm = joint(linear(gradient="ste"), *layer_inputs())
    unchanged(gm, layer_inputs(), *ALL)
    assert not {aten.where.self, aten.gt.Scalar, torch.ops.octav.fake_quantize_backward.default} & targets(gm)
    assert [user.target for user in codes_of(gm)[0].users] == [torch.ops.octav.dequantize.default]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("gradient", ["ste", "pwl", "mad"])
def test_outputs_and_gradients_stay_what_they_are(gradient: str, bits: int, signed: bool) -> None:
    def function(x: Tensor, u: Tensor, w: Tensor, hint: Tensor, hints: Tensor) -> tuple[Tensor]:
        # As an unsigned grid meets them; and twice, so that gradients add up.
        value = (x @ u) if signed else (x @ u).relu()
        y = quantized(value, hint, bits, signed, gradient)
        return (F.linear(y, weight(w, hints, bits)).sum() + (y * value).sum(),)

    arguments = (*layer_inputs(), torch.ones(4))
    gm = joint(function, *arguments)
    edits = unchanged(gm, arguments, *ALL)
    assert [edit.verb for edit in edits[:2]] == ["split", "split"]


def test_the_mask_of_relu_asks_the_codes() -> None:
    gm = joint(after_relu, *layer_inputs())
    (question,) = gm.graph.find_nodes(op="call_function", target=aten.le.Scalar)
    # Through the aliases that autograd makes of what it saves.
    assert question.args[0].target is aten.alias.default
    unchanged(gm, layer_inputs(), *ALL)
    assert not gm.graph.find_nodes(op="call_function", target=aten.le.Scalar)
    assert kept(gm) == {"quantize_default": torch.int8, "optimal_clip_default": torch.float32}


def test_the_mask_of_relu_asks_the_codes_through_a_clone_too() -> None:
    def function(x: Tensor, u: Tensor, w: Tensor, hint: Tensor) -> tuple[Tensor]:
        return (F.linear(quantized((x @ u).relu().clone(), hint, signed=False), w),)

    gm = joint(function, *layer_inputs())
    unchanged(gm, layer_inputs(), *ALL)
    assert not gm.graph.find_nodes(op="call_function", target=aten.le.Scalar)
    assert list(kept(gm).values()).count(torch.int8) == 1


@pytest.mark.parametrize("function", [F.relu6, lambda x: F.hardtanh(x, 0, 0.7)], ids=["relu6", "hardtanh"])
def test_the_masks_of_bounded_activations_ask_the_codes(function: Callable[[Tensor], Tensor]) -> None:
    def layer(x: Tensor, u: Tensor, w: Tensor, hint: Tensor) -> tuple[Tensor]:
        return (F.linear(quantized(function(4 * (x @ u)), hint, signed=False), w),)

    gm = joint(layer, *layer_inputs())
    unchanged(gm, layer_inputs(), *ALL)
    assert not {aten.le.Scalar, aten.ge.Tensor} & targets(gm)


def test_a_signed_grid_does_not_know_the_mask_of_relu() -> None:
    # Zero and what is rounded to zero have the same code.
    gm = joint(lambda x, u, w, hint: (F.linear(quantized((x @ u).relu(), hint), w),), *layer_inputs())
    unchanged(gm, layer_inputs(), *ALL)
    assert gm.graph.find_nodes(op="call_function", target=aten.le.Scalar)


def test_one_value_on_two_grids() -> None:
    def function(x: Tensor, u: Tensor, w: Tensor, hint: Tensor) -> tuple[Tensor]:
        value = (x @ u).relu()
        return (F.linear(quantized(value, hint, 4, False), w) + F.linear(quantized(value, hint, 8, False), w),)

    gm = joint(function, *layer_inputs())
    edits = unchanged(gm, layer_inputs(), *ALL)
    assert [edit.verb for edit in edits if edit.detail == "8 bits"] == ["split", "save codes"]
    # The first codes have answered what the relu asks.
    assert [edit.detail for edit in edits[-2:]] == ["1 of the clip, 1 of relu", "1 of the clip, 0 of relu"]
    assert {node.meta["val"].dtype for node in codes_of(gm)} == {torch.int8, torch.int16}


def test_a_question_that_the_model_itself_asks_before() -> None:
    def function(x: Tensor, u: Tensor, w: Tensor, hint: Tensor) -> tuple[Tensor]:
        value = (x @ u).relu()
        scale = torch.where(value <= 0, 2.0, 3.0)
        return (F.linear(quantized(value, hint, signed=False), w).sum() + scale.sum(),)

    gm = joint(function, *layer_inputs())
    unchanged(gm, layer_inputs(), *ALL)


@pytest.mark.parametrize("special", [float("inf"), float("nan")])
def test_values_that_are_not_finite_pass_no_gradient(special: float) -> None:
    arguments = (leaf(7, 30), torch.ones(()))
    with torch.no_grad():
        arguments[0][0, 0] = special
    gm = joint(lambda x, hint: (quantized(x * 2, hint),), *arguments)
    before = results(gm, arguments)[1]
    lower(gm, *ALL)
    torch.testing.assert_close(results(gm, arguments)[1], before, rtol=0, atol=0, equal_nan=True)


def heads(x: Tensor, w: Tensor, hint: Tensor) -> tuple[Tensor]:
    """The operand of a product of two heads, [2, 4, 6] -> [4, 2, 6], quantized behind the permutation."""
    of_heads = (x @ w).view(4, 2, 6).permute(1, 0, 2)
    return ((quantized(of_heads, hint) @ of_heads.detach().transpose(1, 2)).sin(),)


def test_a_gradient_is_masked_in_the_order_in_which_it_is_read() -> None:
    inputs = (leaf(4, 5), leaf(5, 12), torch.ones(()))
    gm = joint(heads, *inputs)
    unchanged(gm, inputs, *ALL)
    (mask,) = gm.graph.find_nodes(op="call_function", target=aten.where.self)
    assert mask.meta["val"].shape == (4, 12)
    assert {user.target for user in mask.users} <= {aten.mm.default, aten.permute.default}
    assert lower(gm, *ALL) == []


def test_views_that_keep_the_order_stay_behind_the_mask() -> None:
    inputs = (leaf(4, 5), leaf(5, 12), torch.ones(()))
    gm = joint(lambda x, w, hint: (quantized((x @ w).view(2, 2, 12), hint) @ torch.ones(12, 3),), *inputs)
    unchanged(gm, inputs, *ALL)
    (mask,) = gm.graph.find_nodes(op="call_function", target=aten.where.self)
    assert mask.meta["val"].shape == (2, 2, 12)
