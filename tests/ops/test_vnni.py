"""The C++ passes that multiply codes: the bits of oneDNN, in any number of threads, and what they are given."""

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octav_fx.formats.grid import Grid
from octav_fx.formats.packing import pack
from octav_fx.nn import IntegerBias, StaticQuantizer
from octav_fx.nn.integer_rule import Rescale
from octav_fx.ops import onednn, vnni
from octav_fx.ops.integer_conv import op as conv
from octav_fx.ops.integer_conv import reference
from octav_fx.ops.integer_linear import op as linear
from octav_fx.ops.integer_linear import reference as linear_reference
from tests.support.integers import ends, needs_onednn, numbers

needs_vnni = pytest.mark.skipif(vnni.library() is None, reason="no AVX-512 with VNNI, or no C++ compiler")


def layer(rows: int, columns: int, channels: int, step: torch.Tensor | None) -> tuple:
    x = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    w = torch.randint(-128, 128, (channels, columns), dtype=torch.int8)
    scale, bias = torch.rand(channels) * 1e-3, torch.randn(channels)
    return x, torch.tensor(0.4), 8, True, w, scale, [channels, columns], bias, -0.3, 3.0, step, 8, True


@needs_vnni
@needs_onednn
@pytest.mark.parametrize("step", [None, torch.tensor(0.02)])
# Strips of rows that are not full, blocks of channels that are not, and more rows than are kept near.
@pytest.mark.parametrize("shape", [(5, 8, 3), (29, 64, 144), (1000, 96, 24), (2000, 260, 80)])
def test_it_is_what_onednn_computes(shape, step, monkeypatch):
    arguments = layer(*shape, step)
    found = linear.rows_run(linear.Call(*arguments))(arguments[0])
    monkeypatch.setattr(vnni, "library", lambda: None)
    assert torch.equal(found, linear.rows_run(linear.Call(*arguments))(arguments[0]))
    assert found.float().std() > 0


@needs_vnni
@pytest.mark.parametrize("threads", [2, 5])
def test_threads_share_rows_and_channels(threads, monkeypatch):
    arguments = layer(700, 64, 200, torch.tensor(0.02))
    run = linear.rows_run(linear.Call(*arguments))
    expected = run(arguments[0])
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert torch.equal(run(arguments[0]), expected)


@st.composite
def depthwise(draw: st.DrawFn) -> tuple:
    """The arguments of integer_conv for a filter of each channel, with codes as results."""
    generator, channels = torch.Generator().manual_seed(draw(st.integers(0, 2**31))), 16 * draw(st.integers(1, 13))
    pairs = [draw(st.lists(st.integers(low, high), min_size=2, max_size=2)) for low, high in ((1, 5), (1, 3), (1, 2))]
    padding = draw(st.lists(st.integers(0, 3), min_size=2, max_size=2))
    kernel, stride, dilation = pairs
    size = [draw(st.integers(extent, 11)) for extent in onednn.extents(kernel, dilation)]
    x = torch.randint(0, 256, (2, channels, *size), generator=generator).to(torch.uint8)
    if draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    w = torch.randint(-128, 128, (channels, 1, *kernel), generator=generator).to(torch.int8)
    bias = numbers(generator, channels) if draw(st.booleans()) else None
    end = (None, draw(st.sampled_from([None, 6.0])), torch.tensor(0.03), draw(st.integers(2, 8)), draw(st.booleans()))
    scales = torch.tensor(0.4), 8, draw(st.booleans()), w, 1e-2 * numbers(generator, channels)
    return x, *scales, list(w.shape), bias, stride, padding, dilation, channels, *end


@pytest.mark.slow
@needs_vnni
@needs_onednn
@settings(max_examples=150)
@given(given=depthwise(), threads=st.sampled_from([1, 3]))
def test_depthwise_is_the_reference_bit_for_bit(given, threads):
    run = conv._depthwise(conv.Call(*given))
    assert run is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        y = run(given[0])
    assert torch.equal(y, reference.integer_conv(*given))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_what_belongs_to_channels_is_dealt_in_fours():
    x = torch.arange(112 * 4).reshape(112, 4)
    found = vnni.dealt(x, 4).reshape(3, 4, 4, 4, 4)
    # Third four of the second sixteen of 64; of 32 at both places; of 16 at each of four.
    assert torch.equal(found[0, 2, 1], x[24:28])
    assert torch.equal(found[1, 2, 1], x[88:92])
    assert torch.equal(found[1, 2, 3], x[88:92])
    assert all(torch.equal(found[2, 2, i], x[104:108]) for i in range(4))
    assert torch.equal(vnni.dealt(x[:, 0]).reshape(3, 4, 4, 4)[0, 2, 1], x[24:28, 0])


def test_weights_lie_in_fours_of_codes_and_blocks_of_64_rows():
    w = torch.arange(66 * 8).remainder(256).to(torch.int8).reshape(66, 8)
    found = vnni.packed(w)
    first, last = found[: 64 * 8].reshape(2, 64, 4), found[64 * 8 :].reshape(2, 16, 4)
    assert torch.equal(first[1, 5], w[5, 4:])
    assert torch.equal(last[0, :2], w[64:, :4])
    assert not last[:, 2:].any()


