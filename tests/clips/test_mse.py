import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octav_fx.clips import mse as module
from octav_fx.clips.mse import candidates, errors_from_sums, errors_one_by_one, mse_search
from octav_fx.formats.grid import Grid
from tests.support.examples import examples
from tests.support.samples import SAMPLES, SIGNS


def literal(row, bits, signed):
    """The sweep as its source says it, in float64: candidates and their errors."""
    x, steps = row.double(), 2 ** (bits - 1) if signed else 2**bits
    low, high = (-steps if signed else 0), steps - 1
    largest = (x.abs() if signed else x.clamp(min=0)).max()
    clips, errors = [], []
    for k in range(1, 101):
        clip = k / 100 * largest
        step = clip / steps
        clips.append(clip.item())
        errors.append(((x / step).round().clamp(low, high) * step - x).square().sum().item())
    return torch.tensor(clips).double(), torch.tensor(errors).double()


def check(row, bits, signed):
    clip = mse_search(row.unsqueeze(0), torch.zeros(1), Grid(bits, signed)).item()
    clips, errors = literal(row, bits, signed)
    chosen = (clips - clip).abs().argmin()
    # A float32 candidate is a few roundings away from the float64 one.
    assert clips[chosen].item() == pytest.approx(clip, rel=4 * 2**-24)
    # By which an error moves: |value - level| <= |x| + clip, and levels move by 4 * 2**-24 of the clip at most, so by
    # 2 * (|x| + clip) * 4 * 2**-24 * clip for each value; and rounding a difference to float32 costs 2**-24 of it.
    moved = 2 * (row.double().abs() + clip) * (4 * clip + 2 * row.double().abs() + clip) * 2**-24
    assert errors[chosen] <= errors.min() + 2 * moved.sum()
    return chosen, errors.argmin()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("name", "signed"), SIGNS)
def test_it_chooses_what_the_hundred_passes_choose(name, signed, bits):
    x = SAMPLES[name](20_000)
    chosen, expected = check(x, bits, signed)
    # With these seeds no two candidates are closer than rounding.
    assert chosen == expected


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("n", [1, 2, 9, 64, 200])
def test_short_rows(bits, n):
    for signed in (True, False):
        check(torch.randn(n).abs() if not signed else torch.randn(n), bits, signed)


@examples(200)
@given(
    row=st.lists(st.integers(-64, 64).map(lambda i: i / 8), min_size=1, max_size=80).filter(any),
    bits=st.integers(2, 4),
    signed=st.booleans(),
)
def test_rows_of_ties(row, bits, signed):
    # Candidates of these have values half-way between levels everywhere.
    x = torch.tensor(row)
    if not signed and not (x > 0).any():
        x = -x
    check(x, bits, signed)


@examples(100)
@given(data=st.data())
def test_the_sums_are_the_definition(data):
    bits, signed = data.draw(st.integers(2, 8)), data.draw(st.booleans())
    n = data.draw(st.sampled_from([1, 3, 50, 700]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    x = torch.randn(3, n, generator=generator)
    # Multiples of a step of the largest candidates: ties.
    x = torch.where(torch.rand(3, n, generator=generator) < 0.5, (8 * x).round() / 8, x)
    clips, grid = x.abs().amax(-1, keepdim=True).clamp(min=0.1) * candidates(x), Grid(bits, signed)
    one, two = errors_one_by_one(x, clips, grid), errors_from_sums(x, clips, grid)
    # The first rounds levels and differences d to float32: 2 * |d| * 2**-24 * 2 * (|x| + c), with |d| <= |x| + c.
    bound = (x.double().abs() + clips.double().amax(-1, keepdim=True)).square().sum(-1, keepdim=True)
    assert ((one - two).abs() <= 4 * 2**-24 * bound).all()


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("n", [30, 3000])
def test_rows_are_taken_a_few_at_a_time(monkeypatch, bits, n):
    x, grid = torch.randn(7, n), Grid(bits, True)
    whole = mse_search(x, torch.zeros(7), grid)
    monkeypatch.setattr(module, "_CHUNK", 1)
    assert torch.equal(mse_search(x, torch.zeros(7), grid), whole)
    rows = torch.cat([mse_search(row.unsqueeze(0), torch.zeros(1), grid) for row in x])
    assert torch.equal(rows, whole)


def test_zeros_and_what_is_not_finite_cost_nothing():
    x = torch.randn(1, 2000)
    more = torch.cat([x, torch.zeros(1, 500), torch.tensor([[math.inf, -math.inf, math.nan]])], -1)
    for bits in (4, 8):
        grid = Grid(bits, True)
        assert torch.equal(mse_search(more, torch.zeros(1), grid), mse_search(x, torch.zeros(1), grid))
