import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octav_fx.clips import methods
from octav_fx.clips.newton import octav_grid_step, octav_step
from octav_fx.formats.grid import Grid
from tests.support.examples import examples
from tests.support.pairwise import pairwise
from tests.support.samples import NON_NEGATIVE, SAMPLES, SIGNS, fixed_point, least_error, squared_error
from tests.support.strategies import METHODS

NEWTON = ["octav", "octav-grid"]


def solve(rows, bits, signed=True, method="octav", hint=None):
    hint = torch.zeros(len(rows)) if hint is None else hint
    return methods.METHODS[method].solve(rows, hint, Grid(bits, signed))


def bisect(falling, low, high):
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return low


@pytest.mark.parametrize(
    ("signed", "numerator", "denominator"),
    # |x| >= 2: 2, 4, 8; the 1 is inside and the 0 takes no part. Unsigned: the 4, and the 1 inside.
    [(True, 14, 3 + 1 / 768), (False, 4, 1 + 1 / 3072)],
)
def test_octav_step(signed, numerator, denominator):
    x, clip = torch.tensor([[0.0, 1, -2, 4, -8]], dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64)
    top, bottom = octav_step(x, clip, Grid(4, signed))
    assert top.item() == numerator
    # The noise is rounded once to float32, next to a count below 4.
    assert bottom.item() == pytest.approx(denominator, rel=2**-24)


@pytest.mark.parametrize(
    ("signed", "numerator", "denominator"),
    [
        # Step 2, k = 1/2, noise 1/48. Clipped: 2 and 3 (k * 4 and more), -5 and -4. Rounded: -3, 1.5, 1.6; the -1 lies
        # in the cell of zero. At its edge, in (0.5, 1.5]: -1, -0.75, 0.6, 1.5.
        (True, 9 + 5 / 2, (3 + 4) / 48 + 2 + 2 / 4),
        # Step 1, k = 3/4, noise 1/192. Clipped: 3. Rounded: 0.6, 1.5, 1.6, 2. At the edge, in (0.25, 0.75]: 0.5, 0.6.
        (False, 3 * 3 / 4, (4 + 2) / 192 + 9 / 16),
    ],
)
def test_octav_grid_step(signed, numerator, denominator):
    x = [-5, -4, -3, -1, -0.75, -0.4, 0, 0.5, 0.6, 1.5, 1.6, 2, 3]
    clip = torch.tensor([4.0], dtype=torch.float64)
    top, bottom = octav_grid_step(torch.tensor([x], dtype=torch.float64), clip, Grid(2, signed))
    assert top.item() == numerator
    assert bottom.item() == pytest.approx(denominator, rel=2**-24)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("name", "signed"), SIGNS)
def test_octav_finds_the_fixed_point_from_any_hint(name, signed, bits):
    x = SAMPLES[name](20_000)
    expected = fixed_point(x, bits, signed)
    hint = expected * torch.tensor([0, 1.05, 0.95, 100, 0.01])
    clip = solve(x.expand(len(hint), -1), bits, signed, hint=hint)
    # Sums of 20 000 floats, pairwise: some 2**-24 * log2(20 000) = 9e-7 of them, and the same of the clip.
    torch.testing.assert_close(clip, torch.full_like(clip, expected), rtol=1e-6, atol=0)


@examples(200)
@given(
    row=st.lists(st.sampled_from([0.0, 1.0, -1.0, 1.5, 2.0, -3.0, 7.0, 100.0, 1e-3]), min_size=1, max_size=12),
    bits=st.integers(2, 8),
    signed=st.booleans(),
    hint=st.sampled_from([0.0, 1e-3, 1.0, 2.5, 99.0, 1e4]),
)
def test_octav_finds_the_fixed_point_of_a_few_repeated_values(row, bits, signed, hint):
    # Here the crossing often lies where the count jumps, at a value of x: plain Newton alternates around it.
    x = torch.tensor([row])
    expected = fixed_point(x[0], bits, signed) if (x.abs() if signed else x.relu()).any() else 0
    clip = solve(x, bits, signed, hint=torch.tensor([hint]))
    # 24 steps of which a handful are Newton's; the others halve a bracket that is at most as wide as the values.
    assert clip.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 4, 6])
