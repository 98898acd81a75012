"""torch.ops.octav.dequantize: the levels that codes stand for."""

from typing import Any

import torch
from torch import Tensor

from octav_fx.formats.granularity import clip_shape
from octav_fx.formats.spec import spec_of
from octav_fx.ops import cpu
from octav_fx.ops.dequantize import reference
from octav_fx.ops.register import register_op


def _empty(codes: Tensor, clip: Tensor, spec: str, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(codes, dtype=dtype)


def _cpu(codes: Tensor, clip: Tensor, spec: str, dtype: torch.dtype, out: Tensor) -> bool:
    if (plain := spec_of(spec).plain) is None:
        return False
    grid, dim = plain
    layout, library = cpu.channel_layout(out, dim), cpu.library()
    fits = out.shape == codes.shape and codes.dtype is grid.codes_dtype and out.dtype is dtype
    if library is None or layout is None or not fits or (types := cpu.types_of("dequantize", out)) is None:
        return False
    codes, clip = cpu.lying_as(codes, out), cpu.checked(clip, clip_shape(codes, dim))
    library.octav_dequantize(
        codes.data_ptr(),
        clip.data_ptr(),
        out.data_ptr(),
        *types,
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


dequantize = register_op(
    "dequantize",
    "Tensor codes, Tensor clip, str spec, ScalarType dtype",
    empty=_empty,
    reference=reference.dequantize,
    cpu=_cpu,
    cuda=_cuda,
)
