"""torch.ops.octav.code_mean: the codes of the mean of codes over the positions of an image, in one pass."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from octav_fx.ops import cpu
from octav_fx.ops.code_mean import reference
from octav_fx.ops.register import register_op


class Call(NamedTuple):
    """The arguments of code_mean, by name; reference.py says what they are."""

    x: Tensor
    x_scale: Tensor
    step: Tensor
    x_bits: int
    x_signed: bool
    bits: int
    signed: bool
    keepdim: bool
    low: float | None = None
    high: float | None = None


# So many positions have a sum in int32.
_POSITIONS = 2**23


def _empty(*args: Any) -> Tensor:
    call = Call(*args)
    images, channels = call.x.shape[:2]
    return call.x.new_empty((images, channels, 1, 1) if call.keepdim else (images, channels))


def _cpu(*args: Any, out: Tensor) -> bool:
    call, library = Call(*args), cpu.library()
    images, channels, *sizes = call.x.shape
    positions = sizes[0] * sizes[1]
    # Of no position, the reference says what 0 / 0 is.
    if library is None or not 0 < positions <= _POSITIONS or not out.is_contiguous():
        return False
    x = call.x.contiguous(memory_format=torch.channels_last)
    scale, step = (cpu.checked(value, ()) for value in (call.x_scale, call.step))
    library.octav_code_mean(
        *(x.data_ptr(), scale.data_ptr(), step.data_ptr(), out.data_ptr(), images, positions, channels),
        *(call.x_bits, call.x_signed, call.bits, call.signed, *cpu.bounds(call.low, call.high)),
    )
    return True


code_mean = register_op(
    "code_mean",
    "Tensor x, Tensor x_scale, Tensor step, int x_bits, bool x_signed, int bits, bool signed, bool keepdim, "
    "float? low=None, float? high=None",
    empty=_empty,
    reference=reference.code_mean,
    cpu=_cpu,
)
