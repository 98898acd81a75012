import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octav_fx.formats.granularity import clip_shape, to_rows
from octav_fx.formats.grid import Grid
from octav_fx.formats.spec import integers
from octav_fx.ops import cpu
from octav_fx.ops.optimal_clip import reference
from octav_fx.ops.optimal_clip.op import optimal_clip
from tests.support.examples import examples
from tests.support.pairwise import pairwise
from tests.support.samples import SAMPLES, SIGNS, fixed_point, least_error, squared_error
from tests.support.strategies import DTYPES, METHODS, NATIVE, axes, every_number, filled_with_nan, tensors

COLD = torch.tensor(0.0)
NEWTON = ["octav", "octav-grid", "octav-tight"]
# What kernel and reference may differ by: both end within a few roundings (2**-24 = 6e-8 each) of one fixed point.
CLOSE = {"rtol": 1e-6, "atol": 0}


def cold(x, dim):
    return torch.zeros(clip_shape(x, dim))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("name", "signed"), SIGNS)
def test_the_kernel_finds_the_fixed_point_from_any_hint(kernels, name, signed, bits):
    x = SAMPLES[name](20_000)
    expected = fixed_point(x, bits, signed)
    for factor in (0, 1.05, 0.95, 100, 0.01):
        clip = optimal_clip(x, torch.tensor(expected * factor), integers(bits, signed, None), "octav")
        # Chunks of 1024 are summed in float, in 16 lanes or fewer, and added in double: 64 roundings of 2**-24 at most
        # if all went the same way, which they do not.
        assert clip.item() == pytest.approx(expected, rel=1e-6)


@pairwise({"solve": ["kernel", "reference"], "bits": range(2, 9), "name, signed": SIGNS})
def test_octav_tight_counts_rounding_four_times(kernels, name, signed, bits, solve):
    x = SAMPLES[name](20_000)
    clip = SOLVERS[solve](x, COLD, integers(bits, signed, None), "octav-tight")
    # A bit less is twice the step and four times its square; as in the test above.
    assert clip.item() == pytest.approx(fixed_point(x, bits - 1, signed), rel=1e-6)


@pytest.mark.parametrize("elements", [9, 64])
def test_the_kernel_is_near_the_least_error_on_short_rows(kernels, elements):
    x = torch.randn(1000, elements)
    clip = optimal_clip(x, torch.zeros(1000), integers(4, True, 0), "octav-grid")
    assert squared_error(x, clip, 4, True).sum() < 1.2 * least_error(x, 4, True, candidates=300).sum()


@examples(300)
@given(data=st.data())
def test_the_kernel_finds_what_the_reference_finds(kernels, data):
    x = data.draw(tensors(DTYPES))
    # Their sums are beyond float32; see clips/newton.py for what takes part.
    x = torch.where(x.abs() > 1e10, math.nan, x)
    dim = data.draw(axes(x))
    bits, signed = data.draw(st.integers(2, 8)), data.draw(st.booleans())
    hint = data.draw(st.sampled_from([0.0, 0.1, 1.0, 50.0, math.inf, math.nan])) + cold(x, dim)
    with filled_with_nan():
        clip = optimal_clip(x, hint, integers(bits, signed, dim), "octav")
    expected = reference.optimal_clip(x, hint, integers(bits, signed, dim), "octav")
    assert clip.dtype is torch.float32
    torch.testing.assert_close(clip, expected, **CLOSE)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("shape", "dim"), [((64, 3, 7, 7), 0), ((40, 65, 10), 1), ((3, 70_001), None)])
@pytest.mark.parametrize("signed", [True, False])
def test_the_kernel_finds_what_the_reference_finds_on_the_grid(kernels, shape, dim, signed, bits):
    x = torch.randn(shape)
    hint = cold(x, dim)
    clip = optimal_clip(x, hint, integers(bits, signed, dim), "octav-grid")
    torch.testing.assert_close(
        clip, reference.optimal_clip(x, hint, integers(bits, signed, dim), "octav-grid"), **CLOSE
    )
    warm = optimal_clip(x, clip * 1.01, integers(bits, signed, dim), "octav-grid")
    expected = reference.optimal_clip(x, clip * 1.01, integers(bits, signed, dim), "octav-grid")
    torch.testing.assert_close(warm, expected, **CLOSE)


