"""The kernels at the sizes and with the constants of production: all of a GPU's programs, 64-bit offsets, full bins.

Without a GPU the same lines run interpreted on small tensors, so that they are known to work.
"""

import math

import pytest
import torch

from octav_fx.formats.grid import Grid
from octav_fx.formats.spec import integers
from octav_fx.ops.dequantize import reference as dequantize_reference
from octav_fx.ops.fake_quantize import reference
from octav_fx.ops.quantize import reference as quantize_reference
from tests.support.compare import assert_same_bits
from tests.support.interpreter import DEVICE, poisoned

optimal_clip = pytest.importorskip("octav_fx.ops.optimal_clip.kernel").optimal_clip
kernels = pytest.importorskip("octav_fx.ops.fake_quantize.kernel")
quantize = pytest.importorskip("octav_fx.ops.quantize.kernel").quantize
dequantize = pytest.importorskip("octav_fx.ops.dequantize.kernel").dequantize

pytestmark = pytest.mark.gpu
ON_GPU = DEVICE == "cuda"
SIZES = [2**14 + 1, 2**20 + 3, 2**24, 2**27] if ON_GPU else [2**14 + 1]
# More elements than 31 bits count, in half precision 4 GB.
WIDEST = 2**31 + 17 if ON_GPU else 2**12 + 17
REPEATS = 200 if ON_GPU else 2
# Elements that are looked at together in float64.
PIECE = 2**26

DRAWS = {
    "normal": torch.randn,
    # Much of it lies above any bound.
    "uniform": torch.rand,
    # One bin holds a third of it.
    "relu6": lambda n, device: torch.randn(n, device=device).mul_(8).clamp_(0, 6),
    "one value": lambda n, device: torch.full((n,), 0.37, device=device),
}


def fixed_point(x: torch.Tensor, clip: float, grid: Grid) -> float:
    """Return where the paper's step (eq. 6) goes from a clip, in float64."""
    total, above, nonzero = 0.0, 0, 0
    for piece in x.split(PIECE):
        magnitude = piece.double().abs()
        over = magnitude >= clip
        total += float(magnitude[over].sum())
        above += int(over.sum())
        nonzero += int((magnitude > 0).sum())
    return total / (grid.noise * (nonzero - above) + above)


def solved(x: torch.Tensor, hint: float, bits: int, signed: bool) -> torch.Tensor:
    out = torch.full((), math.nan, device=DEVICE)
    assert optimal_clip(x, torch.tensor(hint, device=DEVICE), integers(bits, signed, None), "octav", out=out)
    return out


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_clip_is_the_fixed_point_from_any_hint_every_time(n, draw, dtype):
    torch.manual_seed(0)
    x = DRAWS[draw](n, device=DEVICE).to(dtype)
    signed = draw == "normal"
    cold = solved(x, 0.0, 4, signed)
    # A float32 of float64 sums: half a unit of its last place, and as much where its own rounding moves the sums.
    assert fixed_point(x, float(cold), Grid(4, signed)) == pytest.approx(float(cold), rel=2**-22)
    for repeat in range(REPEATS if n == SIZES[-1] else 2):
        assert solved(x, float(cold) * (0.8 + 0.4 * (repeat % 2)), 4, signed).equal(cold)


@pytest.mark.parametrize("n", [*SIZES, WIDEST])
@pytest.mark.parametrize("signed", [True, False])
def test_codes_levels_and_gradients_are_those_of_the_references(n, signed):
    torch.manual_seed(0)
    x = torch.randn(n, device=DEVICE, dtype=torch.bfloat16)
    clip = torch.tensor(2.0, device=DEVICE)
    codes = torch.empty_like(x, dtype=Grid(4, signed).codes_dtype).fill_(77)
    assert quantize(x, clip, integers(4, signed, None), out=codes)
    levels = poisoned(x)
    assert dequantize(codes, clip, integers(4, signed, None), torch.bfloat16, out=levels)
    for at in range(0, n, max(PIECE, n // 4)):
        part, of = x[at : at + 4096], codes[at : at + 4096]
        assert of.equal(quantize_reference.quantize(part, clip, integers(4, signed, None)))
        expected = dequantize_reference.dequantize(of, clip, integers(4, signed, None), torch.bfloat16)
        assert_same_bits(levels[at : at + 4096], expected)
    assert codes[-4096:].equal(quantize_reference.quantize(x[-4096:], clip, integers(4, signed, None)))
    del codes
    rounded = poisoned(x)
    assert kernels.fake_quantize(x, clip, integers(4, signed, None), "pwl", out=rounded)
    assert_same_bits(rounded[-4096:], reference.fake_quantize(x[-4096:], clip, integers(4, signed, None), "pwl"))
    gradient = poisoned(x)
    assert kernels.fake_quantize_backward(rounded, x, clip, integers(4, signed, None), "pwl", out=gradient)
    expected = reference.fake_quantize_backward(rounded[-4096:], x[-4096:], clip, integers(4, signed, None), "pwl")
    assert_same_bits(gradient[-4096:], expected)
