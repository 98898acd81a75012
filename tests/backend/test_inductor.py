"""lowering: compiled code calls the ops into memory that Inductor has planned, whatever the shapes."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.lowering import lowerings
from torch._inductor.utils import run_and_get_code

from octav_fx.backend import inductor
from octav_fx.formats.spec import integers
from octav_fx.ops.dequantize.op import dequantize
from octav_fx.ops.dynamic_fake_quantize.op import dynamic_fake_quantize
from octav_fx.ops.fake_quantize.op import fake_quantize, fake_quantize_backward
from octav_fx.ops.fake_quantize_filters.op import fake_quantize_filters, fake_quantize_filters_backward
from octav_fx.ops.optimal_clip.op import optimal_clip
from octav_fx.ops.quantize.op import quantize
from octav_fx.ops.register import REGISTERED

pytestmark = pytest.mark.compile

OCTAV = ("optimal_clip", "fake_quantize", "fake_quantize_backward", "quantize", "dequantize")
FILTERS = ("fake_quantize_filters", "fake_quantize_filters_backward")


@pytest.fixture(autouse=True)
def registered() -> None:
    torch.compiler.reset()
    inductor.register()


def generated(function: Callable[..., Any], *args: Any) -> tuple[Any, str]:
    """What the compiled function returns, and the code that Inductor made of it."""
    result, codes = run_and_get_code(torch.compile(function, fullgraph=True), *args)
    return result, "\n".join(codes)


def calls(code: str, variant: str) -> set[str]:
    return set(re.findall(rf"torch\.ops\.octav\.(\w+)\.{variant}\(", code))


def every_op(x: Tensor, hint: Tensor, w: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """All of them, of computed tensors and for other computations; none of these rounds."""
    x = x.neg()
    clip = optimal_clip(x, hint, integers(4, True, None), "octav")
    codes = quantize(x, clip, integers(4, True, None))
    y = dequantize(codes, clip * 2, integers(4, True, None), torch.float32) * 2
    z = fake_quantize(y.neg(), clip, integers(4, True, None), "pwl") * 2
    dx = fake_quantize_backward(z, x, clip, integers(4, True, None), "mad")
    filters = w.neg()
    clips = filters.abs().amax((1, 2))
    rows = fake_quantize_filters(filters, clips, integers(4, True, 0))
    dw = fake_quantize_filters_backward(grad, filters, clips, integers(4, True, 0), "mad")
    return codes, y, z, dx, rows, dw


def arguments(count: int) -> tuple[Tensor, ...]:
    # The gradient of filters comes in the layout of a compiled convolution.
    grad = torch.randn(count, 2, 5, 3).permute(0, 3, 1, 2)
    return torch.randn(count, 7), torch.zeros(()), torch.randn(count, 3, 10), grad


def assert_alike(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for found, value in zip(results, expected, strict=True):
        assert (found.shape, found.dtype) == (value.shape, value.dtype)
        assert torch.equal(found, value)


def test_every_op_that_has_an_out_variant_has_a_lowering() -> None:
    assert {*OCTAV, *FILTERS} <= set(REGISTERED)
    assert all(packet.default in lowerings for packet in REGISTERED.values())


def test_registering_twice_does_no_harm() -> None:
    before = {name: lowerings[packet.default] for name, packet in REGISTERED.items()}
    inductor.register()
    assert {name: lowerings[packet.default] for name, packet in REGISTERED.items()} == before


def test_generated_code_calls_the_out_variants() -> None:
    inputs = arguments(6)
    results, code = generated(every_op, *inputs)
    assert calls(code, "out") == {*OCTAV, *FILTERS}
    assert not calls(code, "default")
    assert_alike(results, every_op(*inputs))


def test_one_code_serves_every_size() -> None:
    compiled = torch.compile(every_op, fullgraph=True, dynamic=True)
    _, codes = run_and_get_code(compiled, *arguments(6))
    assert calls("\n".join(codes), "out") == {*OCTAV, *FILTERS}
    with torch.compiler.set_stance("fail_on_recompile"):
        for count in (6, 3, 17):
            inputs = arguments(count)
            assert_alike(compiled(*inputs), every_op(*inputs))


def test_the_numbers_are_those_of_the_ops() -> None:
    # Of the inputs themselves, each in its own layout.
    def function(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        clip = optimal_clip(x, torch.zeros(()), integers(4, True, None), "octav")
        codes = quantize(x, clip, integers(4, True, None))
        clips = optimal_clip(w, torch.zeros(5), integers(4, True, 0), "octav")
        return (
            clip,
            codes,
            dequantize(codes, clip, integers(4, True, None), torch.float32),
            fake_quantize_filters(w, clips, integers(4, True, 0)),
        )

    x, w = torch.randn(8, 3, 5, 5), torch.randn(5, 3, 9)
    results, code = generated(function, x, w)
    assert calls(code, "out") == {"optimal_clip", "quantize", "dequantize", "fake_quantize_filters"}
    for found, expected in zip(results, function(x, w), strict=True):
        assert torch.equal(found, expected)


def test_layouts_stay_what_they_are() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        codes = quantize(x, torch.ones(3), integers(4, True, 1))
        return codes, dequantize(codes, torch.ones(3), integers(4, True, 1), torch.float32)

    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    results, _ = generated(function, x)
    for found, expected in zip(results, function(x), strict=True):
        assert found.stride() == expected.stride()
        assert torch.equal(found, expected)


def test_training_through_the_live_quantizer() -> None:
    def loss(x: Tensor, hint: Tensor) -> Tensor:
        return (dynamic_fake_quantize(x, hint, integers(4, True, None), "octav", "pwl")[0] * 2).sum()

    x = torch.randn(9, 7)
    eager, compiled = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss(eager, torch.zeros(())).backward()
    result, codes = run_and_get_code(lambda: torch.compile(loss, fullgraph=True)(compiled, torch.zeros(())).backward())
    assert result is None
    assert "fake_quantize_backward" in calls("\n".join(codes), "out")
    assert torch.equal(compiled.grad, eager.grad)


def read_codes(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """What backward asks of codes, and makes of a gradient, in another order, too."""
    codes = quantize(x.neg(), x.abs().amax() / 2, integers(8, True, None))
    code = codes.to(torch.float32)
    return torch.where((code >= -128) & (code <= 127), g, 0), torch.where(codes.t().to(torch.float32) > 127, g.t(), 0)


@pytest.mark.parametrize("shape", [(64, 48), (33, 7), (1, 5)])
def test_codes_of_two_bytes_are_read_by_vector_instructions(shape: tuple[int, int]) -> None:
    x, g = torch.randn(shape), torch.randn(shape)
    found, code = generated(read_codes, x, g)
    assert "at::vec::Vectorized<int16_t>" in code or min(shape) == 1
    for result, expected in zip(found, read_codes(x, g), strict=True):
        assert torch.equal(result, expected)


def transposed_codes(x: Tensor) -> Tensor:
    codes = quantize(x, x.abs().amax() / 2, integers(8, True, None))
    return codes.to(memory_format=torch.channels_last)


def test_a_transposed_copy_of_codes_of_two_bytes_writes_no_further_than_its_rows() -> None:
    x = torch.randn(2, 128, 8, 8)
    found, code = generated(transposed_codes, x)
    assert torch.equal(found, transposed_codes(x))
    # A vector of two bytes is as long as two of the rows into which a square is cut; stored whole it wrote beyond them.
    stored = re.findall(r"\.store\(tmp\d+ \+ (.*)\);", code)
    assert stored
    assert all(", static_cast<int64_t>(" in row for row in stored)


def test_what_else_computes_in_two_bytes_is_compiled_as_ever() -> None:
    def function(x: Tensor, clip: Tensor) -> tuple[Tensor, Tensor]:
        return quantize(x, clip, integers(8, True, None)), (x * 100).to(torch.int16) + 1

    x, clip = torch.randn(64), torch.ones(())
    found, code = generated(function, x, clip)
    assert "at::vec::Vectorized<int16_t>" not in code
    for result, expected in zip(found, function(x, clip), strict=True):
        assert torch.equal(result, expected)
