"""torch.ops.octav.quantize: the integer codes of a tensor, which are what backward needs to keep of it."""

import math
from typing import Any

import torch
from torch import Tensor

from octav_fx.formats.granularity import clip_shape
from octav_fx.formats.spec import spec_of
from octav_fx.ops import cpu
from octav_fx.ops.quantize import reference
from octav_fx.ops.register import register_op


def _empty(x: Tensor, clip: Tensor, spec: str, ceiling: float | None = None) -> Tensor:
    return torch.empty_like(x, dtype=spec_of(spec).format.codes_dtype)


def _cpu(x: Tensor, clip: Tensor, spec: str, ceiling: float | None = None, *, out: Tensor) -> bool:
    if (plain := spec_of(spec).plain) is None:
        return False
    grid, dim = plain
    layout, library = cpu.channel_layout(out, dim), cpu.library()
    fits = out.shape == x.shape and out.dtype is grid.codes_dtype
    if library is None or layout is None or not fits or (types := cpu.types_of("quantize", x)) is None:
        return False
    x, clip = cpu.lying_as(x, out), cpu.checked(clip, clip_shape(x, dim))
    library.octav_quantize(
        x.data_ptr(),
        *types,
        clip.data_ptr(),
        out.data_ptr(),
        *layout,
        grid.steps,
        grid.low,
        grid.high,
        math.inf if ceiling is None or grid.signed else ceiling,
        out.element_size(),
        torch.get_num_threads(),
    )
    return True


def _cuda(*args: Any, out: Tensor) -> bool:
    from octav_fx.ops.quantize import kernel

    return kernel.quantize(*args, out=out)


quantize = register_op(
    "quantize",
    "Tensor x, Tensor clip, str spec, float? ceiling=None",
    empty=_empty,
    reference=reference.quantize,
    cpu=_cpu,
    cuda=_cuda,
)
