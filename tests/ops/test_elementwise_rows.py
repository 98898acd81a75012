"""The elementwise passes over rows and over every format, in C++, against their definitions: equal to the bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.least import least_time
from octav_fx.formats.registry import CODEBOOKS, format_of
from octav_fx.formats.spec import spec_of
from octav_fx.ops.dequantize import reference as of_dequantize
from octav_fx.ops.dequantize.op import dequantize
from octav_fx.ops.fake_quantize import reference as of_fake_quantize
from octav_fx.ops.fake_quantize.op import fake_quantize, fake_quantize_backward
from octav_fx.ops.levels import levels_of
from octav_fx.ops.quantize import reference as of_quantize
from octav_fx.ops.quantize.op import quantize
from tests.support.compare import assert_same_bits
from tests.support.examples import examples
from tests.support.strategies import FORMS, NATIVE, every_number, filled_with_nan, specs, tensors

ALL = ["int2", "int4", "uint4", "int8", "uint8", "int8-narrow", *CODEBOOKS]


@pytest.mark.slow
@examples(300)
@given(data=st.data())
def test_each_pass_is_its_reference_bit_for_bit(kernels, data):
    x = data.draw(tensors(NATIVE))
    spec = data.draw(specs(x, FORMS, ["float32"]))
    shape = spec_of(spec).granularity.clip_shape(x.shape)
    values = torch.tensor([1.0, 0.7, 3.3, 0.0, 1e-40])
    clip = values[torch.randint(len(values), shape)]
    gradient, dtype = data.draw(st.sampled_from(["pwl", "mad"])), data.draw(st.sampled_from(NATIVE))
    grad = torch.randn(x.shape).to(dtype)
    with filled_with_nan():
        levels = fake_quantize(x, clip, spec, gradient, dtype)
        codes = quantize(x, clip, spec)
        again = dequantize(codes, clip, spec, dtype)
        factors = fake_quantize_backward(grad, x, clip, spec, gradient)
    assert_same_bits(levels, of_fake_quantize.fake_quantize(x, clip, spec, gradient, dtype))
    assert torch.equal(codes, of_quantize.quantize(x, clip, spec))
    assert_same_bits(again, of_dequantize.dequantize(codes, clip, spec, dtype))
    assert_same_bits(factors, of_fake_quantize.fake_quantize_backward(grad, x, clip, spec, gradient))


@pytest.mark.parametrize("dtype", NATIVE)
@pytest.mark.parametrize("form", ALL)
def test_every_number_has_the_level_and_the_code_of_the_reference(kernel_calls, dtype, form):
    x, spec = every_number(dtype), f"{form}/tensor"
    for clip in (torch.tensor(0.7), torch.tensor(1e-6), torch.tensor(3e4)):
        expected = of_fake_quantize.fake_quantize(x, clip, spec, "pwl")
        assert_same_bits(fake_quantize(x, clip, spec, "pwl"), expected)
        codes = quantize(x, clip, spec)
        assert torch.equal(codes, of_quantize.quantize(x, clip, spec))
        assert_same_bits(dequantize(codes, clip, spec, dtype), of_dequantize.dequantize(codes, clip, spec, dtype))
    assert kernel_calls == ["octav_fake_quantize", "octav_quantize", "octav_dequantize"] * 3


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 0, 2, 1)])
@pytest.mark.parametrize("shared", ["token.3", "group-2.2", "token.0"])
def test_rows_in_any_order_reach_the_kernels(kernel_calls, order, shared):
    x, spec = (
        torch.randn(2, 3, 4, 5).permute(order).contiguous().permute([order.index(i) for i in range(4)]),
        f"int4/{shared}",
    )
    clip = torch.rand(spec_of(spec).granularity.clip_shape(x.shape)) + 0.5
    y = fake_quantize(x, clip, spec, "pwl")
    assert torch.equal(y, of_fake_quantize.fake_quantize(x, clip, spec, "pwl"))
    assert y.stride() == x.stride()
    assert kernel_calls == ["octav_fake_quantize"]


@pytest.mark.parametrize("dtype", NATIVE)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_found_in_a_tensor_reach_the_kernels(kernel_calls, dtype, bits):
    x, spec = torch.randn(40, 33).to(dtype), f"kmeans{bits}/tensor"
    # Equal ones, as for a tensor of few values.
    for levels in (torch.randn(2**bits).sort().values, torch.arange(2**bits).div(3, rounding_mode="floor") - 1.0):
        y, codes = fake_quantize(x, levels, spec, "pwl"), quantize(x, levels, spec)
        assert_same_bits(y, of_fake_quantize.fake_quantize(x, levels, spec, "pwl"))
        assert torch.equal(codes, of_quantize.quantize(x, levels, spec))
        assert_same_bits(dequantize(codes, levels, spec, dtype), of_dequantize.dequantize(codes, levels, spec, dtype))
        factors = fake_quantize_backward(x, x, levels, spec, "mad")
        assert_same_bits(factors, of_fake_quantize.fake_quantize_backward(x, x, levels, spec, "mad"))
    passes = ["octav_fake_quantize", "octav_quantize", "octav_dequantize", "octav_fake_quantize_backward"]
    assert kernel_calls == passes * 2


def test_no_element_is_left_out_of_many_rows(kernels, threads):
    x, spec = torch.randn(3001, 64), "int4/group-32.1"
    clip = torch.rand(3001, 2) + 0.5
    for count in (1, 2):
        threads(count)
        with filled_with_nan():
            assert torch.equal(
                fake_quantize(x, clip, spec, "pwl"), of_fake_quantize.fake_quantize(x, clip, spec, "pwl")
            )


@pytest.mark.parametrize("dtype", NATIVE)
@pytest.mark.parametrize("shape", [(3, 40_000), (33, 7), (5, 1)])
def test_channels_side_by_side(kernel_calls, dtype, shape):
    x, spec = torch.randn(shape).to(dtype), "int4/channel.1"
    clip = torch.tensor([1.0, 0.0, 0.3]).repeat(shape[1])[: shape[1]]
    with filled_with_nan():
        y, codes = fake_quantize(x, clip, spec, "mad"), quantize(x, clip, spec)
        levels, factors = dequantize(codes, clip, spec, dtype), fake_quantize_backward(x, x, clip, spec, "mad")
    assert_same_bits(y, of_fake_quantize.fake_quantize(x, clip, spec, "mad"))
    assert torch.equal(codes, of_quantize.quantize(x, clip, spec))
    assert_same_bits(levels, of_dequantize.dequantize(codes, clip, spec, dtype))
    assert_same_bits(factors, of_fake_quantize.fake_quantize_backward(x, x, clip, spec, "mad"))
    assert kernel_calls == ["octav_fake_quantize", "octav_quantize", "octav_dequantize", "octav_fake_quantize_backward"]


def test_channels_side_by_side_take_no_longer_than_rows(kernels, threads):
    threads(1)
    x, clip = torch.randn(256, 256), torch.ones(256)
    rows, columns = (
        least_time(lambda spec=f"int4/channel.{axis}": fake_quantize(x, clip, spec, "mad")) for axis in range(2)
    )
    # Both read and write the same; a call for every element takes 15 to 25 times as long.
    assert columns < 4 * rows


@pytest.mark.parametrize("form", ALL)
def test_the_passes_know_every_format(form):
    assert levels_of(format_of(form)) is not None
