"""torch.ops.octav.integer_conv: a convolution of codes, exact, and what follows it, in one pass."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from octav_fx.ops import onednn
from octav_fx.ops.integer_conv import reference
from octav_fx.ops.integer_linear import op as linear_op
from octav_fx.ops.register import register_allocating

_LAYOUTS = {3: torch.contiguous_format, 4: torch.channels_last, 5: torch.channels_last_3d}


class Call(NamedTuple):
    """The arguments of integer_conv, by name; reference.py says what they are."""

    x: Tensor
    x_scale: Tensor
    x_bits: int
    x_signed: bool
    w: Tensor
    w_scale: Tensor
    shape: list[int]
    bias: Tensor | None
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    low: float | None = None
    high: float | None = None
    step: Tensor | None = None
    bits: int = 8
    signed: bool = False

    @property
    def window(self) -> tuple[list[int], list[int], list[int], int]:
        """Return how the filters move."""
        return self.stride, self.padding, self.dilation, self.groups


def _empty(*args: Any) -> Tensor:
    call = Call(*args)
    x, weight = (torch.empty(shape, device="meta") for shape in (call.x.shape, call.shape))
    y = reference.CONVOLUTIONS[call.x.dim()](x, weight, None, *call.window)
    dtype = torch.float32 if call.step is None else torch.uint8
    if y.dim() == 3:
        # As oneDNN leaves it: channels last.
        return call.x.new_empty((y.shape[0], y.shape[2], y.shape[1]), dtype=dtype).transpose(1, 2)
    return torch.empty(y.shape, dtype=dtype, device=call.x.device, memory_format=_LAYOUTS[y.dim()])


def _cpu(*args: Any) -> Tensor | None:
    call = Call(*args)
    reference.check(call.x, call.w, call.x_scale, call.w_scale, call.shape, call.bias)
    if not call.x.numel() or _is_wrong(call):
        return None
    if call.groups == 1 and not any(call.padding) and all(size == 1 for size in call.shape[2:]):
        return _pointwise(call)
    if call.x.dim() == 3:
        y = _cpu(*_planar(call))
        return None if y is None else y.squeeze(2)
    last = onednn.epilogue(call.low, call.high, call.step, call.bits, call.signed)
    if call.x.dim() == 5 and last[3] != "none":
        # Which oneDNN is not given in three dimensions.
        y = _cpu(*call._replace(low=None, high=None, step=None))
        return None if y is None else reference.ended(y, call.low, call.high, call.step, call.bits, call.signed)
    zero, window = onednn.zero_point(call.x_bits, call.x_signed), call.window
    scale = onednn.channel_scale(call.x_scale, call.w_scale, call.shape[0])

    def pack(w: Tensor) -> Tensor:
        made: Tensor = torch.ops.onednn.qconv_prepack(w, scale, 1.0, zero, *window, None)
        return made

    key = zero, *map(tuple, window[:3]), call.groups
    w = onednn.packed(call.w, tuple(call.shape), call.x_bits, key, pack)
    if w is None:
        return None
    bias = None if call.bias is None else call.bias.to(torch.float32)
    operands = call.x, 1.0, zero, w, scale, onednn.zeros(call.shape[0]), bias
    return torch.ops.onednn.qconv_pointwise.default(*operands, *window, *last)


def _is_wrong(call: Call) -> bool:
    """Tell whether oneDNN computes a convolution wrongly (torch 2.13; found by comparing with the reference).

    Where a filter fits into the padding, its compensation for the zero point is that of another place. Where each
    group has one input and strides leave one column, it reads beyond the rows.
    """
    extents = [d * (k - 1) + 1 for d, k in zip(call.dilation, call.shape[2:], strict=True)]
    if any(p >= extent for p, extent in zip(call.padding, extents, strict=True)):
        return True
    columns = (call.x.shape[-1] + 2 * call.padding[-1] - extents[-1]) // call.stride[-1] + 1
    return call.shape[1] == 1 and call.stride[-1] > 1 and columns == 1


def _pointwise(call: Call) -> Tensor | None:
    """Filters of one element: a matmul at each position; as a convolution oneDNN can take ten times as long."""
    x, rows = call.x.movedim(1, -1), call.shape[:2]
    if any(step > 1 for step in call.stride):
        # Codes of eight channels are copied as one number. An axis of one element may have any stride.
        places = (rows[1], x.storage_offset(), *x.stride()[:-1])
        by_eight = x.is_contiguous() and not any(place % 8 for place in places)
        x = x.view(torch.int64) if by_eight else x
        for axis, step in enumerate(call.stride, 1):
            x = torch.ops.aten.slice.Tensor(x, axis, 0, None, step)
        x = x.contiguous().view(torch.uint8)
    y = linear_op.linear(
        *(x.reshape(-1, rows[1]), call.x_scale, call.x_bits, call.x_signed, call.w, call.w_scale, rows, call.bias),
        *(call.low, call.high, call.step, call.bits, call.signed),
    )
    return None if y is None else y.reshape(*x.shape[:-1], rows[0]).movedim(-1, 1)


def _planar(call: Call) -> Call:
    """Return a convolution along one axis as one over planes of height 1: oneDNN's own of rank 1 has no clamp."""
    rows, columns, length = call.shape
    return call._replace(
        x=call.x.unsqueeze(2),
        shape=[rows, columns, 1, length],
        stride=[1, *call.stride],
        padding=[0, *call.padding],
        dilation=[1, *call.dilation],
    )


integer_conv = register_allocating(
    "integer_conv",
    "Tensor x, Tensor x_scale, int x_bits, bool x_signed, Tensor w, Tensor w_scale, int[] shape, Tensor? bias, "
    "int[] stride, int[] padding, int[] dilation, int groups, "
    "float? low=None, float? high=None, Tensor? step=None, int bits=8, bool signed=False",
    empty=_empty,
    reference=reference.integer_conv,
    cpu=_cpu,
)
