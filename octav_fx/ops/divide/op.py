"""torch.ops.octav.divide: a quotient rounded to the nearest, in code that Inductor generates, too.

Inductor's own division of float32 is an approximation on a GPU, and would move values that lie half-way between two
levels. Eager torch divides exactly: this op is for compiled graphs.
"""

import torch
from torch import Tensor

from octav_fx.ops.divide import reference
from octav_fx.ops.register import register_op


def _empty(x: Tensor, y: Tensor) -> Tensor:
    return torch.empty_like(x + y)


divide = register_op("divide", "Tensor x, Tensor y", empty=_empty, reference=reference.divide)
