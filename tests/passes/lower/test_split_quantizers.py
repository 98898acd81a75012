"""split_quantizers: a solve and a rounding in place of the one op, in training and in inference."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from octav_fx.formats.spec import integers
from octav_fx.ir.printer import graph_text
from octav_fx.ops.dynamic_fake_quantize.op import dynamic_fake_quantize
from octav_fx.passes import split_quantizers
from tests.support.joint import after_relu, joint, layer_inputs, linear, lower, results, targets, unchanged

octav = torch.ops.octav


def inference(function: Callable[..., Any], *inputs: Tensor) -> Any:
    with torch.no_grad():
        return joint(function, *(tensor.detach() for tensor in inputs), trace_joint=False)


def test_golden() -> None:
    gm = joint(lambda x, w, hint: (F.linear(linear_of(x, hint), w),), *layer_inputs()[:1], *layer_inputs()[2:])
    edits = lower(gm, split_quantizers)
    assert [(edit.node, edit.verb, edit.detail) for edit in edits] == [("sin", "split", "4 bits")]
    assert graph_text(gm.graph) == (
        "sin = sin.default(primals_1)\n"
        "optimal_clip_default = optimal_clip.default(sin, primals_3, 'int4/tensor', 'octav')\n"
        "fake_quantize_default = fake_quantize.default(sin, optimal_clip_default, 'int4/tensor', 'pwl', None)\n"
        "permute = permute.default(primals_2, [1, 0])\n"
        "mm = mm.default(fake_quantize_default, permute)\n"
        "permute_1 = permute.default(tangents_1, [1, 0])\n"
        "mm_1 = mm.default(permute_1, fake_quantize_default)\n"
        "permute_2 = permute.default(mm_1, [1, 0])\n"
        "permute_3 = permute.default(permute, [1, 0])\n"
        "mm_2 = mm.default(tangents_1, permute_3)\n"
        "permute_4 = permute.default(permute_2, [1, 0])\n"
        "fake_quantize_backward = "
        "fake_quantize_backward.default(mm_2, sin, optimal_clip_default, 'int4/tensor', 'pwl')\n"
        "cos = cos.default(primals_1)\n"
        "mul = mul.Tensor(fake_quantize_backward, cos)\n"
        "return [mm, mul, permute_4, None]"
    )


def linear_of(x: Tensor, hint: Tensor) -> Tensor:
    return dynamic_fake_quantize(x.sin(), hint, integers(4, True, None), "octav", "pwl")[0]


def test_golden_inference() -> None:
    gm = inference(linear(), *layer_inputs())
    lower(gm, split_quantizers)
    assert graph_text(gm.graph) == (
        "mm = mm.default(arg0_1, arg1_1)\n"
        "optimal_clip_default = optimal_clip.default(mm, arg3_1, 'int4/tensor', 'octav')\n"
        "fake_quantize_default = fake_quantize.default(mm, optimal_clip_default, 'int4/tensor', 'pwl', None)\n"
        "permute = permute.default(arg2_1, [1, 0])\n"
        "mm_1 = mm.default(fake_quantize_default, permute)\n"
        "return (mm_1)"
    )


@pytest.mark.parametrize("function", [linear(), linear(gradient="mad"), linear(gradient="ste", bits=8), after_relu])
def test_numbers(function: Callable[..., Any]) -> None:
    assert len(unchanged(joint(function, *layer_inputs()), layer_inputs(), split_quantizers)) == 1


@pytest.mark.parametrize("function", [linear(), after_relu])
def test_numbers_of_inference(function: Callable[..., Any]) -> None:
    gm, inputs = inference(function, *layer_inputs()), layer_inputs()
    assert len(unchanged(gm, inputs, split_quantizers)) == 1
    assert octav.dynamic_fake_quantize.default not in targets(gm)


def only_clip(x: Tensor, hint: Tensor) -> tuple[Tensor]:
    return (dynamic_fake_quantize(x, hint, integers(4, True, None), "octav", "pwl")[1] * 2,)


def test_a_clip_alone_is_solved_and_nothing_is_rounded() -> None:
    inputs = (torch.randn(7, 30), torch.ones(()))
    gm = inference(only_clip, *inputs)
    (expected,) = results(gm, inputs)
    lower(gm, split_quantizers)
    assert octav.optimal_clip.default in targets(gm) and octav.fake_quantize.default not in targets(gm)
    (found,) = results(gm, inputs)
    assert found is not None and expected is not None and torch.equal(found, expected)


@pytest.mark.parametrize("trace_joint", [True, False])
def test_twice_changes_nothing(trace_joint: bool) -> None:
    gm = joint(linear(), *layer_inputs()) if trace_joint else inference(linear(), *layer_inputs())
    assert len(lower(gm, split_quantizers)) == 1
    text = graph_text(gm.graph)
    assert lower(gm, split_quantizers) == []
    assert graph_text(gm.graph) == text
