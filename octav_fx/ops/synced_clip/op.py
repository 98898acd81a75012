"""torch.ops.octav.synced_clip: the clip of a tensor whose parts lie on several ranks.

One op with its collectives inside, so that a compiled graph has it whole. Graphs compiled from the same code run their
ops in the same order on every rank, as collectives need it.
"""

import torch
from torch import Tensor

from octav_fx.clips.distributed import has_others
from octav_fx.formats.spec import spec_of
from octav_fx.ops.register import register_op
from octav_fx.ops.synced_clip import reference


def _empty(x: Tensor, hint: Tensor, spec: str, method: str) -> Tensor:
    return x.new_empty(spec_of(spec).clip_shape(x.shape), dtype=torch.float32)


def _alone(x: Tensor, hint: Tensor, spec: str, method: str, out: Tensor) -> bool:
    """Return where there are no other ranks: by the op for that, so that each device runs the kernel it has."""
    if has_others():
        return False
    torch.ops.octav.optimal_clip(x, hint, spec, method, out=out)
    return True


synced_clip = register_op(
    "synced_clip",
    "Tensor x, Tensor hint, str spec, str method",
    empty=_empty,
    reference=reference.synced_clip,
    cpu=_alone,
    cuda=_alone,
)
