"""The elementwise kernels in Triton over tokens and groups, against their definitions: equal to the bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octav_fx.formats.spec import spec_of
from octav_fx.ops.dequantize import reference as of_dequantize
from octav_fx.ops.fake_quantize import reference as of_fake_quantize
from octav_fx.ops.quantize import reference as of_quantize
from tests.support.compare import assert_same_bits
from tests.support.examples import examples
from tests.support.interpreter import DEVICE, poisoned, small_block
from tests.support.strategies import FORMS, specs, tensors

fake_quantize = pytest.importorskip("octav_fx.ops.fake_quantize.kernel")
quantize = pytest.importorskip("octav_fx.ops.quantize.kernel")
dequantize = pytest.importorskip("octav_fx.ops.dequantize.kernel")

pytestmark = pytest.mark.gpu


def clip_for(x: torch.Tensor, spec: str) -> torch.Tensor:
    values = torch.tensor([1.0, 0.7, 3.3, 0.0, 1e-40])
    return values[torch.randint(len(values), spec_of(spec).clip_shape(x.shape))].to(DEVICE)


@examples(80)
@given(data=st.data())
def test_levels_and_codes_of_every_format_are_their_references(data):
    x = data.draw(tensors(fake_quantize.FLOATS)).to(DEVICE)
    spec = data.draw(specs(x, FORMS, ["float32", "e8m0"]))
    clip, size = clip_for(x, spec), small_block(x)
    out, codes = poisoned(x), poisoned(x, spec_of(spec).format.codes_dtype)
    assert fake_quantize.fake_quantize(x, clip, spec, "pwl", out=out, block=size)
    assert_same_bits(out, of_fake_quantize.fake_quantize(x, clip, spec, "pwl"))
    assert quantize.quantize(x, clip, spec, out=codes, block=size)
    assert torch.equal(codes, of_quantize.quantize(x, clip, spec))
    again = poisoned(codes, x.dtype)
    assert dequantize.dequantize(codes, clip, spec, x.dtype, out=again, block=size)
    assert_same_bits(again, of_dequantize.dequantize(codes, clip, spec, x.dtype))


def test_levels_found_in_a_tensor_are_read():
    x, spec = torch.randn(40, 33, device=DEVICE), "kmeans3/tensor"
    for levels in (torch.randn(8).sort().values, torch.zeros(8)):
        out = poisoned(x)
        assert fake_quantize.fake_quantize(x, levels.to(DEVICE), spec, "pwl", out=out)
        assert_same_bits(out, of_fake_quantize.fake_quantize(x, levels.to(DEVICE), spec, "pwl"))


@examples(40)
@given(data=st.data())
def test_gradients_of_every_format_are_their_references(data):
    x = data.draw(tensors(fake_quantize.FLOATS)).to(DEVICE)
    spec, gradient = data.draw(specs(x, FORMS, ["float32"])), data.draw(st.sampled_from(["pwl", "mad"]))
    clip, grad = clip_for(x, spec), torch.randn(x.shape, device=DEVICE).to(x.dtype)
    out = poisoned(x)
    assert fake_quantize.fake_quantize_backward(grad, x, clip, spec, gradient, out=out, block=small_block(x))
    assert_same_bits(out, of_fake_quantize.fake_quantize_backward(grad, x, clip, spec, gradient))