@pytest.mark.parametrize("name", ["gaussian", "laplace"])
def test_octav_agrees_with_the_integrals_over_exact_densities(name, bits):
    noise = 4.0**-bits / 3
    if name == "gaussian":

        def tail(s):
            return math.erfc(s / math.sqrt(2))

        def excess(s):
            return math.sqrt(2 / math.pi) * math.exp(-s * s / 2) - s * tail(s)

        quantile = torch.special.ndtri
    else:

        def tail(s):
            return math.exp(-s)

        excess = tail

        def quantile(p):
            return -torch.sign(p - 0.5) * torch.log1p(-2 * (p - 0.5).abs())

    # c * s * P(|X| <= s) = E[max(|X| - s, 0)]
    expected = bisect(lambda s: excess(s) - noise * s * (1 - tail(s)), 1, 20)
    n = 10**6
    x = quantile((torch.arange(n, dtype=torch.float64) + 0.5) / n).unsqueeze(0)
    clip = solve(x, bits)
    # On each side the midpoint rule errs by at most the range over n in the mean excess, and by less in noise * s * P;
    # the root moves by that over the slope, which is P(|X| > s) + noise at least.
    tolerance = 2 * x.max().item() / n / (tail(expected) + noise)
    assert clip.item() == pytest.approx(expected, abs=tolerance)
    assert tolerance < 0.01 * expected


@pytest.mark.slow
@pytest.mark.parametrize(("name", "published"), [("gaussian", 2.57), ("laplace", 5.03)])
def test_octav_at_four_bits_is_where_the_literature_puts_it(name, published):
    n = 10**6
    x = SAMPLES[name](n).unsqueeze(0)
    clip = solve(x, 4)
    # The clip is the root of the mean of h(x) = max(|x| - s, 0) - c * s * [|x| <= s], whose slope is at least the
    # probability beyond s plus c: five standard deviations of that mean, over the slope. Published with two decimals.
    noise, magnitude = 4.0**-4 / 3, x.abs()
    h = (magnitude - clip).clamp(min=0) - noise * clip * (magnitude <= clip)
    slope = (magnitude > clip).double().mean() + noise
    sampling = 5 * h.std() / math.sqrt(n) / slope
    assert abs(clip.item() - published) < sampling.item() + 0.005


@pytest.mark.parametrize("method", NEWTON)
@pytest.mark.parametrize("power", [-20, 5])
def test_scaling_by_a_power_of_two_scales_the_clip_exactly(method, power):
    x = torch.randn(3, 500)
    assert torch.equal(solve(x * 2.0**power, 4, method=method), solve(x, 4, method=method) * 2.0**power)


@pytest.mark.parametrize("method", METHODS)
def test_each_row_is_solved_by_itself(method):
    x = torch.randn(5, 300) * torch.tensor([1e-3, 1, 10, 0, 1e4]).unsqueeze(-1)
    local_sums = torch.cat([solve(row.unsqueeze(0), 4, method=method) for row in x])
    # A matrix may be summed in another order than a row is: 300 floats, each sum within 300 * 2**-24.
    torch.testing.assert_close(solve(x, 4, method=method), local_sums, rtol=2e-5, atol=0)


def test_float64_is_solved_in_float64():
    x = torch.randn(1, 10_000, dtype=torch.float64)
    clip = solve(x, 4, hint=torch.zeros(1, dtype=torch.float64))
    assert clip.dtype is torch.float64
    # Sums of 10 000 doubles round by 1e-12 at most, but noise times a count is a float32 product.
    assert clip.item() == pytest.approx(fixed_point(x[0], 4, True), rel=2**-23)


@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("name", [name for name in SAMPLES if name != "sparse"])
def test_octav_grid_is_within_a_hundredth_of_the_least_error(name, bits):
    signed = name not in NON_NEGATIVE
    x = SAMPLES[name](100_000).unsqueeze(0)
    clip = solve(x, bits, signed, "octav-grid")
    least = least_error(x, bits, signed, candidates=60)
    assert (squared_error(x, clip, bits, signed) / least).item() < 1.01


