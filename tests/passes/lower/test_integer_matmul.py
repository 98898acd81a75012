"""integer_matmul: forward multiplies the codes that are there anyway, backward stays as it is."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from octav_fx.formats.spec import integers
from octav_fx.ir.calls import arguments_of
from octav_fx.ir.printer import graph_text
from octav_fx.ops import matmuls
from octav_fx.ops.int_matmul import configs, measured
from octav_fx.ops.int_matmul.measured import Measured
from octav_fx.ops.int_matmul.range import largest_k_in_float8
from octav_fx.ops.matmuls import MatmulKernel, fits_float8, fits_int32
from octav_fx.passes import integer_matmul, lower_passes
from tests.support.joint import codes_of, joint, kept, leaf, lower, quantized, results, targets, weight
from tests.support.matmuls import ON_CPU, forced

octav, aten = torch.ops.octav, torch.ops.aten


def lowered(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> fx.GraphModule:
    gm = joint(function, *inputs)
    lower(gm, *lower_passes())
    return gm


def linear(x: Tensor, w: Tensor, hint: Tensor, hints: Tensor) -> tuple[Tensor]:
    return (F.linear(quantized(x.sin(), hint), weight(w, hints)),)


def small() -> tuple[Tensor, ...]:
    return leaf(7, 30), leaf(4, 30), torch.ones(()), torch.ones(4)


def test_golden() -> None:
    gm = lowered(linear, small())
    assert [(edit.node, edit.verb, edit.detail) for edit in lower(gm, forced)] == [
        ("mm", "integer matmul", "[7, 30] times [30, 4]")
    ]
    assert graph_text(gm.graph) == (
        "sin = sin.default(primals_1)\n"
        "optimal_clip_default = optimal_clip.default(sin, primals_3, 'int4/tensor', 'octav')\n"
        "quantize_default = quantize.default(sin, optimal_clip_default, 'int4/tensor', None)\n"
        "clamp_min_default = clamp_min.default(quantize_default, -8)\n"
        "clamp_max_default = clamp_max.default(clamp_min_default, 7)\n"
        "convert_element_type_default_1 = convert_element_type.default(clamp_max_default, torch.int8)\n"
        "amin_default = amin.default(quantize_default, [-1])\n"
        "eq_scalar = eq.Scalar(amin_default, -128)\n"
        "div_tensor = div.Tensor(optimal_clip_default, 8.0)\n"
        "full_default_1 = full.default([], nan, dtype=torch.float32, device=device(type='cpu'))\n"
        "where_self_1 = where.self(eq_scalar, full_default_1, div_tensor)\n"
        "dequantize_default = "
        "dequantize.default(quantize_default, optimal_clip_default, 'int4/tensor', torch.float32)\n"
        "optimal_clip_default_1 = optimal_clip.default(primals_2, primals_4, 'int4/channel.0', 'octav')\n"
        "quantize_default_1 = quantize.default(primals_2, optimal_clip_default_1, 'int4/channel.0', None)\n"
        "clamp_min_default_1 = clamp_min.default(quantize_default_1, -8)\n"
        "clamp_max_default_1 = clamp_max.default(clamp_min_default_1, 7)\n"
        "convert_element_type_default_2 = convert_element_type.default(clamp_max_default_1, torch.int8)\n"
        "amin_default_1 = amin.default(quantize_default_1, [1])\n"
        "eq_scalar_1 = eq.Scalar(amin_default_1, -128)\n"
        "div_tensor_1 = div.Tensor(optimal_clip_default_1, 8.0)\n"
        "full_default_2 = full.default([], nan, dtype=torch.float32, device=device(type='cpu'))\n"
        "where_self_2 = where.self(eq_scalar_1, full_default_2, div_tensor_1)\n"
        "fake_quantize_default_1 = fake_quantize.default(primals_2, optimal_clip_default_1, "
        "'int4/channel.0', 'mad', None)\n"
        "permute = permute.default(fake_quantize_default_1, [1, 0])\n"
        "view_default = view.default(convert_element_type_default_1, [7, 30])\n"
        "view_default_1 = view.default(where_self_1, [7])\n"
        "int_matmul_default = int_matmul.default(view_default, view_default_1, convert_element_type_default_2, "
        "where_self_2, None, 4, True, 4, torch.float32)\n"
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
        "return [int_matmul_default, mul, fake_quantize_backward, None, None]"
    )


def biased(x: Tensor, w: Tensor, hint: Tensor, hints: Tensor, bias: Tensor) -> tuple[Tensor]:
    # Tokens of a batch; times 2, as AOTAutograd hands out no view.
    return (F.linear(quantized(x.sin(), hint), weight(w, hints, 8), bias) * 2,)


def halves(x: Tensor, w: Tensor, hint: Tensor, hints: Tensor, bias: Tensor) -> tuple[Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        return biased(x, w, hint, hints, bias)


def one_clip(x: Tensor, w: Tensor, hint: Tensor, hints: Tensor) -> tuple[Tensor]:
    y = octav.dynamic_fake_quantize(w, hint, integers(4, True, None), "octav", "mad")[0]
    return (F.linear(quantized(x.sin(), hint), y),)


def unsigned(bits: int) -> Callable[..., Any]:
    return lambda x, w, hint, hints: (F.linear(quantized(x.relu(), hint, bits, signed=False), weight(w, hints)),)


def at_a_ceiling(x: Tensor, w: Tensor, hint: Tensor, hints: Tensor) -> tuple[Tensor]:
    return (F.linear(quantized(F.relu6(4 * x), hint, 5, signed=False), weight(w, hints)),)


def an_input(x: Tensor, w: Tensor, hint: Tensor, hints: Tensor) -> tuple[Tensor]:
    return (F.linear(quantized(x, hint), weight(w, hints)),)


def frozen(x: Tensor, w: Tensor, clip: Tensor, clips: Tensor) -> tuple[Tensor]:
    x, w = (
        octav.fake_quantize(x.sin(), clip, integers(4, True, None), "pwl"),
        octav.fake_quantize(w, clips, integers(4, True, 0), "mad"),
    )
    return (F.linear(x, w),)


def conv(stride: int) -> Callable[..., Any]:
    return lambda x, w, hint, hints, bias: (F.conv2d(quantized(x.sin(), hint), weight(w, hints), bias, stride),)


def images(channels: int = 8) -> tuple[Tensor, ...]:
    x = torch.randn(2, channels, 5, 6).to(memory_format=torch.channels_last).requires_grad_()
    return x, leaf(4, channels, 1, 1), torch.ones(()), torch.ones(4), leaf(4)


TOKENS = (leaf(2, 7, 30), leaf(4, 30), torch.ones(()), torch.ones(4), leaf(4))
CASES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "linear": (linear, small()),
    "bias, three axes": (biased, TOKENS),
    "autocast": (halves, TOKENS),
    "one clip for the weight": (one_clip, small()),
    "unsigned": (unsigned(4), small()),
    "codes up to 255": (unsigned(8), small()),
    "relu6": (at_a_ceiling, small()),
    "an input of the graph": (an_input, small()),
    "static clips": (frozen, small()),
    "transposed memory": (linear, (leaf(30, 7).t(), *small()[1:])),
    "one row": (linear, (leaf(1, 30), *small()[1:])),
    "no rows": (linear, (leaf(0, 30), *small()[1:])),
    "convolution": (conv(1), images()),
    "convolution with a stride": (conv(2), images()),
}


@pytest.mark.parametrize("name", CASES)
def test_numbers(name: str) -> None:
    function, inputs = CASES[name]
    gm = lowered(function, inputs)
    before = results(gm, inputs)
    assert [edit.verb for edit in lower(gm, forced)] == ["integer matmul"]
    assert octav.int_matmul.default in targets(gm)
    (y, *gradients), (expected, *others) = results(gm, inputs), before
    assert y is not None
    assert expected is not None
    assert (y.dtype, y.shape, y.stride()) == (expected.dtype, expected.shape, expected.stride())
    # Levels of 8 bits round to bfloat16, products of K terms to the dtype of the result in any order. Both are bounded
    # by the sum of magnitudes, which is bounded by that of the largest.
    k = inputs[1].shape[1]
    rounding = torch.finfo(expected.dtype).eps * (k + 4 if expected.dtype is torch.float32 else 4)
    largest = 6 * 2 * k * inputs[1].abs().max().item()
    torch.testing.assert_close(y, expected, rtol=0, atol=rounding * largest)
    for gradient, other in zip(gradients, others, strict=True):
        assert (gradient is None and other is None) or torch.equal(gradient, other)


def test_the_result_is_that_of_exact_levels() -> None:
    inputs = small()
    gm = lowered(linear, inputs)
    lower(gm, forced)
    y = results(gm, inputs)[0]
    x, w = inputs[0].detach().sin(), inputs[1].detach()
    clip, clips = (
        octav.optimal_clip(*args, "octav")
        for args in ((x, inputs[2], integers(4, True, None)), (w, inputs[3], integers(4, True, 0)))
    )
    a, b = (
        octav.quantize(x, clip, integers(4, True, None)).clamp(-8, 7),
        octav.quantize(w, clips, integers(4, True, 0)).clamp(-8, 7),
    )
    exact = (a.double() * (clip.double() / 8)) @ (b.double() * (clips.double() / 8)[:, None]).t()
    # Nothing but the result itself is rounded; the sums here are rounded in float64, too.
    assert y is not None
    assert (y.double() - exact).abs().le(exact.abs() * (2**-24 + 2**-50) + 30 * 64 * 2**-53).all()


@pytest.mark.parametrize("name", ["linear", "codes up to 255", "convolution"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_is_nan_where_it_was(name: str, value: float) -> None:
    function, (x, w, *rest) = CASES[name]
    x, w = x.detach().clone(memory_format=torch.preserve_format), w.detach().clone()
    x[1, 3], w[2, 1] = value, math.nan
    # sin of inf is NaN, relu of it is not.
    inputs = (x.requires_grad_(), w.requires_grad_(), *rest)
    gm = lowered(function, inputs)
    before = results(gm, inputs)[0]
    lower(gm, forced)
    after = results(gm, inputs)[0]
    assert before is not None
    assert after is not None
    assert before.isnan().any()
    assert torch.equal(after.isnan(), before.isnan())


def test_what_is_raised_at_a_ceiling_is_lowered() -> None:
    x, w, _, hints = small()
    inputs = (x, w, torch.tensor(10.0), hints)
    gm = lowered(at_a_ceiling, inputs)
    # The clip of a solve is never so far above the ceiling that this could matter: take the hint for it.
    solve = next(
        n for n in gm.graph.nodes if n.target is octav.optimal_clip.default and "tensor" in arguments_of(n).spec
    )
    solve.replace_all_uses_with(arguments_of(solve).hint)
    gm.graph.erase_node(solve)
    gm.recompile()
    before = results(gm, inputs)[0]
    lower(gm, forced)
    torch.testing.assert_close(results(gm, inputs)[0], before, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_an_operand_of_several_matmuls_is_made_once() -> None:
    def function(x: Tensor, w: Tensor, hint: Tensor, hints: Tensor) -> tuple[Tensor, ...]:
        y = quantized(x.sin(), hint)
        return F.linear(y, weight(w, hints)), F.linear(y, weight(2 * w, hints)), F.linear(y, weight(w.sin(), hints))

    gm = lowered(function, small())
    assert len(lower(gm, forced)) == 3
    assert len(gm.graph.find_nodes(op="call_function", target=octav.int_matmul.default)) == 3
    # One of the activation, which save_codes made, and those of the weights.
    assert len(codes_of(gm)) == 4
    assert graph_text(gm.graph).count("amin.default(quantize_default, ") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "autocast", "codes up to 255", "convolution"])
def test_backward_keeps_what_it_kept(name: str) -> None:
    function, inputs = CASES[name]
    gm, multiplied = lowered(function, inputs), lowered(function, inputs)
    lower(multiplied, forced)
    assert sorted(map(str, kept(multiplied).values())) == sorted(map(str, kept(gm).values()))


def plain(x: Tensor, w: Tensor, hint: Tensor, hints: Tensor) -> tuple[Tensor]:
    return (F.linear(x, weight(w, hints)),)


def two_activations(x: Tensor, w: Tensor, hint: Tensor, hints: Tensor) -> tuple[Tensor]:
    return (quantized(x.sin(), hint) @ quantized(w.sin(), hint).t(),)


def per_row(x: Tensor, w: Tensor, hint: Tensor, hints: Tensor) -> tuple[Tensor]:
    return (F.linear(weight(x.sin(), torch.ones(7)), weight(w, hints)),)


def other_kernels(**options: Any) -> Callable[..., Any]:
    return lambda x, w, hint, hints: (F.conv2d(quantized(x.sin(), hint), weight(w, hints), **options),)


STAY: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "float activation": (plain, small()),
    "two activations": (two_activations, small()),
    "a clip for each row of x": (per_row, small()),
    "3 x 3": (other_kernels(), (leaf(2, 8, 5, 5), leaf(4, 8, 3, 3), torch.ones(()), torch.ones(4))),
    "groups": (other_kernels(groups=2), (leaf(2, 8, 5, 5), leaf(4, 4, 1, 1), torch.ones(()), torch.ones(4))),
    "padding": (other_kernels(padding=1), (leaf(2, 8, 5, 5), leaf(4, 8, 1, 1), torch.ones(()), torch.ones(4))),
}


@pytest.mark.parametrize("name", STAY)
def test_what_is_no_matmul_of_levels_stays(name: str) -> None:
    function, inputs = STAY[name]
    gm = lowered(function, inputs)
    text = graph_text(gm.graph)
    assert lower(gm, forced) == []
    assert graph_text(gm.graph) == text


def doubled(x: Tensor, w: Tensor, hint: Tensor, hints: Tensor) -> tuple[Tensor]:
    return (F.linear(quantized(x.double().sin(), hint), weight(w.double(), hints)),)


def cut(x: Tensor, w: Tensor, hint: Tensor, hints: Tensor) -> tuple[Tensor]:
    return (F.linear(quantized(x.sin(), hint).reshape(14, 15), weight(w, hints)),)


def added(x: Tensor, w: Tensor, hint: Tensor, hints: Tensor, other: Tensor) -> tuple[Tensor]:
    return (torch.addmm(other, quantized(x.sin(), hint), weight(w, hints).t()),)


def wide() -> tuple[Tensor, ...]:
    return leaf(2, 65794), leaf(2, 65794), torch.ones(()), torch.ones(2)


def eight(x: Tensor, w: Tensor, hint: Tensor, hints: Tensor) -> tuple[Tensor]:
    return (F.linear(quantized(x.relu(), hint, 8, signed=False), weight(w, hints, 8)),)


DECLINED: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], str]] = {
    "float64": (doubled, small(), "its result is torch.float64"),
    "rows cut in two": (
        cut,
        (leaf(7, 30), leaf(4, 15), torch.ones(()), torch.ones(4)),
        "rows of the matmul are no rows of the quantized tensor",
    ),
    "no bias": (added, (*small(), leaf(7, 4)), "what is added is no bias"),
    "no channels last": (
        other_kernels(),
        (leaf(2, 8, 5, 5), leaf(4, 8, 1, 1), torch.ones(()), torch.ones(4)),
        "its channels do not lie together in memory",
    ),
    "no columns": (linear, (leaf(7, 0), leaf(4, 0), torch.ones(()), torch.ones(4)), "it sums over nothing"),
    "too many columns": (eight, wide(), "sums over K = 65794 may not fit 32 bits, the largest is 65793"),
}


@pytest.mark.parametrize("name", DECLINED)
def test_declined_with_a_reason(name: str) -> None:
    function, inputs, reason = DECLINED[name]
    gm = lowered(function, inputs)
    text = graph_text(gm.graph)
    (edit,) = lower(gm, forced)
    assert edit.declined
    assert edit.detail == reason
    assert graph_text(gm.graph) == text


def test_the_last_k_that_fits_is_multiplied() -> None:
    inputs = (leaf(2, 65793), leaf(2, 65793), torch.ones(()), torch.ones(2))
    (edit,) = lower(lowered(eight, inputs), forced)
    assert not edit.declined


@pytest.mark.parametrize("name", CASES)
def test_nothing_changes_on_a_cpu(name: str) -> None:
    function, inputs = CASES[name]
    gm = lowered(function, inputs)
    text = graph_text(gm.graph)
    assert lower(gm, integer_matmul) == []
    assert graph_text(gm.graph) == text
    assert octav.int_matmul.default not in targets(gm)


@pytest.mark.parametrize("name", CASES)
def test_twice_changes_nothing(name: str) -> None:
    function, inputs = CASES[name]
    gm = lowered(function, inputs)
    lower(gm, forced)
    text = graph_text(gm.graph)
    assert lower(gm, *lower_passes(), forced) == []
    assert graph_text(gm.graph) == text


@pytest.mark.parametrize(
    ("family", "operand", "sizes", "reason"),
    [
        ("sm_90", torch.int8, (4096, 4096, 4096), None),
        ("sm_90", torch.float8_e4m3fn, (4096, 4096, 4096), None),
        ("sm_90", torch.int8, (2048, 1024, 1024), None),
        ("sm_90", torch.int8, (2047, 1024, 1024), "where integers begin to pay"),
        ("sm_90", torch.int8, (4096, 4096, 512), "where integers begin to pay"),
        ("sm_90", torch.int8, (4096, 4096, 4104), "no multiple of 16"),
        ("sm_80", torch.float8_e4m3fn, (4096, 4096, 4096), "no exact sum of float8 is known for sm_80"),
        ("sm_100", torch.int8, (4096, 4096, 4096), "no gain from integers is known for sm_100"),
        ("sm_70", torch.int8, (4096, 4096, 4096), "no gain from integers is known for sm_70"),
    ],
)
def test_what_pays(
    family: str, operand: torch.dtype, sizes: tuple[int, int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "_family", lambda device: family)
    monkeypatch.setattr(configs, "_gpu", lambda device: "one that was not measured")
    found = configs.declined(operand, torch.device("cuda"), *sizes)
    assert found is None if reason is None else reason in str(found)


def test_what_was_measured_says_what_pays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measured, "FILE", tmp_path / "measured.json")
    measured.FILE.write_text("{}")
    small, large, wide = Measured(64, 64, 64, 1.1, 1.2), Measured(4096, 64, 64, 0.7, 0.8), Measured(64, 64, 4096, 0.8)
    measured.write("this", [wide])
    measured.write("other", [])
    measured.write("this", [small, large, wide])
    assert measured.nearest("this", 128, 64, 64) == small
    assert measured.nearest("this", 2048, 64, 64) == large
    assert measured.nearest("other", 64, 64, 64) is None
    assert list(json.loads(measured.FILE.read_text())) == ["other", "this"]

    monkeypatch.setattr(configs, "_family", lambda device: "sm_90")
    monkeypatch.setattr(configs, "_gpu", lambda device: "this")
    cuda = torch.device("cuda")
    assert configs.declined(torch.int8, cuda, 2048, 64, 64) is None
    assert "took 1.1 of bfloat16's time for [64, 64]" in str(configs.declined(torch.int8, cuda, 128, 64, 64))
    # Slower than bfloat16; slower than int8; never measured.
    assert "float8_e4m3fn took 1.2" in str(configs.declined(torch.float8_e4m3fn, cuda, 128, 64, 64))
    assert "int8 took 0.87 of float8's time" in str(configs.declined(torch.float8_e4m3fn, cuda, 4096, 64, 64))
    assert "took None" in str(configs.declined(torch.float8_e4m3fn, cuda, 64, 64, 4096))


IN_FLOAT8 = MatmulKernel("cpu", octav.int_matmul.default, fits_float8, lambda *sizes: None, torch.float8_e4m3fn)


@pytest.mark.parametrize("name", CASES)
def test_codes_of_few_bits_in_float8_give_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, inputs = CASES[name]
    found = []
    for rows in ((IN_FLOAT8, ON_CPU), (ON_CPU,)):
        monkeypatch.setattr(matmuls, "MATMULS", rows)
        gm = lowered(function, inputs)
        found.append((gm, results(gm, inputs)))
    (gm, in_float8), (_, in_int8) = found
    for one, other in zip(in_float8, in_int8, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    # Beyond 16 a float8 holds no odd code.
    for call in map(arguments_of, gm.graph.find_nodes(op="call_function", target=octav.int_matmul.default)):
        fits = largest_k_in_float8(call.x_bits, call.x_signed, call.w_bits) > 0
        dtypes = {operand.meta["val"].dtype for operand in (call.x, call.w)}
        assert dtypes == {torch.float8_e4m3fn if fits else torch.int8}


def test_a_small_matmul_is_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    row = dataclasses.replace(ON_CPU, declined=lambda device, m, n, k: f"{m} x {n} x {k}")
    monkeypatch.setattr(matmuls, "MATMULS", (row,))
    gm = lowered(linear, small())
    (edit,) = lower(gm, integer_matmul)
    assert (edit.node, edit.declined, edit.detail) == ("mm", True, "7 x 4 x 30")


torch.library.define(
    "octav_tests::int_mm",
    "(Tensor x, Tensor x_scale, Tensor w, Tensor w_scale, Tensor? bias, ScalarType dtype) -> Tensor",
)


@torch.library.impl("octav_tests::int_mm", "CompositeExplicitAutograd")
def _(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = torch._int_mm(x, w.t()) * x_scale[:, None] * w_scale
    return (y if bias is None else y + bias).to(dtype)


@torch.library.register_fake("octav_tests::int_mm")
def _(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.new_empty((len(x), len(w)), dtype=dtype)


ROWS = {
    "reference": ON_CPU,
    "another op, signed codes only": MatmulKernel(
        "cpu",
        torch.ops.octav_tests.int_mm.default,
        lambda matmul: fits_int32(matmul) or (None if matmul.x.signed else "unsigned codes"),
        lambda *sizes: None,
    ),
}


def whole(*shape: int) -> Tensor:
    """Integers from -8 to 7, -8 among each row: the largest magnitude is the clip, the step is 1, any sum is exact."""
    x = torch.randint(-8, 8, shape).float()
    x.flatten(1)[:, 0] = -8
    return x


def max_clip(x: Tensor, hint: Tensor, dim: int | None) -> Tensor:
    y: Tensor = octav.dynamic_fake_quantize(x, hint, integers(4, True, dim), "max", "pwl")[0]
    return y


def whole_linear(x: Tensor, w: Tensor, hint: Tensor, hints: Tensor, bias: Tensor) -> tuple[Tensor]:
    return (F.linear(max_clip(x * 1, hint, None), max_clip(w, hints, 0), bias),)


def whole_conv(x: Tensor, w: Tensor, hint: Tensor, hints: Tensor, bias: Tensor) -> tuple[Tensor]:
    return (F.conv2d(max_clip(x * 1, hint, None), max_clip(w, hints, 0), bias),)


WHOLE: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "linear": (whole_linear, (whole(9, 30), whole(4, 30), torch.ones(()), torch.ones(4), whole(1, 4)[0])),
    "1x1 convolution": (
        whole_conv,
        (
            whole(2, 8, 5, 6).to(memory_format=torch.channels_last),
            *(whole(4, 8, 1, 1), torch.ones(()), torch.ones(4), whole(1, 4)[0]),
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", WHOLE)
@pytest.mark.parametrize("row", ROWS)
def test_a_kernel_is_one_row(row: str, case: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    function, inputs = WHOLE[case]
    if training:
        inputs = tuple(tensor.clone().requires_grad_() if i in (0, 1, 4) else tensor for i, tensor in enumerate(inputs))
    before, after = (joint(function, *inputs, trace_joint=training) for _ in range(2))
    lower(before, *lower_passes())
    monkeypatch.setattr(matmuls, "MATMULS", (*matmuls.MATMULS, ROWS[row]))
    lower(after, *lower_passes())
    # The float product is gone, and in inference the levels that it read, too.
    assert len(after.graph.find_nodes(op="call_function", target=ROWS[row].op)) == 1
    assert ROWS[row].op not in targets(before)
    assert training or not {octav.fake_quantize.default, aten.mm.default} & targets(after)
    for found, expected in zip(results(after, inputs), results(before, inputs), strict=True):
        assert (found is None and expected is None) or torch.equal(found, expected)
    assert lower(after, *lower_passes()) == []


def test_the_first_row_that_takes_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmuls, "MATMULS", (ROWS["another op, signed codes only"], ON_CPU))
    gm = lowered(unsigned(4), small())
    assert octav.int_matmul.default in targets(gm)
    monkeypatch.setattr(matmuls, "MATMULS", (ROWS["another op, signed codes only"],))
    (edit,) = [edit for edit in lower(lowered(unsigned(4), small()), integer_matmul) if edit.declined]
    assert edit.detail == "unsigned codes"
