"""torch.ops.octav.product_of_codes: a layer in training, on the integer codes of its operands.

Two ways, both of oneDNN. As a matmul, [positions, what each reads] times [O, the same]: its weight is read as it lies,
but filters of several positions have what they read copied together first. As a convolution, which reads in place, but
lays its weight out anew in each step.
"""

import ctypes
import math
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from octav_fx.compat.tensors import memory_format_of, multiplies_unsigned_bytes
from octav_fx.ops import cpu, onednn
from octav_fx.ops.product_of_codes import reference
from octav_fx.ops.product_of_codes.choice import Layer
from octav_fx.ops.product_of_codes.reference import grid_of, scale_of
from octav_fx.ops.register import LAYOUT_AGNOSTIC, register_allocating

_SUMS_AT_ONCE: Final = 1 << 17


class Call(NamedTuple):
    """The arguments of product_of_codes, by name; reference.py says what they are."""

    codes: Tensor
    clip: Tensor
    spec: str
    w: Tensor
    w_clip: Tensor
    w_spec: str
    bias: Tensor | None
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    dtype: torch.dtype

    @property
    def window(self) -> tuple[list[int], list[int], list[int], int]:
        """Return how the filters move."""
        return self.stride, self.padding, self.dilation, self.groups


def _shape(call: Call) -> tuple[int, ...]:
    rows, channels = call.codes.shape[0], call.w.shape[0]
    if call.codes.dim() == 2:
        return rows, channels
    sizes = zip(call.codes.shape[2:], call.w.shape[2:], call.stride, call.padding, call.dilation, strict=True)
    return rows, channels, *((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes)


def _empty(*args: Any) -> Tensor:
    call = Call(*args)
    # As the codes lie: tracing has them contiguous where Inductor has their channels last.
    return torch.empty(
        _shape(call), dtype=call.dtype, device=call.codes.device, memory_format=memory_format_of(call.codes)
    )


def _cpu(*args: Any) -> Tensor | None:
    call = Call(*args)
    if cpu.library() is None or call.w.dtype not in cpu.TYPES or call.dtype not in cpu.TYPES or not call.codes.numel():
        return None
    if onednn.refusal(grid_of(call.spec).bits, 2 ** (grid_of(call.w_spec).bits - 1)):
        return None
    x = _activation(call)
    if x is None:
        return None
    shape = _shape(call)
    positions = math.prod(shape) // shape[1]
    layer = Layer(positions, tuple(call.w.shape), tuple(call.padding), tuple(call.dilation), call.groups)
    y = _convolution(call, x) if layer.is_convolved else _matmul(call, x, shape)
    return None if y is None else y.contiguous(memory_format=memory_format_of(call.codes))


def _activation(call: Call) -> Tensor | None:
    """Return codes counted from the lowest, uint8 with channels last; None where something is not finite."""
    grid, library = grid_of(call.spec), cpu.library()
    assert library is not None
    last = torch.channels_last if call.codes.dim() == 4 else torch.contiguous_format
    codes = call.codes.contiguous(memory_format=last)
    x, found = torch.empty_like(codes, dtype=torch.uint8), ctypes.c_int()
    library.octav_operand(
        *(codes.data_ptr(), codes.element_size(), x.data_ptr(), codes.numel(), grid.low, grid.high),
        *(ctypes.addressof(found), torch.get_num_threads()),
    )
    return None if found.value else x


def _weight(call: Call, transposed: bool) -> tuple[Tensor, Tensor] | None:
    """Return the codes of the weight, int8, its inputs last if transposed, and the sum of each filter's, int32."""
    grid, library, w = grid_of(call.w_spec), cpu.library(), call.w.contiguous()
    assert library is not None
    channels, inputs, *kernel = w.shape
    clip = cpu.checked(call.w_clip.expand(channels), (channels,))
    codes = torch.empty((channels, *kernel, inputs) if transposed else w.shape, dtype=torch.int8)
    sums, found = torch.empty(channels, dtype=torch.int32), ctypes.c_int()
    library.octav_filter_codes(
        *(w.data_ptr(), cpu.TYPES[w.dtype], clip.data_ptr(), codes.data_ptr(), sums.data_ptr()),
        *(channels, inputs, math.prod(kernel), transposed, grid.steps, grid.low, grid.high),
        *(ctypes.addressof(found), torch.get_num_threads()),
    )
    return None if found.value else (codes, sums)


def _scale(call: Call) -> Tensor:
    return scale_of(call.clip, call.spec, call.w_clip, call.w_spec).expand(call.w.shape[0]).contiguous()


def _bias(call: Call) -> Tensor | None:
    return None if call.bias is None else call.bias.to(torch.float32).contiguous()


def _convolution(call: Call, x: Tensor) -> Tensor | None:
    weight = _weight(call, transposed=False)
    if weight is None:
        return None
    zero, scale = -grid_of(call.spec).low, _scale(call)
    # Packed alike for any scale; of a vector each element would be read by itself.
    packed = torch.ops.onednn.qconv_prepack(weight[0], torch.ones(()), 1.0, zero, *call.window, list(x.shape))
    # oneDNN writes no float16.
    dtype = torch.float32 if call.dtype is torch.float16 else call.dtype
    y: Tensor = torch.ops.onednn.qconv_pointwise.default(
        *(x, 1.0, zero, packed, scale, onednn.zeros(len(scale)), _bias(call), *call.window),
        *(1.0, 0, dtype, "none", [], ""),
    )
    return y.to(call.dtype)


def _matmul(call: Call, x: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    weight = _weight(call, transposed=True) if multiplies_unsigned_bytes() else None
    if weight is None:
        return None
    w, sums = weight
    zero, scale, bias = -grid_of(call.spec).low, _scale(call), _bias(call)
    last = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    y = torch.empty(shape, dtype=call.dtype, memory_format=last)
    rows = x if x.dim() == 2 else _windows(call, x, y, zero)
    # A matmul over one product that finds the strides of a transposed matrix writes nothing (torch 2.13).
    w = w.reshape(1, -1) if rows.shape[1] == 1 else w.reshape(len(w), -1).t()
    library = cpu.library()
    assert library is not None
    # So many rows at a time that their sums stay in the cache until they are scaled.
    count = max(_SUMS_AT_ONCE // len(scale), 1)
    for first in range(0, len(rows), count):
        total = torch.ops.aten._int_mm.default(rows[first : first + count], w)
        library.octav_scaled(
            *(total.data_ptr(), sums.data_ptr(), zero, scale.data_ptr(), None if bias is None else bias.data_ptr()),
            *(y.data_ptr() + first * len(scale) * y.element_size(), cpu.TYPES[y.dtype]),
            *(*total.shape, torch.get_num_threads()),
        )
    return y


def _windows(call: Call, x: Tensor, y: Tensor, zero: int) -> Tensor:
    """Return what each position of the result reads, [positions, what]: x itself where filters have one element."""
    images, channels, height, width = x.shape
    kernel, places = call.w.shape[2:], y.shape[0] * y.shape[2] * y.shape[3]
    if tuple(kernel) == (1, 1) and not any(call.padding) and call.stride == [1, 1]:
        return x.permute(0, 2, 3, 1).reshape(places, channels)
    rows = torch.empty(places, math.prod(kernel) * channels, dtype=torch.uint8)
    sizes = (images, height, width, channels, *y.shape[2:], *kernel, *call.stride, *call.padding, *call.dilation)
    library = cpu.library()
    assert library is not None
    library.octav_windows(x.data_ptr(), rows.data_ptr(), (ctypes.c_int64 * 14)(*sizes), zero, torch.get_num_threads())
    return rows


product_of_codes = register_allocating(
    "product_of_codes",
    "Tensor codes, Tensor clip, str spec, Tensor w, Tensor w_clip, str w_spec, Tensor? bias, "
    "int[] stride, int[] padding, int[] dilation, int groups, ScalarType dtype",
    empty=_empty,
    reference=reference.product_of_codes,
    cpu=_cpu,
    tags=LAYOUT_AGNOSTIC,
)
