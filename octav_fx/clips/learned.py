"""Clips that are parameters: PACT learns the clip (arXiv 1805.06085), LSQ the step (arXiv 1902.08153).

Here as everywhere steps * step = clip. PACT's own grid has its highest level on the clip, this one a step below it.
For LSQ the grid is the paper's: Q_N = -low, Q_P = high. A value equal to a bound counts as inside.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from octav_fx.clips.newton import power_of_two
from octav_fx.formats.format import Format, magnitudes, representable

# An optimizer may take a parameter past zero: then its magnitude counts, and what would have gone on to zero grows
# again. MQBench sets the parameters of LSQ to their magnitudes in each forward, and to no less than this; the papers
# say nothing. Clamping alone would leave a channel at nothing for as long as its parameter is below zero.
MIN_CLIP: Final = torch.finfo(torch.float32).eps


@dataclass(frozen=True, slots=True)
class Learned:
    """One method. Every function takes rows of x [R, N] and a clip [R] or [R, 1]."""

    # Whether the parameter is the step, not the clip.
    is_step: bool
    # Rows of data, grid -> where the clip begins, [R]; 0 for a row of zeros.
    init_from_data: Callable[[Tensor, Format], Tensor]
    # Where x lets its gradient through, [R, N]: bool.
    inside: Callable[[Tensor, Tensor, Format], Tensor]
    # The derivative of the rounded x by the parameter, [R, N].
    slope: Callable[[Tensor, Tensor, Format], Tensor]
    # Elements that share the parameter, grid -> what the parameter's gradient is multiplied with.
    scale: Callable[[int, Format], float]


def _pact_begin(x: Tensor, form: Format) -> Tensor:
    """Return the largest magnitude, as PACT begins far out: the L2 penalty brings it in."""
    return magnitudes(x, form).amax(-1)


def _pact_inside(x: Tensor, clip: Tensor, form: Format) -> Tensor:
    return (x.abs() <= clip) & (x >= 0 if not form.signed else True)


def _pact_slope(x: Tensor, clip: Tensor, form: Format) -> Tensor:
    """Return 1 above the clip (eq. 3), 0 inside, and -1 below -clip on a signed grid, which PACT's paper lacks."""
    return torch.where(x.abs() > clip, x.sign() if form.signed else (x > 0).to(x.dtype), 0)


def _lsq_begin(x: Tensor, form: Format) -> Tensor:
    """Return the clip of step 2 * mean|x| / sqrt(Q_P) (section 2.1)."""
    finite = x.isfinite()
    magnitude = torch.where(finite, x.abs(), 0)
    # No sum overflows.
    scale = power_of_two(magnitude.amax(-1))
    mean = (magnitude / scale.unsqueeze(-1)).sum(-1) / finite.sum(-1).clamp(min=1)
    return form.steps * 2 * mean / form.greatest**0.5 * scale


def _lsq_inside(x: Tensor, clip: Tensor, form: Format) -> Tensor:
    code = x / form.step(clip)
    return (code >= form.least) & (code <= form.greatest)


def _lsq_slope(x: Tensor, clip: Tensor, form: Format) -> Tensor:
    """Return round(x / step) - x / step inside, -Q_N below and Q_P above (eq. 3)."""
    code = x / form.step(clip)
    bounded = code.clamp(form.least, form.greatest)
    return form.round(bounded) - torch.where(code == bounded, code, 0)


LEARNED: Final[dict[str, Learned]] = {
    "pact": Learned(False, _pact_begin, _pact_inside, _pact_slope, lambda count, form: 1.0),
    # Section 2.2: 1 / sqrt(N * Q_P).
    "lsq": Learned(
        True, _lsq_begin, _lsq_inside, _lsq_slope, lambda count, form: (max(count, 1) * form.greatest) ** -0.5
    ),
}


def clip_from_parameter(parameter: Tensor, form: Format, method: str) -> Tensor:
    """Return the clip that a parameter [...] stands for, [...]: positive and finite, whatever came of it."""
    held = parameter.abs().clamp(min=MIN_CLIP)
    return representable(held * form.steps if LEARNED[method].is_step else held, torch.float32)


def sign_of(parameter: Tensor) -> Tensor:
    """Return the derivative of the magnitude of a parameter [...] with respect to it, [...]: 1, or -1 below zero."""
    return torch.where(parameter < 0, -1.0, 1.0)


def parameter_for(clip: Tensor, form: Format, method: str) -> Tensor:
    """Return the parameter [...] that stands for a clip [...]."""
    return form.step(clip) if LEARNED[method].is_step else clip


def initial_clip(x: Tensor, form: Format, method: str) -> Tensor:
    """Return where the clip begins for rows x [R, N] -> [R]; 1 where a row has nothing but zeros, inf and NaN."""
    if x.shape[-1] == 0:
        return x.new_ones(x.shape[:-1])
    clip = LEARNED[method].init_from_data(x, form)
    return torch.where(clip > 0, representable(clip, torch.float32), 1)
