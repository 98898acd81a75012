import pytest
import torch

from octav_fx.formats.grid import Grid
from octav_fx.formats.spec import integers
from octav_fx.ops.fake_quantize.reference import fake_quantize_backward
from octav_fx.ops.quantize.op import quantize
from octav_fx.ops.zero_clipped.op import zero_clipped_


@pytest.mark.parametrize("signed", [True, False])
def test_it_is_the_piecewise_linear_gradient(signed):
    grid, clip = Grid(4, signed), torch.tensor(1.0)
    x = torch.tensor([[-2.0, -1.0, -0.5, 0.0], [0.5, 1.0, 1.1, torch.nan]])
    grad = torch.arange(1.0, 9).reshape(2, 4)
    expected = fake_quantize_backward(grad, x, clip, integers(4, signed, None), "pwl")
    # On an unsigned grid zero has a code of its own below the lowest.
    low = grid.low if signed else grid.low - 1
    assert zero_clipped_(grad, quantize(x, clip, integers(4, signed, None)), low, grid.high) is None
    assert torch.equal(grad, expected)