@pytest.mark.parametrize("elements", [9, 16, 25, 64])
def test_octav_grid_on_short_rows_is_near_the_least_error_and_better_than_the_others(elements):
    x = torch.randn(1000, elements)
    least = least_error(x, 4, True, candidates=300).sum()
    errors = {method: squared_error(x, solve(x, 4, method=method), 4, True).sum() for method in METHODS}
    assert errors["octav-grid"] < 1.2 * least
    assert errors["octav-grid"] < min(errors["octav"], errors["max"])


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("name", SAMPLES)
def test_octav_grid_costs_the_same_from_any_hint(name, bits):
    signed = name not in NON_NEGATIVE
    x = SAMPLES[name](20_000).unsqueeze(0)
    cold = solve(x, bits, signed, "octav-grid")
    rows = x.expand(4, -1)
    warm = solve(rows, bits, signed, "octav-grid", cold * torch.tensor([1.05, 0.95, 100, 0.01]))
    # Counts jump by whole elements, so there may be crossings next to each other: the error is flat between them.
    same = squared_error(x, cold, bits, signed).expand(4)
    torch.testing.assert_close(squared_error(rows, warm, bits, signed), same, rtol=1e-3, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("method", NEWTON)
def test_with_huge_outliers_the_minimum_nearest_zero_is_taken(method):
    x = torch.randn(1, 100_000)
    x[0, 0] = -500
    clip = solve(x, 4, method=method)
    near, far = torch.linspace(1, 20, 400), torch.linspace(20, 600, 400)
    errors_near, errors_far = (squared_error(x.expand(400, -1), clips, 4, True) for clips in (near, far))
    # The least error of all is at the outlier, where every other value becomes zero.
    assert errors_far.min() < errors_near.min() / 2
    assert far[errors_far.argmin()] > 400
    assert 0 < errors_near.argmin() < 399
    assert clip < 20
    assert squared_error(x, clip, 4, True) < 1.01 * errors_near.min()


def test_octav_returns_from_a_hint_among_the_outliers():
    x = torch.randn(1, 100_000)
    x[0, 0] = -500
    clip = solve(x.expand(4, -1), 4, hint=torch.tensor([0.0, 50, 400, 500]))
    # Rows that hold the same: only the start differs, and the fixed point's rounding.
    torch.testing.assert_close(clip, clip[:1].expand(4), rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("hint", [0.0, 1.0])
def test_rows_without_anything_to_clip_have_a_clip_of_zero(method, signed, hint):
    rows = torch.tensor([[0.0, -0.0, 0.0], [math.nan, 0.0, math.inf], [-math.inf, math.nan, math.nan]])
    assert solve(rows, 4, signed, method, torch.full((3,), hint)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("method", METHODS)
def test_negative_rows_on_an_unsigned_grid_have_a_clip_of_zero(method):
    assert solve(-torch.rand(2, 9), 4, False, method).tolist() == [0, 0]


@pytest.mark.parametrize("method", METHODS)
def test_empty_rows_have_a_clip_of_zero(method):
    assert solve(torch.empty(3, 0), 4, method=method).tolist() == [0, 0, 0]
    assert solve(torch.empty(0, 3), 4, method=method).tolist() == []


ONE_MAGNITUDE = [[0.3] * 7, [-0.3] * 7, [0.0, 0.0, 0.3], [0.0, -0.3]]


@pairwise({"bits": range(2, 9), "hint": [0.0, 0.2, 0.3, 0.5, 1e6], "row": ONE_MAGNITUDE})
def test_octav_of_one_magnitude_is_that_magnitude(row, hint, bits):
    clip = solve(torch.tensor([row]), bits, hint=torch.tensor([hint]))
    # With a hint, 24 halvings at most of a bracket no wider than the hint.
    assert clip.item() == pytest.approx(0.3, rel=1e-5)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("row", ONE_MAGNITUDE)
def test_octav_grid_of_one_value_puts_a_level_on_it(row, bits):
    x = torch.tensor([row])
    error = squared_error(x, solve(x, bits, method="octav-grid"), bits, True)
    # The level is highest code * step, a few roundings away from the value.
    assert error.item() < len(row) * (0.3 * 1e-6) ** 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("signed", [True, False])
def test_inf_and_nan_take_no_part(method, signed):
    x = torch.randn(2, 1000)
    bad = torch.cat([x, torch.tensor([math.inf, -math.inf, math.nan]).expand(2, -1)], -1)
    # The same values, perhaps summed in another order: 1000 floats, each sum within 1000 * 2**-24.
    torch.testing.assert_close(solve(bad, 4, signed, method), solve(x, 4, signed, method), rtol=6e-5, atol=0)


@pytest.mark.parametrize("method", NEWTON)
@pytest.mark.parametrize("hint", [math.inf, math.nan, -1.0])
def test_an_unusable_hint_is_a_cold_start(method, hint):
    x = torch.randn(3, 500)
    assert torch.equal(solve(x, 4, method=method, hint=torch.full((3,), hint)), solve(x, 4, method=method))


@pytest.mark.parametrize("method", NEWTON)
@pytest.mark.parametrize("factor", [1.2, 1e3, 1e12])
def test_a_hint_above_every_value_is_a_cold_start(method, factor):
    # Where nothing is clipped Newton goes to zero; from far above, halving would take all the steps there are.
    x = torch.randn(3, 500)
    assert torch.equal(solve(x, 4, method=method, hint=x.abs().amax(-1) * factor), solve(x, 4, method=method))


@pytest.mark.parametrize("signed", [True, False])
def test_largest_is_the_largest_magnitude(signed):
    x = torch.tensor([[1.0, -3.0, 2.0], [math.inf, math.nan, 0.5]])
    assert solve(x, 4, signed, "max").tolist() == [3 if signed else 2, 0.5]


@pytest.mark.parametrize("method", METHODS)
def test_the_host_reads_no_value(method):
    # A meta tensor has none: .item(), a branch on a value or a boolean index would raise.
    x = torch.empty(3, 500, device="meta")
    assert methods.METHODS[method].solve(x, torch.empty(3, device="meta"), Grid(4, True)).shape == (3,)
