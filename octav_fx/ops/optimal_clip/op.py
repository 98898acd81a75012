"""torch.ops.octav.optimal_clip: the clip of a tensor, or of each of its channels."""

from typing import Any

import torch
from torch import Tensor

from octav_fx.clips.newton import as_octav
from octav_fx.clips.percentile import ONE_IN
from octav_fx.formats.granularity import clip_shape, to_rows
from octav_fx.formats.spec import spec_of
from octav_fx.ops import cpu
from octav_fx.ops.optimal_clip import reference
from octav_fx.ops.register import register_op

# Their order is the kernel's.
_NEWTON = ("octav", "octav-grid")


def _empty(x: Tensor, hint: Tensor, spec: str, method: str) -> Tensor:
    return x.new_empty(spec_of(spec).granularity.clip_shape(x.shape), dtype=torch.float32)


def _cpu(x: Tensor, hint: Tensor, spec: str, method: str, out: Tensor) -> bool:
    # The solves know the lowest code as minus the steps.
    if (plain := spec_of(spec).plain) is None or plain[0].narrow:
        return False
    (grid, dim), signed, library = plain, plain[0].signed, cpu.library()
    bits, method = as_octav(grid.bits, method)
    fits = out.shape == clip_shape(x, dim) and out.dtype is torch.float32 and out.is_contiguous()
    if library is None or not fits or (types := cpu.types_of("optimal_clip", x)) is None:
        return False
    # The order of the elements does not matter: a dense tensor is one row, as it lies in memory.
    flat = dim is None and cpu.is_dense(x)
    rows = x.as_strided((1, x.numel()), (x.numel(), 1)) if flat else to_rows(x, dim)
    rows = rows.contiguous()
    hint = cpu.checked(hint, clip_shape(x, dim))
    data, threads = (rows.data_ptr(), *types, *rows.shape, hint.data_ptr(), out.data_ptr()), torch.get_num_threads()
    if method in _NEWTON:
        library.octav_optimal_clip(*data, bits, signed, _NEWTON.index(method), threads)
    elif method == "mse":
        library.octav_sweep(*data, bits, signed, threads)
    else:
        # "max": no value lies beyond.
        library.octav_percentile(*data, signed, ONE_IN.get(method, 0), threads)
    return True


def _cuda(*args: Any, out: Tensor) -> bool:
    from octav_fx.ops.optimal_clip import kernel

    return kernel.optimal_clip(*args, out=out)


optimal_clip = register_op(
    "optimal_clip",
    "Tensor x, Tensor hint, str spec, str method",
    empty=_empty,
    reference=reference.optimal_clip,
    cpu=_cpu,
    cuda=_cuda,
)
