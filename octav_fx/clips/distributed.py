"""The clip of a tensor whose parts lie on several processes: each computes its sums, and the totals decide.

Layers are solved one after another, since what comes into one depends on the clips before it, so there is no collective
for a whole model at once. Per operand there is one for the largest magnitude, and then, but for "max", one for the
mean, one for each Newton step until nothing moves (some three to six from the hint of the last call, STEPS
at most) and, for "octav-grid", one for the neighbours' errors. Each takes a few numbers for each row.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from octav_fx.clips.methods import METHODS, stored
from octav_fx.clips.newton import power_of_two
from octav_fx.formats.format import magnitudes
from octav_fx.formats.scales import scale_for
from octav_fx.formats.spec import Spec

_APART: Final = ContextVar("apart", default=False)


@contextmanager
def no_sync() -> Iterator[None]:
    """Let this process solve by itself inside: what one rank alone runs must not wait for the others."""
    token = _APART.set(True)
    try:
        yield
    finally:
        _APART.reset(token)


def has_others() -> bool:
    """Tell whether there are other processes to agree with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 and not _APART.get()


def all_reduced_clip(rows: Tensor, hint: Tensor, spec: Spec, method: str) -> Tensor:
    """Return the clip [R] of what all ranks hold; rows [R, N] (float32 or float64, N of this rank), hint [R].

    The same on every rank, whatever its hint is. Every rank of the default process group has to call.
    """
    form = spec.format
    magnitude = magnitudes(rows, form)
    extent = torch.where(rows.isfinite(), rows.abs(), 0)
    known = torch.where((hint > 0) & hint.isfinite(), hint, 0).to(rows.dtype)
    # One hint for all: from different ones the ranks would ask for sums at different clips.
    agreed = torch.stack([_greatest(extent), _greatest(magnitude), known])
    dist.all_reduce(agreed, dist.ReduceOp.MAX)
    extent, largest, hint = agreed.unbind()
    unit = scale_for(extent.amax(), form)
    if method == "max":
        return stored(largest, spec, unit)
    scale = power_of_two(extent)
    clip = METHODS[method].solve(rows / scale.unsqueeze(-1), hint / scale, form, _over_ranks) * scale
    return stored(clip, spec, unit)


def _greatest(rows: Tensor) -> Tensor:
    return rows.amax(-1) if rows.shape[-1] else rows.new_zeros(rows.shape[0])


def _over_ranks(*sums: Tensor) -> tuple[Tensor, ...]:
    """Return the totals of the ranks' sums, in one collective; added up in float64."""
    totals = torch.stack([value.double() for value in sums])
    dist.all_reduce(totals)
    return totals.to(sums[0].dtype).unbind()
