"""write_out: on a GPU the elementwise ops become what they are defined as, and Inductor fuses them."""

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import octav_fx
from benchmarks.absent_gpu import generated, launches, move
from octav_fx.formats.spec import integers
from octav_fx.ir.printer import graph_text
from octav_fx.passes import LOWER, mask_from_codes, save_codes, split_quantizers, write_out
from octav_fx.passes.lower.write_out import REFERENCES
from tests.support.compare import assert_same_bits
from tests.support.joint import after_relu, joint, layer_inputs, lower, targets, unchanged

octav, aten = torch.ops.octav, torch.ops.aten
on_cpu = functools.partial(write_out, device="cpu")


def test_golden() -> None:
    gm = joint(
        lambda x, clip: (octav.dequantize(x, clip, integers(4, True, None), torch.float32),),
        *codes(),
        trace_joint=False,
    )
    assert [(edit.verb, edit.detail) for edit in lower(gm, on_cpu)] == [("write out", "octav.dequantize.default")]
    assert graph_text(gm.graph) == (
        "clamp_min = clamp_min.default(arg0_1, -8)\n"
        "clamp_max = clamp_max.default(clamp_min, 7)\n"
        "convert_element_type = convert_element_type.default(clamp_max, torch.float32)\n"
        "mul_tensor = mul.Tensor(arg1_1, 0.125)\n"
        "mul = mul.Tensor(convert_element_type, mul_tensor)\n"
        "eq = eq.Scalar(arg0_1, -128)\n"
        # A level beyond the dtype is its greatest number.
        "clamp_min_1 = clamp_min.default(mul, -3.4028234663852886e+38)\n"
        "clamp_max_1 = clamp_max.default(clamp_min_1, 3.4028234663852886e+38)\n"
        "scalar_tensor = scalar_tensor.default("
        "nan, dtype=torch.float32, layout=torch.strided, device=device(type='cpu'))\n"
        "where = where.self(eq, scalar_tensor, clamp_max_1)\n"
        "return (where)"
    )


def codes() -> tuple[Tensor, Tensor]:
    return torch.tensor([-128, -9, -8, 0, 7, 8], dtype=torch.int8), torch.tensor(2.0)


def numbers(dtype: torch.dtype) -> Tensor:
    """On both sides of every tie and of the clip, zeros of both signs, and what is not finite."""
    ties = torch.arange(-20, 21) * 0.125
    ends = torch.tensor([0.0, -0.0, 1e-40, math.inf, -math.inf, math.nan])
    return torch.cat([ties, ties.nextafter(torch.tensor(9.0)), torch.randn(88), ends]).reshape(-1, 4).to(dtype)


