"""torch.ops.octav.lookup: any function of a code whose result is a code, by a table of its 256 results."""

import torch
from torch import Tensor

from octav_fx.errors import OctavError
from octav_fx.ops import cpu
from octav_fx.ops.lookup import reference
from octav_fx.ops.register import register_op

_CODES = 256


def _empty(codes: Tensor, table: Tensor) -> Tensor:
    return torch.empty_like(codes)


def _cpu(codes: Tensor, table: Tensor, *, out: Tensor) -> bool:
    library = cpu.library()
    if table.shape != (_CODES,) or table.dtype is not torch.uint8:
        raise OctavError(f"a table of {table.dtype} {tuple(table.shape)} where lookup takes uint8 [{_CODES}]")
    if library is None or not cpu.is_dense(codes) or not cpu.same_layout(codes, out):
        return False
    library.octav_lookup(
        *(codes.data_ptr(), table.contiguous().data_ptr(), out.data_ptr(), codes.numel(), torch.get_num_threads())
    )
    return True


lookup = register_op("lookup", "Tensor codes, Tensor table", empty=_empty, reference=reference.lookup, cpu=_cpu)
