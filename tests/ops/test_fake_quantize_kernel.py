import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octav_fx.formats.granularity import clip_shape
from octav_fx.formats.spec import integers
from octav_fx.ops.fake_quantize import reference
from tests.support.compare import assert_same_bits
from tests.support.examples import examples
from tests.support.interpreter import DEVICE, poisoned, small_block
from tests.support.strategies import axes, clips, tensors

kernel = pytest.importorskip("octav_fx.ops.fake_quantize.kernel")

pytestmark = pytest.mark.gpu
GRADIENTS = ["pwl", "mad"]


@examples(60)
@given(data=st.data())
def test_it_is_the_reference_bit_for_bit(data):
    x = data.draw(tensors(kernel.FLOATS)).to(DEVICE)
    dim = data.draw(axes(x))
    clip, bits, signed = data.draw(clips(x, dim)).to(DEVICE), data.draw(st.integers(2, 8)), data.draw(st.booleans())
    out = poisoned(x)
    assert kernel.fake_quantize(x, clip, integers(bits, signed, dim), "pwl", out=out, block=small_block(x))
    assert_same_bits(out, reference.fake_quantize(x, clip, integers(bits, signed, dim), "pwl"))


@examples(60)
@given(data=st.data())
def test_the_gradient_is_the_reference_bit_for_bit(data):
    x = data.draw(tensors(kernel.FLOATS)).to(DEVICE)
    dim, gradient = data.draw(axes(x)), data.draw(st.sampled_from(GRADIENTS))
    clip, signed = data.draw(clips(x, dim)).to(DEVICE), data.draw(st.booleans())
    grad = torch.randn(x.shape, dtype=data.draw(st.sampled_from([x.dtype, torch.float32])), device=DEVICE)
    if x.dim():
        # Autograd hands over gradients that lie otherwise than x, or are expanded.
        moved = grad.movedim(0, -1).contiguous().movedim(-1, 0)
        grad = data.draw(st.sampled_from([grad, moved, grad[:1].expand_as(x)]))
    out = poisoned(x, x.dtype)
    assert kernel.fake_quantize_backward(
        grad, x, clip, integers(4, signed, dim), gradient, out=out, block=small_block(x)
    )
    assert_same_bits(out, reference.fake_quantize_backward(grad, x, clip, integers(4, signed, dim), gradient))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dim", [None, 1])
def test_offsets_of_64_bits_reach_the_same_elements(monkeypatch, wide, dim):
    launches = []

    class Recorded:
        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                launches.append(grid)
                return launched[grid](*args, **{**kwargs, "WIDE": wide})

            return launch

    launched = kernel.fake_quantize_kernel
    monkeypatch.setattr(kernel, "fake_quantize_kernel", Recorded())
    x = torch.randn(3, 5, 7, device=DEVICE)
    clip, out = torch.rand(clip_shape(x, dim), device=DEVICE) + 0.5, poisoned(x)
    assert kernel.fake_quantize(x, clip, integers(4, True, dim), "pwl", out=out, block=32)
    assert_same_bits(out, reference.fake_quantize(x, clip, integers(4, True, dim), "pwl"))
    assert launches == [(4,)]


def test_far_apart_elements_are_found():
    # A gap of 2 MB between neighbours.
    x = torch.randn(7 * 2**19, device=DEVICE).as_strided((7,), (2**19,))
    clip, out = torch.tensor(1.0, device=DEVICE), torch.full((7,), math.nan, device=DEVICE)
    assert kernel.fake_quantize(x, clip, integers(4, True, None), "pwl", out=out)
    assert_same_bits(out, reference.fake_quantize(x, clip, integers(4, True, None), "pwl"))


def test_what_only_the_reference_does_is_declined():
    x, clip = torch.randn(4, 6, device=DEVICE), torch.tensor(1.0, device=DEVICE)
    gaps = torch.empty(4, 12, device=DEVICE)[:, ::2]
    assert not kernel.fake_quantize(x.double(), clip, integers(4, True, None), "pwl", out=x.double())
    assert not kernel.fake_quantize(x, clip, integers(4, True, None), "pwl", out=gaps)
    assert not kernel.fake_quantize(x, clip, integers(4, True, None), "pwl", out=x.int())
    assert not kernel.fake_quantize_backward(x, x, clip, integers(4, True, None), "ste", out=x.clone())
