import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octav_fx.formats.grid import Grid
from octav_fx.ops.zero_clipped import reference
from tests.support.compare import assert_same_bits
from tests.support.examples import examples
from tests.support.interpreter import DEVICE, small_block
from tests.support.strategies import codes

kernel = pytest.importorskip("octav_fx.ops.zero_clipped.kernel")

pytestmark = pytest.mark.gpu


@examples(60)
@given(data=st.data())
def test_gradients_are_those_of_the_reference_bit_for_bit(data):
    grid = Grid(data.draw(st.integers(2, 8)), data.draw(st.booleans()))
    stored, dtype = data.draw(codes(grid)).to(DEVICE), data.draw(st.sampled_from(kernel.FLOATS))
    # The gradient may lie otherwise than the codes do.
    like = data.draw(st.sampled_from([stored, torch.empty(stored.shape)]))
    grad = torch.empty_like(like, dtype=dtype, device=DEVICE).normal_()
    expected = grad.clone()
    reference.zero_clipped_(expected, stored, grid.low, grid.high)
    if kernel.zero_clipped_(grad, stored, grid.low, grid.high, block=small_block(grad)):
        assert_same_bits(grad, expected)
    else:
        assert not kernel.cpu.is_dense(grad)


def test_float64_is_declined():
    grad, stored = torch.ones(4, dtype=torch.float64, device=DEVICE), torch.ones(4, dtype=torch.int8, device=DEVICE)
    assert not kernel.zero_clipped_(grad, stored, -8, 7)