@examples(300)
@given(data=st.data())
def test_the_kernel_selects_what_the_reference_selects(kernels, data):
    x = data.draw(tensors(DTYPES))
    dim = data.draw(axes(x))
    signed, method = data.draw(st.booleans()), data.draw(st.sampled_from(["max", "percentile", "percentile-99.99"]))
    hint = data.draw(st.sampled_from([0.0, 0.1, 1.0, 50.0, math.inf, math.nan])) + cold(x, dim)
    with filled_with_nan():
        clip = optimal_clip(x, hint, integers(4, signed, dim), method)
    assert torch.equal(clip, reference.optimal_clip(x, hint, integers(4, signed, dim), method))


@pytest.mark.parametrize("method", ["percentile", "percentile-99.99"])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("kind", ["gaussian", "half zeros", "almost all zeros", "with infinities", "few levels"])
def test_the_kernel_selects_what_the_reference_selects_from_long_rows(kernels, kind, signed, method):
    x = SELECTED[kind]()
    expected = reference.optimal_clip(x, COLD, integers(4, signed, None), method)
    for factor in (0, 1e-9, 0.5, 0.95, 1, 1.05, 1.4, 100, math.inf):
        assert torch.equal(optimal_clip(x, expected * factor, integers(4, signed, None), method), expected), factor


SELECTED = {
    "gaussian": lambda: torch.randn(70_003),
    "half zeros": lambda: torch.randn(30_000).relu(),
    "almost all zeros": lambda: torch.cat([torch.zeros(20_000), torch.tensor([-3.0, 2.0])]),
    "with infinities": lambda: torch.cat([torch.randn(12_000), torch.tensor([math.inf, math.nan]).tile(999)]),
    "few levels": lambda: torch.randn(20_011).round(decimals=1),
}


def error_and_rounding(row, clip, bits, signed):
    """In float64: the squared error of a row at a clip, and what float32 may make of it."""
    x = torch.where(row.isfinite(), row, 0).double()
    grid = Grid(bits, signed)
    step = clip.double() / grid.steps
    if step == 0:
        return x.square().sum(), 0.0
    errors = ((x / step).round().clamp(grid.low, grid.high) * step - x).abs()
    # x / step is three roundings away from what it should be, and so is the error then; squaring and adding up 64
    # squares in a lane of a chunk are one each.
    moved = 3 * 2**-24 * x.abs()
    return errors.square().sum(), ((errors + moved).square() * (1 + 65 * 2**-24) - errors.square()).sum()


@examples(300)
@given(data=st.data())
def test_the_kernel_sweeps_as_the_reference_does(kernels, data):
    # float16 holds no magnitude that is beyond the reference's float32 once it is squared.
    x = data.draw(tensors([torch.float32, torch.float16]))
    x = torch.where((x.abs() > 1e15) | (x.abs() < 1e-15), 0, x)
    dim = data.draw(axes(x))
    bits, signed = data.draw(st.integers(2, 8)), data.draw(st.booleans())
    hint = data.draw(st.sampled_from([0.0, 0.1, 1.0, 50.0, math.inf, math.nan])) + cold(x, dim)
    with filled_with_nan():
        clips = optimal_clip(x, hint, integers(bits, signed, dim), "mse").reshape(-1)
    expected = reference.optimal_clip(x, hint, integers(bits, signed, dim), "mse").reshape(-1)
    for row, clip, best in zip(to_rows(x, dim).float(), clips, expected, strict=True):
        if clip != best:
            (error, above), (least, underflow_code) = (error_and_rounding(row, c, bits, signed) for c in (clip, best))
            assert error - least <= above + underflow_code


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("name", "signed"), SIGNS)
def test_the_kernel_sweeps_a_long_row_from_every_hint(kernels, name, signed, bits):
    x = SAMPLES[name](70_001)
    expected = reference.optimal_clip(x, COLD, integers(bits, signed, None), "mse")
    for factor in (0, 0.01, 0.95, 1, 1.05, 100):
        # With these seeds no two candidates are closer than rounding.
        assert torch.equal(optimal_clip(x, expected * factor, integers(bits, signed, None), "mse"), expected)


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-60, 2.0**60, 2.0**100])
def test_the_kernel_polishes_whatever_the_magnitude(kernels, scale):
    x = torch.randn(200, 32)
    expected = optimal_clip(x, cold(x, 0), integers(8, True, 0), "octav-grid")
    # Sums are made in double where the squares of float would be lost, so that the last place may be another one.
    found = optimal_clip(x * scale, cold(x, 0), integers(8, True, 0), "octav-grid") / scale
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_levels_that_float32_does_not_hold_are_its_greatest_number():
    x = torch.tensor([-1e200, -1e38, 0.0, 1e38, 1e200], dtype=torch.float64)
    levels = optimal_clip(x, torch.zeros(4), "kmeans2/tensor", "octav")
    assert levels.isfinite().all()
    assert torch.ops.octav.fake_quantize(x, levels, "kmeans2/tensor", "pwl").isfinite().all()


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e18, 1e37])
def test_the_kernel_sweeps_whatever_the_magnitude(kernels, scale):
    x = torch.randn(5000) * scale
    # Multiples of the least number are all there is at the lower end: a grid of those.
    tolerance = max(4 * 2**-24, 2**-149 / (x.abs().max().item() / 100))
    expected = reference.optimal_clip((x.double() / scale).float(), COLD, integers(4, True, None), "mse").item() * scale
    assert optimal_clip(x, COLD, integers(4, True, None), "mse").item() == pytest.approx(expected, rel=tolerance)


