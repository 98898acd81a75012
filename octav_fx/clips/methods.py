"""Every method that finds a clip in data, a row for each. Clips that are parameters instead are in learned.py."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from octav_fx.clips.kmeans import kmeans
from octav_fx.clips.mse import mse_search
from octav_fx.clips.newton import max_abs, octav, octav_grid, octav_tight, power_of_two
from octav_fx.clips.percentile import ONE_IN, percentile
from octav_fx.clips.search import Store, search
from octav_fx.errors import OctavError
from octav_fx.formats.format import divided
from octav_fx.formats.grid import Grid
from octav_fx.formats.kmeans import KMeans
from octav_fx.formats.scales import SCALES, tensor_scale
from octav_fx.formats.spec import Spec


@dataclass(frozen=True, slots=True)
class Method:
    """One method: rows [R, N], hint [R], format -> clips [R]."""

    solve: Callable[..., Tensor]
    # Whether sums over all ranks decide it: solve takes what adds them up. Another one needs all values in one place.
    by_sums: bool = False
    # Whether the levels have to be evenly spaced.
    even: bool = False
    # Whether on short rows, and where levels are not even, the least error is found by search.py instead.
    searches: bool = False


METHODS: Final[dict[str, Method]] = {
    "octav": Method(octav, by_sums=True, searches=True),
    "octav-grid": Method(octav_grid, by_sums=True, even=True),
    "octav-tight": Method(octav_tight, by_sums=True, even=True),
    "max": Method(max_abs),
    **{name: Method(percentile(one_in)) for name, one_in in ONE_IN.items()},
    "mse": Method(mse_search, searches=True),
}

# Those that a distributed run can solve for what all ranks hold; the largest magnitude needs one number of each.
SYNCED: Final = (*(name for name, method in METHODS.items() if method.by_sums), "max")


def _store(spec: Spec, rows: Tensor) -> Store:
    """Return what rounds a step to the format of scales of a tensor."""
    if spec.scale == "float32":
        return None
    unit, rounded = tensor_scale(rows, spec.format), SCALES[spec.scale]
    return lambda step: rounded(step, unit)


def stored(clip: Tensor, spec: Spec, unit: Tensor) -> Tensor:
    """Return clips [R] whose steps can be stored; unit [] is the float32 scale of the tensor."""
    if spec.scale == "float32":
        return clip
    return SCALES[spec.scale](divided(clip, spec.format.steps), unit) * spec.format.steps


def checked(spec: Spec, method: str) -> Method:
    """Return a method by its name; raise OctavError where there is none, or it is not for such levels."""
    if method not in METHODS:
        raise OctavError(f"method={method!r}: one of {', '.join(map(repr, METHODS))}")
    found, form = METHODS[method], spec.format
    if found.even and not isinstance(form, (Grid, KMeans)):
        raise OctavError(f"method={method!r} is for evenly spaced levels, not for {form.name}: take 'octav' or 'max'")
    return found


def searches(spec: Spec, method: str) -> bool:
    """Tell whether a method finds the clip of a spec by search.py, or its levels by kmeans.py."""
    found, form = checked(spec, method), spec.format
    return isinstance(form, KMeans) or (found.searches and (spec.granularity.is_short or not isinstance(form, Grid)))


def solve(rows: Tensor, hint: Tensor, spec: Spec, method: str) -> Tensor:
    """Return the clips [R] of rows [R, N]; hint [R] is where to begin, what is found does not depend on it.

    Where the scale has a format of its own, clip / steps is a number of it. Where levels are found in the tensor, they
    are what is returned, the best ones whatever the method is.
    """
    form = spec.format
    if isinstance(form, KMeans):
        unit = _scale(rows)
        return kmeans((rows / unit).squeeze(0), 2**form.bits) * unit.squeeze(0)
    if searches(spec, method):
        return search(rows, form, spec.scale, _store(spec, rows))
    scale = _scale(rows)
    known = torch.zeros_like(hint) if spec.granularity.is_short else hint / scale.squeeze(-1)
    clip = METHODS[method].solve(rows / scale, known, form) * scale.squeeze(-1)
    return clip if spec.scale == "float32" else stored(clip, spec, tensor_scale(rows, form))


def _scale(rows: Tensor) -> Tensor:
    """Return what to divide rows [R, N] by, [R, 1], so that no sum overflows."""
    if rows.shape[-1] == 0:
        return rows.new_ones(rows.shape[0], 1)
    return power_of_two(torch.where(rows.isfinite(), rows.abs(), 0).amax(-1, keepdim=True))
