"""codes_in_forward: forward multiplies codes, backward stays as it is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from octav_fx.ir.printer import graph_text
from octav_fx.ops.product_of_codes import choice
from octav_fx.passes import codes_in_forward, lower_passes
from tests.support.integers import needs_onednn, needs_unsigned_bytes
from tests.support.joint import joint, kept, leaf, lower, quantized, results, targets, weight

octav, aten = torch.ops.octav, torch.ops.aten
pytestmark = [needs_onednn, needs_unsigned_bytes]
AUTO = lower_passes("auto")


@pytest.fixture(autouse=True)
def whatever_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_CALLS", -1.0)
    monkeypatch.setattr(choice, "has_vnni", lambda: True)


def linear(x: Tensor, w: Tensor, hint: Tensor, hints: Tensor) -> tuple[Tensor]:
    return (F.linear(quantized(x.sin(), hint), weight(w, hints)),)


def small() -> tuple[Tensor, ...]:
    return leaf(7, 30), leaf(4, 30), torch.ones(()), torch.ones(4)


def lowered(function: Callable[..., Any], inputs: tuple[Tensor, ...], *passes: Any) -> fx.GraphModule:
    gm = joint(function, *inputs)
    lower(gm, *passes)
    return gm


def test_golden() -> None:
    gm = joint(linear, *small())
    edits = [edit for edit in lower(gm, *AUTO) if edit.verb == "codes in forward"]
    assert [(edit.node, edit.detail) for edit in edits] == [("mm", "[4, 30]")]
    assert graph_text(gm.graph) == (
        "sin = sin.default(primals_1)\n"
        "optimal_clip_default = optimal_clip.default(sin, primals_3, 'int4/tensor', 'octav')\n"
        "quantize_default = quantize.default(sin, optimal_clip_default, 'int4/tensor', None)\n"
        "dequantize_default = "
        "dequantize.default(quantize_default, optimal_clip_default, 'int4/tensor', torch.float32)\n"
        "optimal_clip_default_1 = optimal_clip.default(primals_2, primals_4, 'int4/channel.0', 'octav')\n"
        "fake_quantize_default_1 = fake_quantize.default(primals_2, optimal_clip_default_1, "
        "'int4/channel.0', 'mad', None)\n"
        "permute = permute.default(fake_quantize_default_1, [1, 0])\n"
        "view_default = view.default(quantize_default, [-1, 30])\n"
        "product_of_codes_default = product_of_codes.default(view_default, optimal_clip_default, 'int4/tensor', "
        "primals_2, optimal_clip_default_1, 'int4/channel.0', None, [], [], [], 1, torch.float32)\n"
        "permute_1 = permute.default(tangents_1, [1, 0])\n"
        "mm_1 = mm.default(permute_1, dequantize_default)\n"
        "permute_2 = permute.default(mm_1, [1, 0])\n"
        "permute_3 = permute.default(permute, [1, 0])\n"
        "mm_2 = mm.default(tangents_1, permute_3)\n"
        "permute_4 = permute.default(permute_2, [1, 0])\n"
        "fake_quantize_backward = "
        "fake_quantize_backward.default(permute_4, primals_2, optimal_clip_default_1, 'int4/channel.0', 'mad')\n"
        "convert_element_type_default = convert_element_type.default(quantize_default, torch.float32)\n"
        "sub_tensor = sub.Tensor(convert_element_type_default, -0.5)\n"
        "abs_default = abs.default(sub_tensor)\n"
        "gt_scalar = gt.Scalar(abs_default, 7.5)\n"
        "full_default = full.default([], 0.0, dtype=torch.float32, device=device(type='cpu'))\n"
        "where_self = where.self(gt_scalar, full_default, mm_2)\n"
        "cos = cos.default(primals_1)\n"
        "mul = mul.Tensor(where_self, cos)\n"
        "return [product_of_codes_default, mul, fake_quantize_backward, None, None]"
    )


def biased(x: Tensor, w: Tensor, hint: Tensor, hints: Tensor, bias: Tensor) -> tuple[Tensor]:
    # Tokens of a batch; times 2, as AOTAutograd hands out no view.
    return (F.linear(quantized(x.sin(), hint), weight(w, hints, 8), bias) * 2,)


def halves(function: Callable[..., Any]) -> Callable[..., Any]:
    def under_autocast(*inputs: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return function(*inputs)

    return under_autocast


def unsigned(bits: int) -> Callable[..., Any]:
    return lambda x, w, hint, hints: (F.linear(quantized(x.relu(), hint, bits, signed=False), weight(w, hints)),)


def at_a_ceiling(x: Tensor, w: Tensor, hint: Tensor, hints: Tensor) -> tuple[Tensor]:
    return (F.linear(quantized(F.relu6(4 * x), hint, 5, signed=False), weight(w, hints)),)


def an_input(x: Tensor, w: Tensor, hint: Tensor, hints: Tensor) -> tuple[Tensor]:
    return (F.linear(quantized(x, hint), weight(w, hints)),)


def convolution(**window: Any) -> Callable[..., Any]:
    return lambda x, w, hint, hints, bias: (F.conv2d(quantized(x.sin(), hint), weight(w, hints), bias, **window),)


def images(inputs: int = 8, kernel: int = 3) -> tuple[Tensor, ...]:
    x = torch.randn(2, 8, 5, 6).to(memory_format=torch.channels_last).requires_grad_()
    return x, leaf(4, inputs, kernel, kernel), torch.ones(()), torch.ones(4), leaf(4)


TOKENS = (leaf(2, 7, 30), leaf(4, 30), torch.ones(()), torch.ones(4), leaf(4))
CASES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "linear": (linear, small()),
    "bias, three axes": (biased, TOKENS),
    "linear under autocast": (halves(biased), TOKENS),
    "unsigned": (unsigned(4), small()),
    "codes up to 255": (unsigned(8), small()),
    "relu6": (at_a_ceiling, small()),
    "an input of the graph": (an_input, small()),
    "convolution": (convolution(padding=1), images()),
    "kernels of one position": (convolution(stride=2), images(kernel=1)),
    "strided, dilated": (convolution(stride=2, dilation=2, padding=2), images()),
    "grouped": (convolution(groups=2, padding=1), images(4)),
    "convolution under autocast": (halves(convolution(padding=1)), images()),
    "images that are contiguous": (convolution(padding=1), (leaf(2, 8, 5, 6), *images()[1:])),
}


@pytest.mark.parametrize("name", CASES)
def test_numbers(name: str) -> None:
    function, inputs = CASES[name]
    before, after = lowered(function, inputs, *lower_passes()), lowered(function, inputs, *AUTO)
    assert octav.product_of_codes.default in targets(after)
    assert not {aten.mm.default, aten.addmm.default, aten.convolution.default} & {
        node.target for node in after.graph.nodes if not any("tangents" in str(i) for i in inputs_of(node))
    }
    (y, *gradients), (expected, *others) = results(after, inputs), results(before, inputs)
    assert y is not None
    assert expected is not None
    assert (y.dtype, y.shape) == (expected.dtype, expected.shape)
    # Levels of 8 bits round to bfloat16, products of K terms to the dtype of the result in any order. Both are bounded
    # by the sum of magnitudes, which is bounded by that of the largest.
    k = inputs[1][0].numel()
    rounding = torch.finfo(expected.dtype).eps * (k + 4 if expected.dtype is torch.float32 else 4)
    torch.testing.assert_close(y, expected, rtol=0, atol=rounding * 6 * 2 * k * inputs[1].abs().max().item())
    for gradient, other in zip(gradients, others, strict=True):
        assert (gradient is None and other is None) or torch.equal(gradient, other)


def inputs_of(node: fx.Node) -> set[fx.Node]:
    found = {node}
    while more := {source for one in found for source in one.all_input_nodes} - found:
        found |= more
    return found


@pytest.mark.parametrize("name", ["linear", "convolution", "linear under autocast"])
def test_backward_keeps_what_it_kept(name: str) -> None:
    function, inputs = CASES[name]
    kinds = (sorted(map(str, kept(lowered(function, inputs, *passes)).values())) for passes in (lower_passes(), AUTO))
    assert next(kinds) == next(kinds)


@pytest.mark.parametrize("name", CASES)
def test_twice_changes_nothing(name: str) -> None:
    function, inputs = CASES[name]
    gm = lowered(function, inputs, *AUTO)
    text = graph_text(gm.graph)
    assert lower(gm, *AUTO) == []
    assert graph_text(gm.graph) == text


def test_inference_reads_codes_and_keeps_no_levels() -> None:
    inputs = tuple(tensor.detach() for tensor in small())
    gm = joint(linear, *inputs, trace_joint=False)
    lower(gm, *AUTO)
    assert octav.product_of_codes.default in targets(gm)
    assert not {octav.fake_quantize.default, aten.mm.default} & targets(gm)


def plain(x: Tensor, w: Tensor, hint: Tensor, hints: Tensor) -> tuple[Tensor]:
    return (F.linear(x, weight(w, hints)),)


def two_activations(x: Tensor, w: Tensor, hint: Tensor, hints: Tensor) -> tuple[Tensor]:
    return (quantized(x.sin(), hint) @ quantized(w.sin(), hint).t(),)


def per_row(x: Tensor, w: Tensor, hint: Tensor, hints: Tensor) -> tuple[Tensor]:
    return (F.linear(weight(x.sin(), torch.ones(7)), weight(w, hints)),)


def transposed(x: Tensor, w: Tensor, hint: Tensor, hints: Tensor) -> tuple[Tensor]:
    return (F.conv_transpose2d(quantized(x.sin(), hint), quantized(w, hint)),)


@pytest.mark.parametrize("function", [plain, two_activations, per_row])
def test_what_is_no_layer_of_levels_stays(function: Callable[..., Any]) -> None:
    gm = lowered(function, small(), *lower_passes())
    text = graph_text(gm.graph)
    assert lower(gm, codes_in_forward) == []
    assert graph_text(gm.graph) == text


def test_transposed_convolutions_stay() -> None:
    gm = lowered(transposed, (leaf(2, 8, 5, 5), leaf(8, 4, 3, 3), torch.ones(()), torch.ones(4)), *AUTO)
    assert octav.product_of_codes.default not in targets(gm)


def doubled(x: Tensor, w: Tensor, hint: Tensor, hints: Tensor) -> tuple[Tensor]:
    return (F.linear(quantized(x.double().sin(), hint), weight(w.double(), hints)),)


def cut(x: Tensor, w: Tensor, hint: Tensor, hints: Tensor) -> tuple[Tensor]:
    return (F.linear(quantized(x.sin(), hint).reshape(14, 15), weight(w, hints)),)


def added(x: Tensor, w: Tensor, hint: Tensor, hints: Tensor, other: Tensor) -> tuple[Tensor]:
    return (torch.addmm(other, quantized(x.sin(), hint), weight(w, hints).t()),)


DECLINED: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], str]] = {
    "float64": (doubled, small(), "its result is torch.float64"),
    "rows cut in two": (
        cut,
        (leaf(7, 30), leaf(4, 15), torch.ones(()), torch.ones(4)),
        "rows of the matmul are no rows of the quantized tensor",
    ),
    "no bias": (added, (*small(), leaf(7, 4)), "what is added is no bias"),
}


@pytest.mark.parametrize("name", DECLINED)
def test_declined_with_a_reason(name: str) -> None:
    function, inputs, reason = DECLINED[name]
    gm = lowered(function, inputs, *lower_passes())
    text = graph_text(gm.graph)
    (edit,) = lower(gm, codes_in_forward)
    assert edit.detail == reason
    assert graph_text(gm.graph) == text


def test_a_small_layer_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_CALLS", 1e-5)
    gm = lowered(linear, small(), *lower_passes())
    (edit,) = lower(gm, codes_in_forward)
    assert edit.detail == "7 positions of a weight [4, 30] gain nothing from integers"
    monkeypatch.setattr(choice, "_CALLS", -1e-5)
    assert [edit.verb for edit in lower(gm, codes_in_forward)] == ["codes in forward"]
