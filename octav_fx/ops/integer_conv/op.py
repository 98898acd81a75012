"""torch.ops.octav.integer_conv: a convolution of codes, exact, and what follows it, in one pass."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from octav_fx.ops import onednn, vnni
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
    fraction: int = 0
    table: Tensor | None = None

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
    run, x = prepared(*args), args[0]
    return run(x) if run is not None and x.numel() and x.dtype is torch.uint8 else None


def prepared(*args: Any) -> onednn.Run | None:
    """Return what computes integer_conv for all codes of a layer, made once; None: only the reference will do."""
    return onednn.planned(args, lambda: _run(Call(*args)))


def _run(call: Call) -> onednn.Run | None:
    """Return what convolves codes with a weight; None, as its result, too, where only the reference will do."""
    reference.check(call.x, call.w, call.x_scale, call.w_scale, call.shape, call.bias, call.table)
    if call.groups == 1 and not any(call.padding) and all(size == 1 for size in call.shape[2:]):
        return _pointwise(call)
    if call.table is not None:
        return _looked_up(call)
    if call.x.dim() == 3:
        return _planar(call)
    if (run := _depthwise(call)) is not None:
        return run
    if call.x.dim() == 5 and onednn.epilogue(call.low, call.high, call.step, call.bits, call.signed)[3] != "none":
        return _ended(call)
    return _by_onednn(call)


def _by_onednn(call: Call) -> onednn.Run | None:
    call = onednn.in_steps(call)
    w, window = onednn.integers(call.w, tuple(call.shape)), call.window
    geometry = call.shape[2:], call.padding, call.dilation
    if not onednn.is_exact(call, w) or onednn.fits_into_padding(*geometry):
        return None
    zero = onednn.zero_point(call.x_bits, call.x_signed)
    scale = onednn.channel_scale(call.x_scale, call.w_scale, call.shape[0])
    # Packed for images of one size, which says how oneDNN goes about it; for others it may lay the weight out anew.
    shape = list(call.x.shape) if call.x.numel() else None
    packed = torch.ops.onednn.qconv_prepack(w, scale, 1.0, zero, *window, shape)
    bias = onednn.bias_levels(call.bias, scale, call.fraction)
    operands = 1.0, zero, packed, scale, onednn.zeros(call.shape[0]), bias, *window
    last = onednn.epilogue(call.low, call.high, call.step, call.bits, call.signed)
    convolve = torch.ops.onednn.qconv_pointwise.default
    if call.shape[1] > 1 or call.stride[-1] == 1:
        return lambda x: convolve(x, *operands, *last)
    return lambda x: None if _leaves_one_column(call, x) else convolve(x, *operands, *last)


def _leaves_one_column(call: Call, x: Tensor) -> bool:
    """Tell whether strides leave one column: with groups of one input oneDNN then reads too far (torch 2.13)."""
    return (x.shape[-1] + 2 * call.padding[-1] - onednn.extents(call.shape[2:], call.dilation)[-1]) // call.stride[
        -1
    ] == 0


def _pointwise(call: Call) -> onednn.Run | None:
    """Filters of one element: a matmul at each position; as a convolution oneDNN can take ten times as long."""
    rank, ending = call.x.dim(), (call.low, call.high, call.step, call.bits, call.signed, call.fraction)
    multiply = linear_op.rows_run(linear_op.Call(*call[:6], call.shape[:2], call.bias, *ending, call.table))
    if multiply is None:
        return None
    channels_last, channels_first = (0, *range(2, rank), 1), (0, rank - 1, *range(1, rank - 1))
    is_strided = any(step > 1 for step in call.stride)

    def run(x: Tensor) -> Tensor | None:
        x = x.permute(channels_last)
        y = multiply(_strided(x, call.stride) if is_strided else x)
        return None if y is None else y.permute(channels_first)

    return run


def _looked_up(call: Call) -> onednn.Run | None:
    """Look codes up before they are convolved: one takes part in several products."""
    run, table = _run(call._replace(table=None)), call.table
    return None if run is None else lambda x: run(reference.looked_up(x, table))


def _strided(x: Tensor, strides: list[int]) -> Tensor:
    """Return every so many positions of codes [N, ..., C]."""
    # Codes of eight channels are copied as one number. An axis of one element may have any stride.
    places = (x.shape[-1], x.storage_offset(), *x.stride()[:-1])
    by_eight = x.is_contiguous() and not any(place % 8 for place in places)
    x = x.view(torch.int64) if by_eight else x
    for axis, step in enumerate(strides, 1):
        x = torch.ops.aten.slice.Tensor(x, axis, 0, None, step)
    return x.contiguous().view(torch.uint8)


def _depthwise(call: Call) -> onednn.Run | None:
    """Run a filter for each channel by the pass for it; None where there is none."""
    channels, library = call.shape[0], vnni.library()
    is_depthwise = call.x.dim() == 4 and call.groups == channels == call.x.shape[1] and channels % 16 == 0
    if library is None or not is_depthwise or call.step is None:
        return None
    w = onednn.integers(call.w, tuple(call.shape)).reshape(channels, -1)
    if not onednn.is_exact(call, w):
        return None
    if (found := vnni.operands(call, w)) is None:
        return None
    w, *each_channel = found
    zero, fours = onednn.zero_point(call.x_bits, call.x_signed), F.pad(w, (0, -w.shape[1] % 4))
    window = torch.tensor([*call.shape[2:], *call.stride, *call.padding, *call.dilation])
    parts = [vnni.dealt(fours, 4), *map(vnni.dealt, each_channel), window]
    _, *last = vnni.ending(call)
    extents = onednn.extents(call.shape[2:], call.dilation)

    def run(x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1).contiguous()
        count, *sizes = x.shape[:3]
        moves = zip(sizes, call.padding, extents, call.stride, strict=True)
        found = [(size + 2 * padding - extent) // stride + 1 for size, padding, extent, stride in moves]
        y = x.new_empty((count, *found, channels))
        places, pointers = (count, *sizes, channels, *found), map(Tensor.data_ptr, parts)
        library.octav_depthwise(x.data_ptr(), *pointers, y.data_ptr(), *places, zero, *last, torch.get_num_threads())
        return y.permute(0, 3, 1, 2)

    return run


def _planar(call: Call) -> onednn.Run | None:
    """Run a convolution along one axis as one over planes of height 1: oneDNN's own of rank 1 has no clamp."""
    rows, columns, length = call.shape
    run = _run(
        call._replace(
            x=call.x.unsqueeze(2),
            shape=[rows, columns, 1, length],
            stride=[1, *call.stride],
            padding=[0, *call.padding],
            dilation=[1, *call.dilation],
        )
    )
    if run is None:
        return None
    return lambda x: None if (y := run(x.unsqueeze(2))) is None else y.squeeze(2)


def _ended(call: Call) -> onednn.Run | None:
    """Run what follows apart from the convolution, which oneDNN is not given in three dimensions."""
    call = onednn.in_steps(call)
    run = _by_onednn(call._replace(low=None, high=None, step=None))
    ending = call.low, call.high, call.step, call.bits, call.signed
    return None if run is None else lambda x: None if (y := run(x)) is None else reference.ended(y, *ending)


integer_conv = register_allocating(
    "integer_conv",
    "Tensor x, Tensor x_scale, int x_bits, bool x_signed, Tensor w, Tensor w_scale, int[] shape, Tensor? bias, "
    "int[] stride, int[] padding, int[] dilation, int groups, "
    "float? low=None, float? high=None, Tensor? step=None, int bits=8, bool signed=False, int fraction=0, "
    "Tensor? table=None",
    empty=_empty,
    reference=reference.integer_conv,
    cpu=_cpu,
)
