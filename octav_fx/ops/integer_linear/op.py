"""torch.ops.octav.integer_linear: a linear layer on codes, exact, and what follows it, in one pass."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from octav_fx.ops import onednn
from octav_fx.ops.integer_conv.reference import check
from octav_fx.ops.integer_linear import reference
from octav_fx.ops.register import register_allocating


class Call(NamedTuple):
    """The arguments of integer_linear, by name; reference.py says what they are."""

    x: Tensor
    x_scale: Tensor
    x_bits: int
    x_signed: bool
    w: Tensor
    w_scale: Tensor
    shape: list[int]
    bias: Tensor | None
    low: float | None = None
    high: float | None = None
    step: Tensor | None = None
    bits: int = 8
    signed: bool = False


def _empty(*args: Any) -> Tensor:
    call = Call(*args)
    dtype = torch.float32 if call.step is None else torch.uint8
    return call.x.new_empty((*call.x.shape[:-1], call.shape[0]), dtype=dtype)


def linear(*args: Any) -> Tensor | None:
    """Run oneDNN's matmul; None where only the reference will do."""
    call = Call(*args)
    check(call.x, call.w, call.x_scale, call.w_scale, call.shape, call.bias)
    rows, columns = call.shape
    w = onednn.packed(call.w, (rows, columns), call.x_bits, "linear", _pack) if call.x.numel() else None
    if w is None:
        return None
    y: Tensor = torch.ops.onednn.qlinear_pointwise.default(
        *(call.x.reshape(-1, columns), 1.0, onednn.zero_point(call.x_bits, call.x_signed), w),
        *(onednn.channel_scale(call.x_scale, call.w_scale, rows), onednn.zeros(rows)),
        None if call.bias is None else call.bias.to(torch.float32),
        *onednn.epilogue(call.low, call.high, call.step, call.bits, call.signed),
    )
    return y.reshape(*call.x.shape[:-1], rows)


def _pack(w: Tensor) -> Tensor:
    made: Tensor = torch.ops.onednn.qlinear_prepack(w, None)
    return made


integer_linear = register_allocating(
    "integer_linear",
    "Tensor x, Tensor x_scale, int x_bits, bool x_signed, Tensor w, Tensor w_scale, int[] shape, Tensor? bias, "
    "float? low=None, float? high=None, Tensor? step=None, int bits=8, bool signed=False",
    empty=_empty,
    reference=reference.integer_linear,
    cpu=linear,
)