def test_the_kernel_sweeps_beside_large_negative_values(kernels):
    x = torch.rand(5000)
    expected = optimal_clip(x, COLD, integers(4, False, None), "mse")
    x = torch.cat([x, torch.tensor([-1e25, -3e38])])
    assert optimal_clip(x, COLD, integers(4, False, None), "mse") == expected > 0


@pytest.mark.parametrize("method", [*NEWTON, "max", "percentile", "mse"])
@pytest.mark.parametrize(("shape", "dim"), [((70_003,), None), ((37, 2003), 0), ((5, 301, 50), 1)])
def test_the_number_of_threads_changes_no_bit(kernels, threads, method, shape, dim):
    x, clips = torch.randn(shape), []
    for count in (1, 2, 3):
        threads(count)
        clips.append(optimal_clip(x, cold(x, dim), integers(4, True, dim), method))
    assert torch.equal(clips[0], clips[1])
    assert torch.equal(clips[0], clips[2])


LONG_ROWS = {
    "gaussian": lambda: torch.randn(70_003),
    "two magnitudes, one of them rare": lambda: torch.cat([torch.full((70_000,), 0.5), torch.full((5,), 3e4)]),
    "one magnitude": lambda: torch.full((9_001,), 0.7),
    "few levels": lambda: torch.randn(20_011).round(decimals=1),
    "ascending": lambda: torch.linspace(-1, 1, 66_001),
    "with infinities": lambda: torch.cat([torch.randn(9_000), torch.tensor([math.inf, -math.inf, math.nan])]),
    "beyond float": lambda: torch.randn(9_000) * 1e38,
}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("kind", LONG_ROWS)
def test_a_long_row_has_the_same_clip_to_the_bit_from_every_hint(kernels, threads, kind, signed, bits):
    x = LONG_ROWS[kind]()
    threads(1)
    clip = optimal_clip(x, COLD, integers(bits, signed, None), "octav")
    expected = reference.optimal_clip(x.double(), COLD, integers(bits, signed, None), "octav").float()
    torch.testing.assert_close(clip, expected, **CLOSE)
    for count in (1, 3):
        threads(count)
        for factor in (1e-9, 0.01, 0.5, 0.76, 0.95, 1, 1.05, 1.3, 100, 1e9):
            assert torch.equal(optimal_clip(x, clip * factor, integers(bits, signed, None), "octav"), clip), (
                count,
                factor,
            )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dim", [None, 0, 1, 2, 3])
def test_memory_layout_does_not_matter(method, dim):
    x = torch.randn(4, 6, 8, 10)
    expected = optimal_clip(x, cold(x, dim), integers(4, True, dim), method)
    assert torch.equal(optimal_clip(x, cold(x, dim), integers(4, True, dim), method), expected)
    wide = torch.randn(4, 6, 8, 20)
    wide[..., ::2] = x
    for same in (x.to(memory_format=torch.channels_last), x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)):
        # Summed in another order.
        torch.testing.assert_close(optimal_clip(same, cold(x, dim), integers(4, True, dim), method), expected, **CLOSE)
    assert torch.equal(optimal_clip(wide[..., ::2], cold(x, dim), integers(4, True, dim), method), expected)


