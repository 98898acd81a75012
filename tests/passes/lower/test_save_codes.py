"""save_codes: backward keeps integer codes of an activation and nothing of a weight, and computes what it did."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy

from benchmarks.saved import saved_for_backward
from octav_fx.formats.spec import integers
from octav_fx.ir.printer import graph_text
from octav_fx.ops.dynamic_fake_quantize.op import dynamic_fake_quantize
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
    tagged,
    targets,
    unchanged,
    weight,
)

aten, octav = torch.ops.aten, torch.ops.octav
SAVE = (split_quantizers, save_codes)
# Without the gradient's own question about the value, which it would be kept for.
ALL = (*SAVE, mask_from_codes)


def both(x: Tensor, u: Tensor, w: Tensor, hint: Tensor, hints: Tensor) -> tuple[Tensor]:
    return (F.linear(quantized(x @ u, hint), weight(w, hints)),)


def test_golden_activation() -> None:
    gm = joint(lambda x, w, hint: (F.linear(quantized(x.sin(), hint), w),), leaf(7, 30), leaf(4, 30), torch.ones(()))
    assert graph_text(gm.graph) == (
        "sin = sin.default(primals_1)\n"
        "dynamic_fake_quantize = dynamic_fake_quantize.default(sin, primals_3, 'int4/tensor', 'octav', 'pwl')\n"
        "getitem = getitem(dynamic_fake_quantize, 0)\n"
        "getitem_1 = getitem(dynamic_fake_quantize, 1)\n"
        "permute = permute.default(primals_2, [1, 0])\n"
        "mm = mm.default(getitem, permute)\n"
        "permute_1 = permute.default(tangents_1, [1, 0])\n"
        "mm_1 = mm.default(permute_1, getitem)\n"
        "permute_2 = permute.default(mm_1, [1, 0])\n"
        "permute_3 = permute.default(permute, [1, 0])\n"
        "mm_2 = mm.default(tangents_1, permute_3)\n"
        "permute_4 = permute.default(permute_2, [1, 0])\n"
        "fake_quantize_backward = fake_quantize_backward.default(mm_2, sin, getitem_1, 'int4/tensor', 'pwl')\n"
        "cos = cos.default(primals_1)\n"
        "mul = mul.Tensor(fake_quantize_backward, cos)\n"
        "return [mm, mul, permute_4, None]"
    )
    lower(gm, split_quantizers)
    assert [(edit.node, edit.verb, edit.detail) for edit in lower(gm, save_codes)] == [("sin", "save codes", "4 bits")]
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
        "fake_quantize_backward = "
        "fake_quantize_backward.default(mm_2, sin, optimal_clip_default, 'int4/tensor', 'pwl')\n"
        "cos = cos.default(primals_1)\n"
        "mul = mul.Tensor(fake_quantize_backward, cos)\n"
        "return [mm, mul, permute_4, None]"
    )
    assert tagged(gm) == {"dequantize_default": CheckpointPolicy.MUST_RECOMPUTE}


def test_golden_weight() -> None:
    gm = joint(lambda x, w, hint: (F.linear(x, weight(w, hint)),), torch.randn(7, 30), leaf(4, 30), torch.ones(4))
    lower(gm, split_quantizers)
    # The gradient of x is not asked for, so that backward reads no levels: nothing is to be tagged.
    assert lower(gm, save_codes) == []
    assert graph_text(gm.graph) == (
        "optimal_clip_default = optimal_clip.default(primals_2, primals_3, 'int4/channel.0', 'octav')\n"
        "fake_quantize_default = fake_quantize.default(primals_2, optimal_clip_default, "
        "'int4/channel.0', 'mad', None)\n"
        "permute = permute.default(fake_quantize_default, [1, 0])\n"
        "mm = mm.default(primals_1, permute)\n"
        "permute_1 = permute.default(tangents_1, [1, 0])\n"
        "mm_1 = mm.default(permute_1, primals_1)\n"
        "permute_2 = permute.default(mm_1, [1, 0])\n"
        "permute_3 = permute.default(permute_2, [1, 0])\n"
        "fake_quantize_backward = "
        "fake_quantize_backward.default(permute_3, primals_2, optimal_clip_default, 'int4/channel.0', 'mad')\n"
        "return [mm, None, fake_quantize_backward, None]"
    )


@pytest.mark.parametrize(("bits", "dtype"), [(4, torch.int8), (7, torch.int8), (8, torch.int16)])
def test_backward_keeps_the_codes_of_an_activation(bits: int, dtype: torch.dtype) -> None:
    gm = joint(linear(bits=bits), *layer_inputs())
    before = kept(joint(linear(bits=bits), *layer_inputs()))
    unchanged(gm, layer_inputs(), *ALL)
    assert before["getitem"] is torch.float32
    assert kept(gm) == {"quantize_default": dtype, "optimal_clip_default": torch.float32}


def test_backward_keeps_nothing_of_a_weight_but_its_clips() -> None:
    arguments = (*layer_inputs(), torch.ones(4))
    gm = joint(both, *arguments)
    unchanged(gm, arguments, *ALL)
    found = kept(gm)
    assert sorted(found) == ["optimal_clip_default", "optimal_clip_default_1", "quantize_default"]
    assert found["quantize_default"] is torch.int8
    # The weight itself is there anyway.
    assert sum(dtype is torch.float32 for dtype in found.values()) == 2


@pytest.mark.parametrize("views", [lambda w: w.view(4, 30), lambda w: w.t().t(), lambda w: w[:4], lambda w: w.float()])
def test_a_view_of_a_weight_is_a_weight(views: Callable[[Tensor], Tensor]) -> None:
    gm = joint(
        lambda x, w, hint: (F.linear(x, weight(views(w), hint)),), torch.randn(7, 30), leaf(4, 30), torch.ones(4)
    )
    unchanged(gm, (torch.randn(7, 30), leaf(4, 30), torch.ones(4)), *ALL)
    assert not codes_of(gm)


def test_an_input_of_the_model_is_there_anyway() -> None:
    gm = joint(lambda x, w, hint: (F.linear(quantized(x, hint), w),), torch.randn(7, 30), *layer_inputs()[2:])
    assert [edit.verb for edit in lower(gm, *SAVE)] == ["split", "recompute"]
    assert kept(gm) == {"optimal_clip_default": torch.float32}


def test_magnitude_aware_gradients_ask_the_value() -> None:
    gm = joint(linear(gradient="mad"), *layer_inputs())
    assert [edit.verb for edit in unchanged(gm, layer_inputs(), *ALL)] == ["split", "recompute"]
    assert not codes_of(gm)
    assert torch.ops.octav.fake_quantize_backward.default in targets(gm)
    # Of the value and what is computed from it one tensor is enough.
    assert [dtype for name, dtype in kept(gm).items() if "clip" not in name] == [torch.float32]


def test_magnitude_aware_without_a_gradient_is_codes() -> None:
    arguments = (torch.randn(7, 30), torch.randn(30, 30), *layer_inputs()[2:])
    gm = joint(linear(gradient="mad"), *arguments)
    assert [edit.verb for edit in unchanged(gm, arguments, *ALL)] == ["split", "save codes"]
    assert kept(gm) == {"quantize_default": torch.int8, "optimal_clip_default": torch.float32}


def test_straight_through_has_no_mask() -> None:
    gm = joint(linear(gradient="ste"), *layer_inputs())
    unchanged(gm, layer_inputs(), *ALL)
    assert not {aten.where.self, aten.gt.Scalar, torch.ops.octav.fake_quantize_backward.default} & targets(gm)
    assert [user.target for user in codes_of(gm)[0].users] == [torch.ops.octav.dequantize.default]


def test_a_frozen_layer_does_not_ask_for_its_input() -> None:
    x, u, w, hint = layer_inputs()
    arguments = (x, u, w.detach(), hint)
    gm = joint(linear(gradient="ste"), *arguments)
    unchanged(gm, arguments, *ALL)
    assert tagged(gm) == {}
    assert kept(gm) == {}


def test_the_mask_of_a_frozen_layer_is_all_that_asks_for_codes() -> None:
    x, u, w, hint = layer_inputs()
    arguments = (x, u, w.detach(), hint)
    gm = joint(linear(), *arguments)
    unchanged(gm, arguments, *ALL)
    assert tagged(gm) == {}
    # Codes, or the mask itself.
    (dtype,) = kept(gm).values()
    assert dtype in (torch.int8, torch.bool)


@pytest.mark.parametrize("function", [linear(), after_relu])
def test_an_inference_graph_stays(function: Callable[..., Any]) -> None:
    with torch.no_grad():
        gm = joint(function, *(tensor.detach() for tensor in layer_inputs()), trace_joint=False)
    lower(gm, split_quantizers)
    text = graph_text(gm.graph)
    assert "fake_quantize" in text
    assert lower(gm, save_codes) == []
    assert graph_text(gm.graph) == text


@pytest.mark.parametrize("function", [linear(), linear(gradient="mad"), linear(bits=8), after_relu])
def test_twice_changes_nothing(function: Callable[..., Any]) -> None:
    gm = joint(function, *layer_inputs())
    assert len(lower(gm, *SAVE)) == 2
    text, tags = graph_text(gm.graph), tagged(gm)
    assert lower(gm, *SAVE) == []
    assert (graph_text(gm.graph), tagged(gm)) == (text, tags)


def test_a_static_clip_keeps_codes_as_a_solved_one_does() -> None:
    def frozen(x: Tensor, u: Tensor, w: Tensor, clip: Tensor) -> tuple[Tensor]:
        return (F.linear(octav.fake_quantize(x @ u, clip, integers(4, True, None), "pwl"), w),)

    gm = joint(frozen, *layer_inputs())
    assert [edit.verb for edit in unchanged(gm, layer_inputs(), *ALL)] == ["save codes", "mask from codes"]
    assert kept(gm) == {"quantize_default": torch.int8}


def test_a_reshaped_activation_is_recomputed_as_a_whole() -> None:
    def function(x: Tensor, u: Tensor, w: Tensor, hint: Tensor) -> tuple[Tensor]:
        return (F.linear(quantized(x @ u, hint).view(30, 7).t().contiguous(), w),)

    gm = joint(function, *layer_inputs())
    unchanged(gm, layer_inputs(), *ALL)
    assert len(tagged(gm)) > 1
    assert kept(gm) == {"quantize_default": torch.int8, "optimal_clip_default": torch.float32}


def test_an_activation_that_is_an_output_stays_one() -> None:
    def function(x: Tensor, u: Tensor, w: Tensor, hint: Tensor) -> tuple[Tensor, Tensor]:
        y = quantized(x @ u, hint)
        return y, F.linear(y, w)

    gm = joint(function, *layer_inputs())
    unchanged(gm, layer_inputs(), *ALL)


def test_the_clip_can_be_an_output() -> None:
    def function(x: Tensor, u: Tensor, w: Tensor, hint: Tensor) -> tuple[Tensor, Tensor]:
        y, clip = dynamic_fake_quantize(x @ u, hint, integers(4, True, None), "octav", "pwl")
        return F.linear(y, w), clip.detach()

    gm = joint(function, *layer_inputs())
    unchanged(gm, layer_inputs(), *ALL)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.one, self.two = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 6 * 6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(self.a(x)).relu()
        x = self.two(self.b(x)).relu()
        return self.fc(x.flatten(1))


@pytest.mark.compile
def test_a_compiled_model_holds_no_float_copy_of_what_it_quantized() -> None:
    torch.compiler.reset()
    float_module, x = Small(), torch.randn(4, 3, 6, 6).to(memory_format=torch.channels_last)
    compiled = torch.compile(float_module, backend="octav", options={"edge_bits": None})
    compiled(x)
    y, saved = saved_for_backward(lambda: compiled(x))
    present = {t.untyped_storage().data_ptr() for t in (*float_module.parameters(), *float_module.buffers(), x)}
    own = {t.untyped_storage().data_ptr(): t for t in saved if t.untyped_storage().data_ptr() not in present}
    # The quantized activations are [4, 8, 6, 6], of which codes are kept; batch norm keeps its two inputs as they are.
    large = sorted(str(t.dtype) for t in own.values() if t.numel() == 4 * 8 * 6 * 6)
    assert large == ["torch.float32", "torch.float32", "torch.int8", "torch.int8"]
    # A copy of a quantized tensor would have at most 16 values.
    assert all(len(t.unique()) > 16 for t in own.values() if t.is_floating_point() and t.numel() > 16)
    y.sum().backward()
    assert all(p.grad is not None for p in float_module.parameters())
