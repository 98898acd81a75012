"""torch.ops.octav.quantize_rows: find the clips of tokens or groups and round to them, while a row is on chip.

It comes after differentiation, in place of optimal_clip and of the fake_quantize or quantize that reads its clip: one
pass over the data and not two.
"""

import math

import torch
from torch import Tensor

from octav_fx.clips.methods import searches
from octav_fx.formats.spec import Spec, spec_of
from octav_fx.ops import cpu
from octav_fx.ops.optimal_clip.op import Passes, Rounding
from octav_fx.ops.quantize_rows import reference
from octav_fx.ops.register import register_op


def is_one_pass(spec: Spec, method: str) -> bool:
    """Tell whether there are kernels that find these clips and round to them in one pass."""
    return spec.granularity.is_short and (method == "max" or searches(spec, method))


def _empty(
    x: Tensor, spec: str, method: str, dtype: torch.dtype, ceiling: float | None = None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=dtype), x.new_empty(spec_of(spec).clip_shape(x.shape), dtype=torch.float32)


def _fits(x: Tensor, spec: Spec, method: str, dtype: torch.dtype, out: Tensor, clip: Tensor) -> bool:
    """Tell whether the kernels write such results: the levels of a dtype, or the codes of the format."""
    is_written = is_one_pass(spec, method) and (dtype.is_floating_point or dtype is spec.format.codes_dtype)
    is_there = out.shape == x.shape and out.dtype is dtype and clip.dtype is torch.float32
    has_rows = x.numel() > 0 and spec.granularity.divides(x.shape)
    return is_written and is_there and has_rows and clip.shape == spec.clip_shape(x.shape)


def _cpu(
    x: Tensor, spec: str, method: str, dtype: torch.dtype, ceiling: float | None = None, *, out: Tensor, clip: Tensor
) -> bool:
    represented, library = spec_of(spec), cpu.library()
    if library is None or not _fits(x, represented, method, dtype, out, clip):
        return False
    is_levels, form = dtype.is_floating_point, represented.format
    if (types := cpu.types_of("quantize_rows", x, *([out] if is_levels else []))) is None:
        return False
    top = math.inf if ceiling is None or form.signed else ceiling

    def run(rows: Tensor, written: Tensor) -> Tensor | None:
        passes = Passes(library, rows, types[0])
        rounding = Rounding(written.data_ptr(), 0 if is_levels else written.element_size(), types[-1], top)
        solve = passes.search if searches(represented, method) else passes.round_unclipped
        return solve(represented, rounding)

    return cpu.each_row(run, x, represented.granularity, out, clip)


def _cuda(
    x: Tensor, spec: str, method: str, dtype: torch.dtype, ceiling: float | None = None, *, out: Tensor, clip: Tensor
) -> bool:
    from octav_fx.ops.quantize_rows import kernel

    if not _fits(x, spec_of(spec), method, dtype, out, clip):
        return False
    return kernel.quantize_rows(x, spec, method, dtype, ceiling, out=out, clip=clip)


quantize_rows = register_op(
    "quantize_rows",
    "Tensor x, str spec, str method, ScalarType dtype, float? ceiling=None",
    empty=_empty,
    reference=reference.quantize_rows,
    cpu=_cpu,
    cuda=_cuda,
    outs=("out", "clip"),
)
