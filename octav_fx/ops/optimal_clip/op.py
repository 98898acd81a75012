"""torch.ops.octav.optimal_clip: the clip of a tensor, or of each of its channels."""

import torch
from torch import Tensor

from octav_fx.ops import native
from octav_fx.ops.optimal_clip import reference
from octav_fx.quant.axis import clip_shape, to_rows

# Their order is the kernel's.
_NEWTON = ("octav", "octav-grid")


@torch.library.custom_op("octav::optimal_clip", mutates_args=(), tags=native.LAYOUT_AGNOSTIC)
def optimal_clip(x: Tensor, hint: Tensor, bits: int, signed: bool, dim: int | None, method: str) -> Tensor:
    """See reference.py."""
    return reference.optimal_clip(x, hint, bits, signed, dim, method)


@optimal_clip.register_fake
def _(x: Tensor, hint: Tensor, bits: int, signed: bool, dim: int | None, method: str) -> Tensor:
    return x.new_empty(clip_shape(x, dim), dtype=torch.float32)


@optimal_clip.register_kernel("cpu")
def _(x: Tensor, hint: Tensor, bits: int, signed: bool, dim: int | None, method: str) -> Tensor:
    library = native.library()
    if library is None or x.dtype is torch.float64 or method not in _NEWTON:
        return reference.optimal_clip(x, hint, bits, signed, dim, method)
    # The order of the elements does not matter: a dense tensor is one row, as it lies in memory.
    flat = dim is None and native.is_dense(x)
    rows = x.as_strided((1, x.numel()), (x.numel(), 1)) if flat else to_rows(x, dim)
    rows = rows.to(torch.float32).contiguous()
    hint = native.checked(hint, clip_shape(x, dim))
    clip = torch.empty(clip_shape(x, dim), dtype=torch.float32)
    library.octav_optimal_clip(
        rows.data_ptr(),
        *rows.shape,
        hint.data_ptr(),
        clip.data_ptr(),
        bits,
        signed,
        _NEWTON.index(method),
        torch.get_num_threads(),
    )
    return clip
