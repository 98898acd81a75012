"""torch.ops.octav.dequantize: the levels that codes stand for."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from octav_fx.formats.spec import spec_of
from octav_fx.ops import cpu
from octav_fx.ops.dequantize import reference
from octav_fx.ops.levels import levels_of
from octav_fx.ops.register import register_op


def _empty(codes: Tensor, clip: Tensor, spec: str, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(codes, dtype=dtype)


def _cpu(codes: Tensor, clip: Tensor, spec: str, dtype: torch.dtype, out: Tensor) -> bool:
    represented, library = spec_of(spec), cpu.library()
    form, clip = represented.fitted(clip)
    levels = levels_of(form)
    fits = out.shape == codes.shape and codes.dtype is form.codes_dtype and out.dtype is dtype
    if library is None or levels is None or not fits or (types := cpu.types_of("dequantize", out)) is None:
        return False

    def run(inputs: list[Tensor], clip: Tensor, out: Tensor, layout: tuple[int, int, int]) -> None:
        pointers = (inputs[0].data_ptr(), clip.data_ptr(), out.data_ptr(), *types)
        rest = (ctypes.byref(levels), codes.element_size(), torch.get_num_threads())
        library.octav_dequantize(*pointers, *layout, *rest)

    return cpu.each_stretch(run, [codes], clip, represented.granularity, out)


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
