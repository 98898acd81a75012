"""quantize_rows on a GPU: a program holds some rows in registers from solve to store. See reference.py."""

import torch
from torch import Tensor

from octav_fx.formats.spec import spec_of
from octav_fx.ops import cpu
from octav_fx.ops.fake_quantize.kernel import fake_quantize
from octav_fx.ops.kernels.search_rows.kernel import clips_of, search_rows
from octav_fx.ops.quantize.kernel import quantize


def quantize_rows(
    x: Tensor, spec: str, method: str, dtype: torch.dtype, ceiling: float | None = None, *, out: Tensor, clip: Tensor
) -> bool:
    """Write the rounded rows into out and their clips into clip; False where only the reference will do."""
    represented = spec_of(spec)

    def run(rows: Tensor, written: Tensor) -> Tensor | None:
        return clips_of(rows, represented, method, written, ceiling)

    if cpu.each_row(run, x, represented.granularity, out, clip):
        return True
    # Too long to be held twice.
    if not search_rows(x, represented, method, out=clip):
        return False
    if dtype.is_floating_point:
        return fake_quantize(x, clip, spec, "ste", dtype, out=out)
    return quantize(x, clip, spec, ceiling, out=out)