def test_the_bounds_of_codes_are_those_of_a_clamp_and_a_grid():
    step = torch.tensor(0.5)
    floats, integers = (functools.partial(_ending, bias) for bias in (None, torch.zeros(1, dtype=torch.int32)))
    assert floats(None, None, step, 8, False) == (False, 2.0, 0.0, 0.0, 255.0, 0)
    assert floats(0.0, 2.0, step, 4, True) == (False, 2.0, 8.0, 8.0, 12.0, 0)
    # A clamp beyond the grid, on either side.
    assert floats(-9.0, 9.0, step, 4, True) == (False, 2.0, 8.0, 0.0, 15.0, 0)
    assert floats(None, -9.0, step, 4, False) == (False, 2.0, 0.0, 0.0, 0.0, 0)
    assert floats(None, 6.0, None, 8, False) == (True, 1.0, 0.0, -float("inf"), 6.0, 0)
    # In steps, and rounded before they are counted from the lowest.
    assert integers(0.0, 2.0, step, 4, True) == (False, 1.0, 0.0, 0.0, 4.0, 8)
    assert integers(-9.0, None, step, 4, True) == (False, 1.0, 0.0, -8.0, 7.0, 8)
    assert integers(None, 6.0, None, 8, False) == (True, 1.0, 0.0, -float("inf"), 6.0, 0)


def _ending(bias: torch.Tensor | None, *args: Any) -> tuple[Any, ...]:
    names = ("low", "high", "step", "bits", "signed")
    return vnni.ending(SimpleNamespace(bias=bias, **dict(zip(names, args, strict=True))))


@st.composite
def with_integer_bias(draw: st.DrawFn) -> tuple[tuple, tuple]:
    """The operands and the window of a linear layer, or of a depthwise or pointwise convolution; then the rest."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x_bits, w_bits, channels = draw(st.integers(2, 8)), draw(st.integers(2, 8)), draw(st.sampled_from([16, 48]))
    shape, places, window = draw(
        st.sampled_from(
            [
                ([channels, 20], (7, 20), ()),
                ([channels, 20, 1, 1], (2, 20, 3, 5), ([1, 1], [0, 0], [1, 1], 1)),
                ([channels, 1, 3, 3], (2, channels, 5, 4), ([1, 2], [1, 1], [1, 1], channels)),
            ]
        )
    )
    steps, low = 2 ** (w_bits - 1), -(2 ** (w_bits - 1))
    x = torch.randint(0, 2**x_bits, places, generator=generator).to(torch.uint8)
    w = torch.randint(low, steps, shape, generator=generator).to(torch.int8)
    fraction = draw(st.integers(0, 8 - w_bits))
    bias = torch.randint(-(2**14), 2**14, (channels,), generator=generator).to(torch.int32)
    scales = numbers(generator).abs(), numbers(generator, channels)
    operands = x, scales[0], x_bits, draw(st.booleans()), pack(w) if w_bits <= 4 else w, scales[1], shape, bias
    # The depthwise pass returns codes alone.
    low_end, high_end, step, *grid = draw(ends().filter(lambda end: shape[1:] != [1, 3, 3] or end[2] is not None))
    return (*operands, *window), (low_end, high_end, step, *grid, fraction)


@needs_vnni
@settings(max_examples=150)
@given(given=with_integer_bias(), threads=st.sampled_from([1, 3]))
def test_an_integer_bias_is_part_of_the_sum_bit_for_bit(given, threads):
    operands, rest = given
    is_linear = len(operands) == 8
    layer = linear.integer_linear if is_linear else conv.integer_conv
    definition = linear_reference.integer_linear if is_linear else reference.integer_conv
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    y = layer(*operands, *rest)
    torch.set_num_threads(before)
    assert torch.equal(y, definition(*operands, *rest))


@settings(max_examples=60)
@given(given=with_integer_bias())
def test_the_definition_is_that_of_a_frozen_model(given):
    (x, x_scale, x_bits, x_signed, w, w_scale, shape, bias, *window), (_, _, step, bits, signed, fraction) = given
    if window:
        return
    made = IntegerBias(torch.zeros(len(bias)), x_scale * w_scale, fraction)
    made.codes = bias
    sums = (x.double() + Grid(x_bits, x_signed).low) @ onednn.integers(w, tuple(shape)).double().t()
    found = linear_reference.integer_linear(
        *(x, x_scale, x_bits, x_signed, w, w_scale, shape, bias), None, None, step, bits, signed, fraction
    )
    if step is None:
        assert torch.equal(found, Rescale(made, -1, None)(sums))
        return
    quantizer = StaticQuantizer(torch.ones(()), bits, signed, None)
    quantizer.scale, quantizer.in_steps = step, True
    levels = quantizer(Rescale(made, -1, quantizer)(sums))
    assert torch.equal((found.float() + Grid(bits, signed).low) * step, levels)
