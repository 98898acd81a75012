import pytest
import torch

from octav_fx.formats.grid import Grid

ALL_GRIDS = [Grid(bits, signed) for bits in range(2, 9) for signed in (True, False)]


@pytest.mark.parametrize(
    ("bits", "signed", "low", "high", "steps"),
    [
        (2, True, -2, 1, 2),
        (4, True, -8, 7, 8),
        (8, True, -128, 127, 128),
        (2, False, 0, 3, 4),
        (4, False, 0, 15, 16),
        (8, False, 0, 255, 256),
    ],
)
def test_codes_are_twos_complement_or_start_at_zero(bits, signed, low, high, steps):
    grid = Grid(bits, signed)
    assert (grid.low, grid.high, grid.steps) == (low, high, steps)


@pytest.mark.parametrize("grid", ALL_GRIDS)
def test_there_are_two_to_the_bits_levels(grid):
    assert grid.high - grid.low + 1 == 2**grid.bits


@pytest.mark.parametrize("grid", ALL_GRIDS)
def test_noise_is_the_constant_of_the_paper(grid):
    # Eq. 4, and appendix A for unsigned. All are a power of two over 12: equal but for one rounding of 4**-B / 3.
    paper = 4.0**-grid.bits / (3 if grid.signed else 12)
    assert grid.noise == pytest.approx(paper, rel=2**-52)


@pytest.mark.parametrize("grid", ALL_GRIDS)
def test_dividing_by_the_number_of_steps_is_exact(grid):
    clip = torch.rand(1000) + 0.1
    assert torch.equal(grid.step(clip) * grid.steps, clip)
    if grid.signed:
        assert torch.equal(grid.low * grid.step(clip), -clip)


@pytest.mark.parametrize("grid", ALL_GRIDS)
def test_codes_take_one_byte_up_to_seven_bits_signed_and_five_unsigned(grid):
    narrow = grid.bits <= (7 if grid.signed else 5)
    assert grid.codes_dtype is (torch.int8 if narrow else torch.int16)


@pytest.mark.parametrize("grid", ALL_GRIDS)
def test_every_code_is_another_number_than_that_of_what_is_not_finite(grid):
    codes = torch.iinfo(grid.codes_dtype)
    assert codes.min < grid.underflow_code
    assert grid.high + 1 + (0 if grid.signed else grid.ceiling_flag) <= codes.max


@pytest.mark.parametrize("grid", ALL_GRIDS)
def test_raised_codes_are_other_numbers_than_codes(grid):
    assert grid.ceiling_flag > grid.high + 1
