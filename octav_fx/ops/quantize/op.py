"""torch.ops.octav.quantize: the integer codes of a tensor, which are what backward needs to keep of it."""

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from octav_fx.formats.spec import spec_of
from octav_fx.ops import cpu
from octav_fx.ops.levels import levels_of
from octav_fx.ops.quantize import reference
from octav_fx.ops.register import register_op


def _empty(x: Tensor, clip: Tensor, spec: str, ceiling: float | None = None) -> Tensor:
    return torch.empty_like(x, dtype=spec_of(spec).format.codes_dtype)


def _cpu(x: Tensor, clip: Tensor, spec: str, ceiling: float | None = None, *, out: Tensor) -> bool:
    represented, library = spec_of(spec), cpu.library()
    form, clip = represented.fitted(clip)
    levels = levels_of(form)
    fits = out.shape == x.shape and out.dtype is form.codes_dtype
    if library is None or levels is None or not fits or (types := cpu.types_of("quantize", x)) is None:
        return False
    top = math.inf if ceiling is None or form.signed else ceiling

    def run(inputs: list[Tensor], clip: Tensor, out: Tensor, layout: tuple[int, int, int]) -> None:
        pointers = (inputs[0].data_ptr(), *types, clip.data_ptr(), out.data_ptr())
        rest = (ctypes.byref(levels), top, out.element_size(), torch.get_num_threads())
        library.octav_quantize(*pointers, *layout, *rest)

    return cpu.each_stretch(run, [x], clip, represented.granularity, out)


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
