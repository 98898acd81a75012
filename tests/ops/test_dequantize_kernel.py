import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octav_fx.formats.grid import Grid
from octav_fx.formats.spec import integers
from octav_fx.ops.dequantize import reference
from tests.support.compare import assert_same_bits
from tests.support.examples import examples
from tests.support.interpreter import DEVICE, poisoned, small_block
from tests.support.strategies import axes, clips, codes

kernel = pytest.importorskip("octav_fx.ops.dequantize.kernel")

pytestmark = pytest.mark.gpu


@examples(80)
@given(data=st.data())
def test_levels_are_those_of_the_reference_bit_for_bit(data):
    bits, signed = data.draw(st.integers(2, 8)), data.draw(st.booleans())
    stored = data.draw(codes(Grid(bits, signed))).to(DEVICE)
    dim, dtype = data.draw(axes(stored)), data.draw(st.sampled_from(kernel.FLOATS))
    clip = data.draw(clips(stored, dim)).to(DEVICE)
    out = poisoned(stored, dtype)
    assert kernel.dequantize(stored, clip, integers(bits, signed, dim), dtype, out=out, block=small_block(stored))
    assert_same_bits(out, reference.dequantize(stored, clip, integers(bits, signed, dim), dtype))


def test_float64_is_declined():
    stored, clip = torch.ones(4, dtype=torch.int8, device=DEVICE), torch.tensor(1.0, device=DEVICE)
    out = torch.empty(4, dtype=torch.float64, device=DEVICE)
    assert not kernel.dequantize(stored, clip, integers(4, True, None), torch.float64, out=out)
