"""recode: from the codes of one quantizer to those of another."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octav_fx.formats.grid import Grid
from octav_fx.nn import StaticQuantizer
from octav_fx.ops.recode import reference
from octav_fx.ops.recode.op import recode
from tests.support.strategies import filled_with_nan

BITS = st.integers(2, 8)
# 0.1 / 0.3 and others round otherwise than a quotient of products.
SCALES = st.sampled_from([2.0**-9, 0.1, 0.2, 0.3, 0.7, 311.0])


@settings(max_examples=200)
@given(bits=st.tuples(BITS, BITS), signs=st.tuples(st.booleans(), st.booleans()), scales=st.tuples(SCALES, SCALES))
def test_the_kernel_is_the_quantizer_of_levels(kernels, bits, signs, scales):
    x = torch.arange(2 ** bits[0], dtype=torch.uint8).repeat(3)
    scale, step = (torch.tensor(value) for value in scales)
    args = (x, scale, step, bits[0], signs[0], bits[1], signs[1])
    with filled_with_nan():
        found = recode(*args)
    assert torch.equal(found, reference.recode(*args))
    grid = Grid(bits[1], signs[1])
    levels = (x.float() + Grid(bits[0], signs[0]).low) * scale
    expected = StaticQuantizer(step * grid.steps, *grid_of(grid), None)(levels)
    assert torch.equal((found.float() + grid.low) * step, expected)


def grid_of(grid: Grid) -> tuple[int, bool]:
    return grid.bits, grid.signed


def test_a_quotient_that_is_not_the_product():
    """Of some scales the table is read: the two differ for a code."""
    found = []
    for numerator in range(1, 400):
        scale, step = torch.tensor(numerator / 400), torch.tensor(0.3)
        codes = torch.arange(256, dtype=torch.uint8)
        product = (codes * (scale / step)).round().clamp(0, 255)
        expected = (codes * scale / step).round().clamp(0, 255)
        if not torch.equal(product, expected):
            found.append(numerator)
            assert torch.equal(recode(codes, scale, step, 8, False, 8, False).float(), expected)
    assert found


@pytest.mark.parametrize("count", [1, 2])
def test_no_element_is_left_out_of_a_large_tensor(kernel_calls, threads, count):
    threads(count)
    x = torch.randint(0, 256, (5 * 2**14 + 3,), dtype=torch.uint8)
    args = (x, torch.tensor(0.02), torch.tensor(0.3), 8, True, 4, True)
    assert torch.equal(recode(*args), reference.recode(*args))
    assert kernel_calls == ["octav_recode"]


def test_opcheck():
    x, one = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8), torch.tensor(1.0)
    torch.library.opcheck(recode.default, (x, one, one, 8, False, 4, True))