@pytest.mark.parametrize("method", NEWTON)
def test_a_part_of_a_tensor_is_solved_from_where_it_starts(method):
    x = torch.randn(10, 100) * torch.arange(10).unsqueeze(-1)
    assert torch.equal(
        optimal_clip(x[7], COLD, integers(4, True, None), method),
        optimal_clip(x[7].clone(), COLD, integers(4, True, None), method),
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("shape", "dim"), [((70_003,), None), ((5, 3001), 0), ((37, 20, 9), 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_solved_in_float32_to_the_bit(method, shape, dim, dtype):
    # 70 000 numbers of about 1: float16 cannot hold their sum, bfloat16 cannot count past 256.
    x = torch.randn(shape).to(dtype)
    x.view(-1)[::1001] = math.inf
    clip = optimal_clip(x, cold(x, dim), integers(4, True, dim), method)
    assert clip.dtype is torch.float32
    assert torch.equal(clip, optimal_clip(x.float(), cold(x, dim), integers(4, True, dim), method))
    warm = 1.02 * clip
    assert torch.equal(
        optimal_clip(x, warm, integers(4, True, dim), method),
        optimal_clip(x.float(), warm, integers(4, True, dim), method),
    )


@pytest.mark.parametrize("dtype", NATIVE)
def test_numbers_are_read_as_what_they_are(dtype):
    x = every_number(dtype)
    assert optimal_clip(x, COLD, integers(4, True, None), "max") == x[x.isfinite()].abs().max()
    for scale in (1e-7, 1.0):
        # Small numbers too: subnormal ones of float16.
        x = (torch.randn(20_000) * scale).to(dtype)
        clip = optimal_clip(x, COLD, integers(4, True, None), "octav").item()
        assert clip == pytest.approx(fixed_point(x.double(), 4, True), rel=1e-6)


@pytest.mark.parametrize(
    ("method", "kernel"),
    [("octav", "optimal_clip"), ("max", "percentile"), ("percentile", "percentile"), ("mse", "sweep")],
)
@pytest.mark.parametrize("dtype", NATIVE)
def test_half_precision_is_not_copied(kernel_calls, monkeypatch, dtype, method, kernel):
    x = torch.randn(50, 100).to(dtype)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: x if x.is_contiguous() else pytest.fail("a copy"))
    optimal_clip(x, COLD, integers(4, True, None), method)
    optimal_clip(x.t(), COLD, integers(4, True, None), method)
    optimal_clip(x, torch.zeros(50), integers(4, True, 0), method)
    assert kernel_calls == [f"octav_{kernel}"] * 3


def test_float64_is_solved_in_float64():
    # In float32 the small ones would be zeros, and zeros take no part.
    x = torch.cat([torch.rand(10, dtype=torch.float64), torch.full((10_000,), 1e-60, dtype=torch.float64)])
    expected = fixed_point(x, 4, True)
    assert optimal_clip(x, COLD, integers(4, True, None), "octav").item() == pytest.approx(expected, rel=1e-6)
    assert optimal_clip(x.float(), COLD, integers(4, True, None), "octav").item() > 2 * expected


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("signed", [True, False])
def test_inf_and_nan_take_no_part(method, signed):
    x = torch.randn(10_000)
    bad = torch.cat([x, torch.tensor([math.inf, -math.inf, math.nan])])[torch.randperm(10_003)]
    expected = optimal_clip(x, COLD, integers(4, signed, None), method)
    torch.testing.assert_close(optimal_clip(bad, COLD, integers(4, signed, None), method), expected, **CLOSE)


NOTHING = [[], [0.0, -0.0], [math.nan, math.inf, -math.inf], [0.0] * 9 + [math.nan]]


@pairwise({"method": METHODS, "signed": [True, False], "dtype": DTYPES, "values": NOTHING})
def test_nothing_to_clip_is_a_clip_of_zero(method, signed, dtype, values):
    x = torch.tensor(values, dtype=dtype)
    assert optimal_clip(x, torch.tensor(1.0), integers(4, signed, None), method).item() == 0


@pytest.mark.parametrize(("shape", "dim"), [((0, 3), 0), ((0, 3), 1), ((3, 0), 0), ((2, 0, 4), 2), ((0,), 0)])
@pytest.mark.parametrize("method", METHODS)
def test_empty_channels(method, shape, dim):
    x = torch.empty(shape)
    assert optimal_clip(x, cold(x, dim), integers(4, True, dim), method).tolist() == [0] * shape[dim]


@pytest.mark.parametrize("hint", [0.0, 0.2, 0.7, 1e6, 1e30])
@pytest.mark.parametrize("values", [[0.7] * 100, [-0.7] * 100, [0.0, 0.7, 0.0], [-0.7]])
def test_one_magnitude_is_its_own_clip(hint, values):
    clip = optimal_clip(torch.tensor(values), torch.tensor(hint), integers(4, True, None), "octav")
    # 0.7 rounded, and a mean of 100 of it.
    assert clip.item() == pytest.approx(0.7, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_number_has_a_clip(method):
    clip = optimal_clip(torch.tensor(-0.7), COLD, integers(4, True, None), method)
    assert clip.shape == ()
    assert clip.item() == pytest.approx(0.7, rel=1e-6)


def test_one_element_channels_are_their_own_clips():
    x = torch.tensor([0.5, -2.0, 0.0, 1.0])
    assert optimal_clip(x, torch.zeros(4), integers(4, True, 0), "octav").tolist() == [0.5, 2, 0, 1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dim", [None, 1])
def test_out_is_written(method, dim):
    x = torch.randn(3, 4, 5)
    out = torch.full(clip_shape(x, dim), math.nan)
    assert optimal_clip(x, cold(x, dim), integers(4, True, dim), method, out=out) is None
    assert torch.equal(out, optimal_clip(x, cold(x, dim), integers(4, True, dim), method))


@pairwise(
    {
        "method": METHODS,
        "dim, channels_last": [(None, False), (None, True), (0, False), (1, True)],
        "dtype": [torch.float32, torch.float16],
    }
)
def test_opcheck(method, dim, channels_last, dtype):
    x = torch.randn(2, 3, 4, 5, dtype=dtype)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    torch.library.opcheck(optimal_clip.default, (x, cold(x, dim), integers(4, True, dim), method))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dim", [None, 1])
def test_the_host_reads_no_value(method, dim):
    x = torch.empty(3, 5, device="meta")
    hint = torch.empty(clip_shape(x, dim), device="meta")
    assert reference.optimal_clip(x, hint, integers(4, True, dim), method).shape == clip_shape(x, dim)


@pytest.mark.parametrize("method", METHODS)
def test_without_kernels_the_reference_runs(monkeypatch, method):
    monkeypatch.setattr(cpu, "library", lambda: None)
    x = torch.randn(5, 100)
    clip = optimal_clip(x, torch.zeros(5), integers(4, True, 0), method)
    assert torch.equal(clip, reference.optimal_clip(x, torch.zeros(5), integers(4, True, 0), method))


def test_rows_are_the_channels():
    x = torch.randn(3, 4, 5) * torch.tensor([1.0, 10, 100, 1000]).reshape(1, 4, 1)
    clip = optimal_clip(x, torch.zeros(4), integers(4, True, 1), "octav")
    for channel, row in enumerate(to_rows(x, 1)):
        assert clip[channel].item() == pytest.approx(fixed_point(row, 4, True), rel=1e-6)


SOLVERS = {"reference": reference.optimal_clip, "kernel": optimal_clip}


@pairwise({"solve": SOLVERS.values(), "bits": range(2, 9), "signed": [True, False], "elements": [1, 3, 7]})
def test_octav_grid_of_one_value_puts_the_highest_level_on_it(solve, bits, signed, elements):
    value = torch.rand(2000) + 0.01
    x = value.unsqueeze(-1).expand(-1, elements).contiguous()
    grid = Grid(bits, signed)
    for factor in (0, 0.95, 1.05, 100):
        clip = solve(x, value * factor, integers(bits, signed, 0), "octav-grid")
        torch.testing.assert_close(clip * grid.high / grid.steps, value, rtol=2e-6, atol=0)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("elements", [1, 4, 9])
def test_kernel_finds_what_the_reference_finds_on_short_rows(bits, signed, elements):
    x = torch.randn(5000, elements)
    for hint in (torch.zeros(5000), torch.ones(5000), x.abs().amax(-1)):
        expected = reference.optimal_clip(x, hint, integers(bits, signed, 0), "octav-grid")
        torch.testing.assert_close(
            optimal_clip(x, hint, integers(bits, signed, 0), "octav-grid"), expected, rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("hint", [50.0, 100.0, 400.0, 500.0])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_octav_grid_returns_from_a_hint_among_the_outliers(solve, hint, bits):
    x = torch.randn(100_000)
    x[0] = -500
    cold = solve(x, torch.tensor(0.0), integers(bits, True, None), "octav-grid")
    torch.testing.assert_close(
        solve(x, torch.tensor(hint), integers(bits, True, None), "octav-grid"), cold, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("method", ["octav", "octav-grid"])
def test_sums_beyond_float32_leave_a_clip(solve, method):
    assert solve(torch.full((10,), 3e38), torch.tensor(0.0), integers(4, True, None), method).isfinite()
