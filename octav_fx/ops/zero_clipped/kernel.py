"""zero_clipped_ in Triton. See reference.py, equal bit for bit."""

import triton
import triton.language as tl
from torch import Tensor

from octav_fx.ops import cpu
from octav_fx.ops.fake_quantize.kernel import BLOCK, FLOATS, offsets_of


@triton.jit
def zero_clipped_kernel(
    grad_ptr, codes_ptr, n, LOW: tl.constexpr, HIGH: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    """grad, codes: [n] as they lie in memory."""
    offsets, mask = offsets_of(n, BLOCK, WIDE)
    code = tl.load(codes_ptr + offsets, mask=mask, other=LOW).to(tl.int32)
    tl.store(grad_ptr + offsets, 0.0, mask=mask & ((code < LOW) | (code > HIGH)))


def zero_clipped_(grad: Tensor, codes: Tensor, low: int, high: int, *, block: int = BLOCK) -> bool:
    """Do what the reference does; False where only that will do. Codes that lie otherwise are copied first."""
    if not cpu.is_dense(grad) or grad.dtype not in FLOATS or grad.shape != codes.shape:
        return False
    if not cpu.same_layout(codes, grad):
        codes = grad.new_empty_strided(grad.shape, grad.stride(), dtype=codes.dtype).copy_(codes)
    n = grad.numel()
    if n:
        sizes = {"BLOCK": block, "WIDE": n + block > 2**31}
        zero_clipped_kernel[(triton.cdiv(n, block),)](grad, codes, n, LOW=low, HIGH=high, **sizes)
    return True
