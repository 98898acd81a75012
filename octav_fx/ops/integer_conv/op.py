"""torch.ops.octav.integer_conv, integer_conv_add_: a convolution of codes, exact, and what follows it, in one pass."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from octav_fx.formats.grid import Grid
from octav_fx.ops import onednn
from octav_fx.ops.integer_conv import reference
from octav_fx.ops.register import register_allocating, register_writing

_LAYOUTS = {3: torch.contiguous_format, 4: torch.channels_last, 5: torch.channels_last_3d}
_OPERANDS = (
    "Tensor x, Tensor x_scale, int x_bits, bool x_signed, Tensor w, Tensor w_scale, int[] shape, Tensor? bias, "
    "int[] stride, int[] padding, int[] dilation, int groups"
)


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
        """How the filters move."""
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


def _operands(call: Call) -> tuple[Any, ...]:
    """The first arguments of oneDNN's calls, up to groups."""
    reference.check(call.x, call.w, call.x_scale, call.w_scale, call.shape, call.bias)
    zero, shape = -Grid(call.x_bits, call.x_signed).low, tuple(call.shape)
    scale = (call.x_scale * call.w_scale).expand(shape[0]).contiguous()

    def pack() -> Tensor:
        codes = onednn.integers(call.w, shape)
        packed: Tensor = torch.ops.onednn.qconv_prepack(codes, scale, 1.0, zero, *call.window, None)
        return packed

    packed = onednn.derived(call.w, (zero, *map(tuple, call.window[:3]), call.groups), pack)
    return call.x, 1.0, zero, packed, scale, onednn.zeros(shape[0])


def _bias(call: Call) -> Tensor | None:
    return None if call.bias is None else call.bias.to(torch.float32)


def _cpu(*args: Any) -> Tensor | None:
    call = Call(*args)
    if not onednn.is_exact(call.x, call.x_bits, call.w, tuple(call.shape)):
        return None
    if call.x.dim() == 3:
        y = _cpu(*_planar(call))
        return None if y is None else y.squeeze(2)
    last = onednn.epilogue(call.low, call.high, call.step, call.bits, call.signed)
    if call.x.dim() == 5 and last[3] != "none":
        # Which oneDNN is not given in three dimensions.
        y = _cpu(*call._replace(low=None, high=None, step=None))
        return None if y is None else reference.ended(y, call.low, call.high, call.step, call.bits, call.signed)
    return torch.ops.onednn.qconv_pointwise.default(*_operands(call), _bias(call), *call.window, *last)


def _planar(call: Call) -> Call:
    """A convolution along one axis as one over planes of height 1: oneDNN's own of rank 1 has no clamp."""
    rows, columns, length = call.shape
    return call._replace(
        x=call.x.unsqueeze(2),
        shape=[rows, columns, 1, length],
        stride=[1, *call.stride],
        padding=[0, *call.padding],
        dilation=[1, *call.dilation],
    )


def _add_reference(total: Tensor, relu: bool, *args: Any) -> None:
    total.add_(reference.integer_conv(*args))
    if relu:
        total.relu_()


def _add_cpu(total: Tensor, relu: bool, *args: Any) -> bool:
    call = Call(*args)
    fits = total.dim() == 4 and total.dtype is torch.float32 and total.is_contiguous(memory_format=torch.channels_last)
    if not fits or not onednn.is_exact(call.x, call.x_bits, call.w, tuple(call.shape)):
        return False
    torch.ops.onednn.qconv2d_pointwise.binary(
        *(*_operands(call), total, _bias(call), *call.window),
        *(1.0, 0, torch.float32, 1.0, 0, "sum", 1.0, "relu" if relu else None, [], ""),
    )
    return True


integer_conv = register_allocating(
    "integer_conv",
    f"{_OPERANDS}, float? low=None, float? high=None, Tensor? step=None, int bits=8, bool signed=False",
    empty=_empty,
    reference=reference.integer_conv,
    cpu=_cpu,
)
integer_conv_add_ = register_writing(
    "integer_conv_add_", f"Tensor(a!) total, bool relu, {_OPERANDS}", reference=_add_reference, cpu=_add_cpu
)
