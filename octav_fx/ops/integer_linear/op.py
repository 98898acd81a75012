"""torch.ops.octav.integer_linear: a linear layer on codes, exact, and what follows it, in one pass."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from octav_fx.ops import onednn, vnni
from octav_fx.ops.integer_conv.reference import check, looked_up
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
    fraction: int = 0
    table: Tensor | None = None


def _empty(*args: Any) -> Tensor:
    call = Call(*args)
    dtype = torch.float32 if call.step is None else torch.uint8
    return call.x.new_empty((*call.x.shape[:-1], call.shape[0]), dtype=dtype)


def _cpu(*args: Any) -> Tensor | None:
    run, x = prepared(*args), args[0]
    return run(x) if run is not None and x.numel() and x.dtype is torch.uint8 else None


def prepared(*args: Any) -> onednn.Run | None:
    """Return what computes integer_linear for all codes of a layer, made once; None: only the reference will do."""
    return onednn.planned(args, lambda: rows_run(Call(*args)))


def rows_run(call: Call) -> onednn.Run | None:
    """Return what multiplies codes [..., K] by a weight; None where only the reference will do."""
    check(call.x, call.w, call.x_scale, call.w_scale, call.shape, call.bias, call.table)
    rows, columns = call.shape
    w = onednn.integers(call.w, (rows, columns))
    if not onednn.is_exact(call, w):
        return None
    if columns % 4 == 0 and (library := vnni.library()) is not None:
        return _by_pass(call, library, w)
    call = onednn.in_steps(call)
    scale = onednn.channel_scale(call.x_scale, call.w_scale, rows)
    bias = onednn.bias_levels(call.bias, scale, call.fraction)
    operands = 1.0, onednn.zero_point(call.x_bits, call.x_signed), torch.ops.onednn.qlinear_prepack(w, None)
    last = onednn.epilogue(call.low, call.high, call.step, call.bits, call.signed)
    multiply, zeros, table = torch.ops.onednn.qlinear_pointwise.default, onednn.zeros(rows), call.table
    return lambda x: multiply(looked_up(x, table), *operands, scale, zeros, bias, *last)


def _by_pass(call: Call, library: Any, w: Tensor) -> onednn.Run | None:
    if (found := vnni.operands(call, w)) is None:
        return None
    w, *each_channel = found
    rows, columns = call.shape
    is_float, *last = vnni.ending(call)
    dtype, multiply = torch.float32 if is_float else torch.uint8, library.octav_integer_linear
    parts = [vnni.packed(w), *map(vnni.padded, each_channel)]
    table = None if call.table is None else call.table.contiguous()

    def run(x: Tensor) -> Tensor:
        x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], rows), dtype=dtype)
        sizes, pointers = (x.numel() // columns, columns, rows), map(Tensor.data_ptr, parts)
        first = x.data_ptr(), None if table is None else table.data_ptr()
        multiply(*first, *pointers, y.data_ptr(), *sizes, is_float, *last, torch.get_num_threads())
        return y

    return run


integer_linear = register_allocating(
    "integer_linear",
    "Tensor x, Tensor x_scale, int x_bits, bool x_signed, Tensor w, Tensor w_scale, int[] shape, Tensor? bias, "
    "float? low=None, float? high=None, Tensor? step=None, int bits=8, bool signed=False, "
    "int fraction=0, Tensor? table=None",
    empty=_empty,
    reference=reference.integer_linear,
    cpu=_cpu,
)
