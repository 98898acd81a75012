"""mask_from_value: the mask of a value that backward can compute again, and what is kept then."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy

from octav_fx.ir.printer import graph_text
from octav_fx.passes import keep_levels, mask_from_codes, mask_from_value, save_codes, split_quantizers
from tests.support.joint import (
    after_relu,
    joint,
    kept,
    layer_inputs,
    leaf,
    linear,
    lower,
    quantized,
    results,
    unchanged,
)

on_cpu = functools.partial(mask_from_value, device="cpu")
SAVE = (split_quantizers, save_codes)


def of_gelu(x: Tensor, u: Tensor, w: Tensor, hint: Tensor, **spec: Any) -> tuple[Tensor]:
    return (F.linear(quantized(F.gelu(x @ u), hint, **spec), w),)


def of_layer_norm(x: Tensor, u: Tensor, w: Tensor, hint: Tensor) -> tuple[Tensor]:
    return (F.linear(quantized(F.layer_norm(x @ u, (30,), u[0], u[1]), hint), w),)


def test_golden() -> None:
    gm = joint(lambda x, w, hint: (F.linear(quantized(x.sin(), hint), w),), leaf(7, 30), leaf(4, 30), torch.ones(()))
    lower(gm, *SAVE)
    assert [(edit.node, edit.verb, edit.detail) for edit in lower(gm, on_cpu)] == [
        ("sin", "mask from value", "1 recomputed")
    ]
    assert graph_text(gm.graph).partition("permute_4 = ")[2] == (
        "permute.default(permute_2, [1, 0])\n"
        "convert_element_type_default = convert_element_type.default(sin, torch.float32)\n"
        "abs_default = abs.default(convert_element_type_default)\n"
        "le_tensor = le.Tensor(abs_default, optimal_clip_default)\n"
        "full_default = full.default([], 0.0, dtype=torch.float32, device=device(type='cpu'))\n"
        "where_self = where.self(le_tensor, mm_2, full_default)\n"
        "cos = cos.default(primals_1)\n"
        "mul = mul.Tensor(where_self, cos)\n"
        "return [mm, mul, permute_4, None]"
    )
    (sin,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default)
    assert sin.meta["recompute"] is CheckpointPolicy.MUST_RECOMPUTE
    assert lower(gm, on_cpu) == []


@pytest.mark.parametrize("function", [of_gelu, of_layer_norm])
def test_codes_are_not_kept_beside_levels(function: Any) -> None:
    inputs = layer_inputs()
    gm, other = joint(function, *inputs), joint(function, *inputs)
    lower(other, *SAVE, mask_from_codes, keep_levels)
    edits = unchanged(gm, inputs, *SAVE, on_cpu, mask_from_codes, keep_levels)
    assert "mask from value" in {edit.verb for edit in edits}
    assert "quantize_default" in kept(other)
    assert {*kept(other)} - {"quantize_default"} | {"optimal_clip_default"} == {*kept(gm)}


def test_infinities_and_nan_have_no_gradient() -> None:
    x, u, w, hint = layer_inputs()
    x = x.detach().clone()
    x[0, 0], x[1, 1] = torch.inf, torch.nan
    inputs = (x.requires_grad_(), u, w, hint)
    gm = joint(lambda x, u, w, hint: (quantized(-x, hint) @ w.T,), *inputs)
    lower(gm, *SAVE, on_cpu)
    gradient = results(gm, inputs)[1]
    assert gradient is not None and not gradient[0, 0] and not gradient[1, 1]


# Of a matmul, a relu, a matmul again, a gradient that asks for the value itself, and for nothing.
@pytest.mark.parametrize(
    "function",
    [
        linear(),
        after_relu,
        lambda x, u, w, hint: (F.linear(quantized((x @ u) + (x @ u.T), hint), w),),
        functools.partial(of_gelu, gradient="mad"),
        functools.partial(of_gelu, gradient="ste"),
    ],
)
def test_nothing_else_is_masked_so(function: Any) -> None:
    gm = joint(function, *layer_inputs())
    lower(gm, *SAVE)
    assert lower(gm, on_cpu) == []


def test_a_cpu_keeps_codes() -> None:
    gm = joint(of_gelu, *layer_inputs())
    lower(gm, *SAVE)
    assert lower(gm, mask_from_value) == []
