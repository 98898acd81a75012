import pytest
import torch

from octav_fx.clips.gradients import GRADIENTS

X = [-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0]


@pytest.mark.parametrize(
    ("gradient", "signed", "factors"),
    [
        ("ste", True, [1, 1, 1, 1, 1, 1, 1]),
        ("ste", False, [1, 1, 1, 1, 1, 1, 1]),
        # |x| == clip == 2 counts as inside.
        ("pwl", True, [0, 1, 1, 1, 1, 1, 0]),
        ("pwl", False, [0, 0, 0, 1, 1, 1, 0]),
        ("mad", True, [0.5, 1, 1, 1, 1, 1, 0.5]),
        ("mad", False, [0, 0, 0, 1, 1, 1, 0.5]),
    ],
)
def test_factors_for_a_clip_of_two(gradient, signed, factors):
    result = GRADIENTS[gradient](torch.tensor(X), torch.tensor(2.0), signed)
    assert result.tolist() == factors


@pytest.mark.parametrize(
    ("gradient", "signed", "factors"),
    [
        ("pwl", True, [0, 0, 0, 1, 0, 0, 0]),
        ("pwl", False, [0, 0, 0, 1, 0, 0, 0]),
        ("mad", True, [0, 0, 0, 1, 0, 0, 0]),
        ("mad", False, [0, 0, 0, 1, 0, 0, 0]),
    ],
)
def test_a_zero_clip_lets_only_zeros_through_and_makes_no_nan(gradient, signed, factors):
    result = GRADIENTS[gradient](torch.tensor(X), torch.tensor(0.0), signed)
    assert result.tolist() == factors


@pytest.mark.parametrize("gradient", ["pwl", "mad"])
def test_the_next_number_after_the_clip_is_outside(gradient):
    clip = torch.tensor(1.0)
    after = torch.nextafter(clip, torch.tensor(2.0))
    # In float64, where clip / after does not round to 1.
    factor = GRADIENTS[gradient](torch.stack([clip, after, -clip, -after]).double(), clip.double(), True)
    assert (factor == 1).tolist() == [True, False, True, False]


@pytest.mark.parametrize("gradient", ["pwl", "mad"])
def test_minus_zero_is_inside_an_unsigned_grid(gradient):
    assert GRADIENTS[gradient](torch.tensor([-0.0]), torch.tensor(1.0), False).tolist() == [1]


@pytest.mark.parametrize("signed", [True, False])
def test_magnitude_aware_factor_is_what_clipping_multiplies_by(signed):
    # Proposition 4.3: clip(x) = factor * x. Two roundings, of the quotient and of the product.
    x, clip = torch.randn(10_000), torch.tensor(0.7)
    clipped = x.clamp(-clip if signed else 0.0, clip)
    torch.testing.assert_close(GRADIENTS["mad"](x, clip, signed) * x, clipped, rtol=2**-22, atol=0)


@pytest.mark.parametrize("signed", [True, False])
def test_piecewise_linear_factor_is_the_slope_of_clipping(signed):
    x, clip, h = torch.randn(10_000, dtype=torch.float64), 0.7, 1e-6
    low = -clip if signed else 0.0
    x = x[((x - low).abs() > h) & ((x - clip).abs() > h)]
    slope = ((x + h).clamp(low, clip) - (x - h).clamp(low, clip)) / (2 * h)
    # x + h and x - h are rounded to 2**-53 of at most 5, over 2 * h: 6e-10.
    torch.testing.assert_close(GRADIENTS["pwl"](x, torch.tensor(clip), signed), slope, rtol=0, atol=1e-9)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_each_channel_has_its_own_clip(gradient):
    x, clip = torch.randn(3, 5), torch.tensor([0.1, 1.0, 3.0])
    together = GRADIENTS[gradient](x, clip.unsqueeze(-1), True)
    for row in range(3):
        assert torch.equal(together[row], GRADIENTS[gradient](x[row], clip[row], True))


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_have_the_dtype_of_x(gradient, dtype):
    assert GRADIENTS[gradient](torch.randn(3, dtype=dtype), torch.tensor(1.0, dtype=dtype), True).dtype is dtype
