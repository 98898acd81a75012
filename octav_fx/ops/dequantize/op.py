"""torch.ops.octav.dequantize: the levels that codes stand for."""

from typing import Any

import torch
from torch import Tensor

from octav_fx.ops import native
from octav_fx.ops.define import define
from octav_fx.ops.dequantize import reference
from octav_fx.quant.axis import clip_shape
from octav_fx.quant.grid import Grid


def _empty(codes: Tensor, clip: Tensor, bits: int, signed: bool, dim: int | None, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(codes, dtype=dtype)


def _cpu(
    codes: Tensor, clip: Tensor, bits: int, signed: bool, dim: int | None, dtype: torch.dtype, out: Tensor
) -> bool:
    layout, library, grid = native.channel_layout(codes, dim), native.library(), Grid(bits, signed)
    floats = dtype is torch.float32 and out.dtype is dtype
    fits = native.same_layout(out, codes) and codes.dtype is grid.codes_dtype
    if library is None or layout is None or not floats or not fits:
        return False
    clip = native.checked(clip, clip_shape(codes, dim))
    library.octav_dequantize(
        codes.data_ptr(),
        clip.data_ptr(),
        out.data_ptr(),
        *layout,
        grid.steps,
        grid.low,
        grid.high,
        codes.element_size(),
        torch.get_num_threads(),
    )
    return True


def _cuda(*args: Any, out: Tensor) -> bool:
    from octav_fx.ops.dequantize import kernel

    return kernel.dequantize(*args, out=out)


dequantize = define(
    "dequantize",
    "Tensor codes, Tensor clip, int bits, bool signed, int? dim, ScalarType dtype",
    empty=_empty,
    reference=reference.dequantize,
    cpu=_cpu,
    cuda=_cuda,
)
