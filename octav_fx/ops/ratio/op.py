"""torch.ops.octav.ratio: how many steps a value is, as Inductor generates it for a GPU.

An exact division there leaves its fast path for a zero, and half of what follows a relu are zeros: they took it twice
the time. With the step's reciprocal known it is two products and three sums, the same for every number.
"""

import torch
from torch import Tensor

from octav_fx.ops.ratio import reference
from octav_fx.ops.register import register_op


def _empty(x: Tensor, step: Tensor) -> Tensor:
    return torch.empty_like(x)


ratio = register_op("ratio", "Tensor x, Tensor step", empty=_empty, reference=reference.ratio)