def arguments(x: Tensor, clip: Tensor, signed: bool, dim: int | None) -> dict[Any, tuple[tuple[Tensor, ...], Any]]:
    """The tensors and the rest of a call of each op."""
    grad, codes, step = torch.randn_like(x), octav.quantize(x, clip, integers(4, signed, dim)), clip / 8
    lsq = (integers(4, signed, dim), "lsq")
    return {
        octav.quantize.default: ((x, clip), (integers(4, signed, dim), 2.0)),
        octav.dequantize.default: ((codes, clip), (integers(4, signed, dim), x.dtype)),
        octav.fake_quantize.default: ((x, clip), (integers(4, signed, dim), "pwl", torch.bfloat16)),
        octav.fake_quantize_backward.default: ((grad, x, clip), (integers(4, signed, dim), "mad")),
        octav.learned_fake_quantize.default: ((x, step), (*lsq, True)),
        octav.learned_fake_quantize_backward.default: ((grad, x, step), lsq),
        octav.learned_parameter_backward.default: ((grad, x, step), (*lsq, True)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [None, 1])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("op", REFERENCES, ids=str)
def test_no_value_changes(op: Any, signed: bool, dim: int | None, dtype: torch.dtype) -> None:
    clip = torch.tensor(1.0) if dim is None else torch.tensor([1.0, 0.3, 2.0, 0.0])
    tensors, rest = arguments(numbers(dtype), clip, signed, dim)[op]
    gm = joint(lambda *of: (op(*of, *rest),), *tensors, trace_joint=False)
    assert [edit.verb for edit in lower(gm, on_cpu)] == ["write out"]
    assert op not in targets(gm)
    (found,) = gm(*tensors)
    assert_same_bits(found, op(*tensors, *rest))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_no_value_of_a_token_changes(axis: int, bits: int, dtype: torch.dtype) -> None:
    x, spec = numbers(dtype), f"int{bits}/token.{axis}"
    clip = torch.rand(*(1 if i == axis else size for i, size in enumerate(x.shape)))
    clip.flatten()[0] = 0
    codes = octav.quantize(x, clip, spec)
    for op, tensors, rest in (
        (octav.quantize.default, (x, clip), (spec, 2.0)),
        (octav.dequantize.default, (codes, clip), (spec, dtype)),
        (octav.fake_quantize.default, (x, clip), (spec, "pwl", torch.bfloat16)),
        (octav.fake_quantize_backward.default, (torch.randn_like(x), x, clip), (spec, "mad")),
    ):
        gm = joint(lambda *of, op=op, rest=rest: (op(*of, *rest),), *tensors, trace_joint=False)
        assert [edit.verb for edit in lower(gm, on_cpu)] == ["write out"]
        assert op not in targets(gm)
        (found,) = gm(*tensors)
        assert_same_bits(found, op(*tensors, *rest))


@pytest.mark.parametrize("spec", ["int4/group-2.1", "int4/token.1/e8m0", "e2m1/token.1"])
def test_other_rows_stay_ops(spec: str) -> None:
    x, clip = torch.randn(3, 4), torch.rand(3, 2 if "group" in spec else 1)
    gm = joint(lambda x, clip: (octav.quantize(x, clip, spec),), x, clip, trace_joint=False)
    assert [edit.verb for edit in lower(gm, on_cpu)] == ["skip"]
    assert octav.quantize.default in targets(gm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("signed", [True, False])
def test_levels_of_codes_that_are_written_here_come_from_the_values(signed: bool, dtype: torch.dtype) -> None:
    x, clip, spec = numbers(dtype), torch.tensor(1.0), integers(4, signed, None)

    def written(x: Tensor, clip: Tensor) -> tuple[Tensor, Tensor]:
        codes = octav.quantize(x, clip, spec)
        return codes, octav.dequantize(codes, clip, spec, dtype)

    gm = joint(written, x, clip, trace_joint=False)
    assert [edit.verb for edit in lower(gm, on_cpu)] == ["write out"] * 2
    (output,) = gm.graph.find_nodes(op="output")
    # No code is read again.
    assert list(output.args[0][0].users) == [output]
    # One quotient for both, in the end: Inductor merges what is equal.
    assert sum(node.target is octav.ratio.default for node in gm.graph.nodes) == 2
    codes, levels = gm(x, clip)
    expected, expected_levels = written(x, clip)
    assert_same_bits(codes, expected)
    # But for the sign of zeros.
    assert torch.equal(levels.nan_to_num(99.0), expected_levels.nan_to_num(99.0))


def test_a_division_by_one_step_is_a_ratio() -> None:
    for dim, op in ((None, octav.ratio.default), (1, octav.divide.default)):
        clip = torch.tensor(1.0) if dim is None else torch.tensor([1.0, 0.3, 2.0, 0.0])
        spec = integers(4, True, dim)
        gm = joint(
            lambda x, clip, s=spec: (octav.quantize(x, clip, s),), numbers(torch.float32), clip, trace_joint=False
        )
        lower(gm, on_cpu)
        assert op in targets(gm)


def test_every_op_is_tried() -> None:
    assert set(REFERENCES) == set(arguments(numbers(torch.float32), torch.tensor(1.0), True, None))


def test_a_layer() -> None:
    inputs = layer_inputs()
    gm = joint(after_relu, *inputs)
    edits = unchanged(gm, inputs, split_quantizers, save_codes, mask_from_codes, on_cpu)
    assert sum(edit.verb == "write out" for edit in edits) == 2
    assert not targets(gm).intersection(REFERENCES)
    assert lower(gm, on_cpu) == []


def test_a_cpu_keeps_the_ops() -> None:
    gm = joint(after_relu, *layer_inputs())
    lower(gm, split_quantizers, save_codes)
    before = graph_text(gm.graph)
    assert lower(gm, write_out) == []
    assert graph_text(gm.graph) == before


def test_so_does_a_gpu_without_the_division(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = joint(after_relu, *layer_inputs())
    lower(gm, split_quantizers, save_codes)
    move(gm.graph)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert lower(gm, write_out) == []


@pytest.mark.compile
def test_inductor_makes_one_kernel_of_codes_levels_and_conversions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    x = torch.randn(256, 64)
    q = octav_fx.quantize(model, x)
    assert write_out not in LOWER
    forward, backward = map(launches, generated(q, x, autocast=True))
    plain, plain_backward = map(launches, generated(model, x, backend=None, autocast=True))
    # Two activations and two weights. Beyond the float step: a kernel of codes and levels for each activation, the
    # solves of both, all weights at once in place of a conversion each, and all states in three.
    assert forward.ops == ["optimal_clip", "fake_quantize_weights", "optimal_clip"]
    assert len(forward.kernels) == len(plain.kernels) - 2 + 2 + 3
    # Levels of two activations and of one weight again; masks and the conversion of gradients are in kernels that are
    # there anyway.
    assert backward.ops == []
    assert len(backward.kernels) <= len(plain_backward.kernels) + 3
