"""What tensors look like in networks, and what a clip for them should be, found without the library's solver."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from octav_fx.formats.grid import Grid


def _laplace(n: int) -> Tensor:
    return torch.distributions.Laplace(0.0, 1.0).sample((n,))


def _student_t(n: int) -> Tensor:
    return torch.distributions.StudentT(4.0).sample((n,))


def _sparse(n: int) -> Tensor:
    return torch.randn(n) * (torch.rand(n) < 0.1)


def _softmax(n: int) -> Tensor:
    return (2 * torch.randn(n // 100, 100)).softmax(-1).flatten()


# Name -> n independent samples.
SAMPLES: dict[str, Callable[[int], Tensor]] = {
    "gaussian": torch.randn,
    "laplace": _laplace,
    "student_t": _student_t,
    "uniform": lambda n: 2 * torch.rand(n) - 1,
    "half_rectified": lambda n: torch.randn(n).relu(),
    "sparse": _sparse,
    "gelu": lambda n: F.gelu(torch.randn(n)),
    "relu6": lambda n: (4 * torch.randn(n)).clamp(0, 6),
    "softmax": _softmax,
}
NON_NEGATIVE = ("half_rectified", "relu6", "softmax")
SIGNS = [(name, signed) for name in SAMPLES for signed in ((True, False) if name in NON_NEGATIVE else (True,))]


def fixed_point(row: Tensor, bits: int, signed: bool) -> float:
    """The fixed point of the paper's recursion for one row [N], in closed form and in float64.

    A clip s is a fixed point where s * D(s) = S(s), with S(s) the sum and n(s) the count of the magnitudes >= s, and
    D(s) = n(s) + c * (N - n(s)), N counting the non-zeros, c = 4**-bits / 3 signed and 4**-bits / 12 unsigned. Take
    g(s) = S(s) - s * D(s) = sum((a - s) over a >= s) - c * s * (N - n(s)). The first sum falls with s, and the second
    term's c * s and N - n(s) both rise: g is strictly decreasing, so there is one s with g >= 0 below it and g < 0
    above. Let a be sorted to fall, S_i the sum of its first i. For s in (a_{i+1}, a_i], n(s) = i, so g(s) >= 0 there
    means s <= S_i / D_i, and the largest such s is min(S_i / D_i, a_i). Where that lies below a_{i+1} it is no such s,
    but then S_{i+1} / D_{i+1} >= S_i / D_i and the next i has a larger one: the maximum over i is the crossing.
    """
    magnitude = row.double().abs() if signed else row.double().clamp(min=0)
    a = magnitude[magnitude > 0].sort(descending=True).values
    n, i = len(a), torch.arange(1, len(a) + 1, dtype=torch.float64)
    noise = 4.0**-bits / (3 if signed else 12)
    return torch.minimum(a.cumsum(0) / (noise * (n - i) + i), a).max().item()


def squared_error(x: Tensor, clip: Tensor, bits: int, signed: bool) -> Tensor:
    """What quantizing rows x [R, N] to the clips [R] costs, [R], float64."""
    grid = Grid(bits, signed)
    step = (clip / grid.steps).unsqueeze(-1)
    return ((x / step).round().clamp(grid.low, grid.high) * step - x).double().square().sum(-1)


def least_error(x: Tensor, bits: int, signed: bool, candidates: int) -> Tensor:
    """The least of squared_error over clips up to the one that clips nothing, [R]: brute force, twice refined."""
    grid = Grid(bits, signed)
    ratio = torch.logspace(-2, 0, candidates).unsqueeze(-1)
    clips = ratio * x.abs().amax(-1) / (grid.high / grid.steps)
    for _ in range(3):
        errors = torch.stack([squared_error(x, clip, bits, signed) for clip in clips])
        least, best = errors.min(0)
        low = clips.gather(0, (best - 1).clamp(min=0).unsqueeze(0))
        high = clips.gather(0, (best + 1).clamp(max=len(clips) - 1).unsqueeze(0))
        clips = low + (high - low) * torch.linspace(0, 1, 15).unsqueeze(-1)
    return least
