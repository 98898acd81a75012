"""product_of_codes: sums of products of codes are exact, on either way through oneDNN; nothing is left unwritten."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octav_fx.compat.tensors import memory_format_of
from octav_fx.formats.grid import Grid
from octav_fx.formats.spec import integers
from octav_fx.ops import cpu, onednn
from octav_fx.ops.product_of_codes import choice, op, reference
from octav_fx.ops.product_of_codes.choice import Layer
from octav_fx.ops.product_of_codes.op import product_of_codes
from tests.support.integers import needs_onednn

octav = torch.ops.octav


@pytest.fixture
def memory_of_nan() -> Iterator[None]:
    """Memory that nobody has written yet reads as NaN, or as the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def call(x: Tensor, w: Tensor, bits: int, signed: bool, bias: Tensor | None, dtype: torch.dtype, *window: Any) -> tuple:
    """The arguments of product_of_codes, with clips that cut some values."""
    spec, w_spec = integers(bits, signed, None), integers(bits, True, 0)
    clip, clips = x.abs().amax() * 0.7, w.flatten(1).abs().amax(1) * 0.9
    codes = octav.quantize(x, clip, spec, None)
    return codes, clip, spec, w, clips, w_spec, bias, *(window or ([], [], [], 1)), dtype


@st.composite
def convolutions(draw: st.DrawFn) -> tuple:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    groups, inputs = draw(st.sampled_from([(1, 1), (1, 3), (1, 16), (2, 4), (4, 16)]))
    kernel, stride, dilation = ([draw(st.integers(1, most)) for _ in range(2)] for most in (3, 3, 2))
    # Where a filter fits into the padding oneDNN is wrong, and grouped ones have no other way: choice.refusal.
    extents = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    padding = [draw(st.integers(0, 2 if groups == 1 else extent - 1)) for extent in extents]
    x = torch.randn(2, groups * inputs, *[extent + draw(st.integers(0, 5)) for extent in extents], generator=generator)
    w = torch.randn(groups * draw(st.sampled_from([1, 5, 16])), inputs, *kernel, generator=generator)
    bias = torch.randn(len(w), generator=generator) if draw(st.booleans()) else None
    layout = draw(st.sampled_from([torch.contiguous_format, torch.channels_last]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    return x.to(memory_format=layout), w, draw(st.integers(2, 8)), bias, dtype, stride, padding, dilation, groups


@needs_onednn
@pytest.mark.usefixtures("memory_of_nan")
@given(convolutions(), st.booleans(), st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_convolution_is_the_reference_bit_for_bit(case: tuple, signed: bool, matmul: bool) -> None:
    x, w, bits, bias, dtype, *window = case
    arguments = call(x if signed else x.relu(), w, bits, signed, bias, dtype, *window)
    with pytest.MonkeyPatch.context() as patch:
        # Each of the two ways, whichever is faster.
        patch.setattr(choice, "_LAID_OUT", math.inf if matmul else 0.0)
        y = product_of_codes(*arguments)
    expected = reference.product_of_codes(*arguments)
    assert y.is_contiguous(memory_format=memory_format_of(arguments[0]))
    assert y.dtype is dtype
    assert torch.equal(y, expected)


@needs_onednn
@pytest.mark.usefixtures("memory_of_nan")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("signed", [True, False])
# Also more rows than are multiplied at once.
@pytest.mark.parametrize(("rows", "width", "out"), [(1, 1, 1), (7, 30, 4), (300, 12, 900)])
def test_a_linear_layer_too(rows: int, width: int, out: int, signed: bool, bits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, width)
    arguments = call(x if signed else x.relu(), torch.randn(out, width), bits, signed, torch.randn(out), dtype)
    assert torch.equal(product_of_codes(*arguments), reference.product_of_codes(*arguments))


@needs_onednn
def test_codes_that_are_marked_for_backward_are_those_of_the_grid() -> None:
    """Beyond the clip, zero, and raised at a ceiling: see quantize."""
    x = torch.tensor([[0.0, 0.5, 5.9, 6.0, 9.0, -1.0]])
    spec, w = integers(4, False, None), torch.eye(6)
    codes = octav.quantize(x, torch.tensor(8.0), spec, 6.0)
    assert codes.tolist() == [[-1, 1, 12, 44, 48, -2]]
    arguments = (codes, torch.tensor(8.0), spec, w, torch.ones(6), integers(4, True, 0), None, [], [], [], 1)
    y = product_of_codes(*arguments, torch.float32)
    # Of a clip of 1 and eight steps, 1 itself is cut to 7 / 8.
    assert torch.equal(y, torch.tensor([[0.0, 0.5, 6.0, 6.0, 7.5, 0.0]]) * 7 / 8)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_is_nan_in_all_that_reads_it_and_in_nothing_else(bits: int, value: float) -> None:
    torch.manual_seed(0)
    window = [1, 1], [1, 1], [1, 1], 1
    x, w = torch.randn(2, 4, 6, 6), torch.randn(5, 4, 3, 3)
    _, clip, spec, _, clips, w_spec, *rest = call(x, w, bits, True, None, torch.float32, *window)
    x[1, 2, 0, 0], w[3, 1, 1, 1] = value, value
    y = product_of_codes(octav.quantize(x, clip, spec, None), clip, spec, w, clips, w_spec, *rest)
    expected = torch.nn.functional.conv2d(
        octav.fake_quantize(x, clip, spec, "ste") * 0, octav.fake_quantize(w, clips, w_spec, "ste") * 0, None, *window
    )
    assert torch.equal(y.isnan(), expected.isnan())
    assert y.isnan().any() and not y.isnan().all()


@needs_onednn
def test_a_clip_of_zero_and_nothing_at_all() -> None:
    codes, _, spec, w, clips, w_spec, *rest = call(torch.randn(3, 4), torch.randn(2, 4), 4, True, None, torch.float32)
    y = product_of_codes(codes * 0, torch.tensor(0.0), spec, w, clips * 0, w_spec, *rest)
    assert torch.equal(y, torch.zeros(3, 2))
    assert product_of_codes(codes[:0], torch.tensor(1.0), spec, w, clips, w_spec, *rest).shape == (0, 2)


def test_without_passes_or_codes_of_a_byte_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = call(torch.randn(3, 4), torch.randn(2, 4), 4, True, None, torch.float32)
    expected = reference.product_of_codes(*arguments)
    monkeypatch.setattr(cpu, "library", lambda: None)
    assert torch.equal(product_of_codes(*arguments), expected)


SMALL, LARGE = Layer(1024, (256, 256)), Layer(36864, (64, 64, 3, 3), (1, 1), (1, 1))
REFUSALS: dict[str, tuple[Layer, Grid, Grid, torch.dtype, str]] = {
    "float64": (SMALL, Grid(4, True), Grid(4, True), torch.float64, "its result is torch.float64"),
    "unsigned weight": (SMALL, Grid(4, True), Grid(4, False), torch.float32, "have no sign"),
    "long sums": (Layer(9, (2, 65794)), Grid(8, False), Grid(8, True), torch.float32, "65794 products"),
    "depthwise": (
        Layer(36864, (64, 1, 3, 3), (1, 1), (1, 1), 64),
        *(Grid(4, True), Grid(4, True), torch.float32, "no integer convolution that is right"),
    ),
    "grouped, and filters fit into the padding": (
        Layer(36864, (64, 4, 1, 1), (1, 1), (1, 1), 16),
        *(Grid(4, True), Grid(4, True), torch.float32, "no integer convolution that is right"),
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_multiplied(name: str) -> None:
    layer, x, w, dtype, message = REFUSALS[name]
    assert message in str(choice.refusal(layer, x, w, dtype))


@needs_onednn
def test_a_cpu_without_vnni_multiplies_what_cannot_overflow_and_by_convolution_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choice, "has_vnni", lambda: False)
    monkeypatch.setattr(onednn, "largest_product", lambda: (2**15 - 1) // 2)
    four, eight = Grid(4, True), Grid(8, True)
    assert choice.refusal(LARGE, four, four, torch.float32) is None
    assert "saturate in 16 bits" in str(choice.refusal(LARGE, eight, eight, torch.float32))
    assert "no VNNI" in str(choice.refusal(SMALL, four, four, torch.float32))
    assert "padding" in str(choice.refusal(Layer(9, (8, 8, 1, 1), (1, 1), (1, 1)), four, four, torch.float32))


@pytest.mark.parametrize(
    ("layer", "dtype", "gains"),
    [
        (LARGE, torch.float32, True),
        (SMALL, torch.float32, True),
        (Layer(16, (256, 256)), torch.float32, False),
        (Layer(1024, (256, 1024)), torch.bfloat16, True),
        # Few sums of products for each number written.
        (Layer(36864, (96, 16, 1, 1), (0, 0), (1, 1)), torch.float32, False),
    ],
)
def test_what_pays(layer: Layer, dtype: torch.dtype, gains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "has_vnni", lambda: True)
    assert (choice.loss(layer, dtype) is None) == gains


@needs_onednn
def test_large_images_are_convolved_and_small_ones_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "has_vnni", lambda: True)
    assert LARGE.is_convolved
    assert not Layer(144, (512, 512, 3, 3), (1, 1), (1, 1)).is_convolved
    assert not Layer(36864, (64, 64, 1, 1), (0, 0), (1, 1)).is_convolved


def test_tracing_is_told_the_shape_and_the_layout() -> None:
    arguments = call(
        torch.randn(2, 3, 9, 7), torch.randn(4, 3, 3, 3), 4, True, None, torch.bfloat16, [2, 1], [1, 0], [1, 2], 1
    )
    y = product_of_codes(*arguments)
    empty = op._empty(*arguments)
    assert (empty.shape, empty.stride(), empty.dtype) == (y.shape, y.stride(), y.dtype)
    torch.library.opcheck(product_of_codes.default, arguments, test_utils=("test_schema", "test_faketensor"))
