"""torch.ops.octav.max_pool: max pooling of unsigned codes or floats, channels last.

torch's own finds indices, too, and takes three times as long.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from octav_fx.ops import cpu
from octav_fx.ops.max_pool import reference
from octav_fx.ops.register import register_allocating

_LAST = torch.channels_last


def _empty(
    x: Tensor, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> Tensor:
    window = kernel_size, stride, padding, dilation, ceil_mode
    shape = torch.nn.functional.max_pool2d(torch.empty_like(x, device="meta", dtype=torch.float32), *window).shape
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_LAST)


@functools.lru_cache(1024)
def _shape(x: torch.Size, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> torch.Size:
    """Return the shape of the result; torch takes longer to find it than a small pool takes."""
    kernel, stride, padding, dilation = map(list, (kernel, stride, padding, dilation))
    return _empty(torch.empty(x, device="meta"), kernel, stride, padding, dilation, ceil_mode).shape


def _cpu(
    x: Tensor, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> Tensor | None:
    library = cpu.library()
    if library is None or x.dtype not in (torch.uint8, torch.float32) or x.dim() != 4:
        return None
    window = (*map(tuple, (kernel_size, stride, padding, dilation)), ceil_mode)
    out = torch.empty(_shape(x.shape, *window), dtype=x.dtype, memory_format=_LAST)
    x = x.contiguous(memory_format=_LAST)
    library.octav_max_pool(
        *(x.data_ptr(), out.data_ptr(), x.dtype is torch.float32, *x.shape, *out.shape[2:]),
        *(*kernel_size, *stride, *padding, *dilation, torch.get_num_threads()),
    )
    return out


max_pool = register_allocating(
    "max_pool",
    "Tensor x, int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode",
    empty=_empty,
    reference=reference.max_pool,
    cpu=_cpu,
)
