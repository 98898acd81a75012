"""int_matmul on GPUs: tensor cores of integers or of float8, the scales and the bias in the epilogue."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from octav_fx.ops.int_matmul.configs import Architecture, architecture, choose, processors
from octav_fx.ops.int_matmul.range import SLICE, largest_k, largest_k_in_float8, largest_k_in_halves, offset
from octav_fx.ops.int_matmul.reference import check

# How many tiles of x in a column take turns with those of w.
_GROUP = 8
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def finish(
    total,
    rows,
    columns,
    x_scale_ptr,
    w_scale_ptr,
    w_sums_ptr,
    bias_ptr,
    out_ptr,
    m,
    n,
    out_n,
    out_stride,
    OFFSET: tl.constexpr,
    SCALED_ROWS: tl.constexpr,
    SCALED_COLUMNS: tl.constexpr,
):
    """Scales, bias and rounding of a tile of sums; in float64, without fused multiply-adds, as the reference does."""
    inside = columns < n
    # The product of two float32 is exact in float64.
    scale = tl.load(w_scale_ptr + columns, mask=inside, other=0.0) if SCALED_COLUMNS else tl.load(w_scale_ptr)
    scale = scale.to(tl.float64)
    if SCALED_ROWS:
        row_scale = tl.load(x_scale_ptr + rows, mask=rows < m, other=0.0).to(tl.float64)
        scale = row_scale[:, None] * (scale[None, :] if SCALED_COLUMNS else scale)
    else:
        scale = tl.load(x_scale_ptr).to(tl.float64) * (scale[None, :] if SCALED_COLUMNS else scale)
    y = total.to(tl.float64)
    if OFFSET != 0:
        y += (OFFSET * tl.load(w_sums_ptr + columns, mask=inside, other=0)).to(tl.float64)[None, :]
    y *= scale
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float64)[None, :]
    target = out_ptr + rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
    tl.store(
        target, y.to(tl.float32).to(out_ptr.dtype.element_ty), mask=(rows < m)[:, None] & (columns < out_n)[None, :]
    )


# Another batch or layer is no reason to compile again.
@triton.jit(do_not_specialize=["m", "n"])
def int_matmul_kernel(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    w_scale_ptr,
    w_sums_ptr,
    bias_ptr,
    out_ptr,
    m,
    n,
    out_n,
    k,
    x_stride,
    w_stride,
    out_stride,
    OFFSET: tl.constexpr,
    SCALED_ROWS: tl.constexpr,
    SCALED_COLUMNS: tl.constexpr,
    HALVES: tl.constexpr,
    PROMOTED: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Compute one tile of out [m, n] from codes x [m, k] and w [n, k], whose rows are contiguous and begin aligned.

    Up to out_n columns of out are written: n, or what is there beyond for the sake of alignment.
    HALVES: multiply as float16, which holds every int8, and sum in float32; exact while sums are at most 2**24.
    PROMOTED: after how many products a sum of float8 moves to float32; None where codes are int8.
    """
    # Programs that run at the same time take tiles of the same rows of w: GROUP of them share what they read of it.
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    program = tl.program_id(0)
    first = program // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    tile_m = first + program % (GROUP * tiles_n) % height
    tile_n = program % (GROUP * tiles_n) // height

    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    # Rows beyond the last wrap around: they read what exists, and are not stored.
    x_tile = x_ptr + (rows % m).to(tl.int64)[:, None] * x_stride + inner[None, :]
    w_tile = w_ptr + (columns % n).to(tl.int64)[None, :] * w_stride + inner[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if PROMOTED is None and not HALVES else tl.float32)
    for start in range(0, k, BLOCK_K):
        if EVEN_K:
            a = tl.load(x_tile)
            b = tl.load(w_tile)
        else:
            a = tl.load(x_tile, mask=inner[None, :] < k - start, other=0.0)
            b = tl.load(w_tile, mask=inner[:, None] < k - start, other=0.0)
        if HALVES:
            a, b = a.to(tl.float16), b.to(tl.float16)
        total = tl.dot(a, b, total, max_num_imprecise_acc=PROMOTED, out_dtype=total.dtype)
        x_tile += BLOCK_K
        w_tile += BLOCK_K

    # Two halves after each other: the whole tile in float64 would not fit the registers.
    HALF: tl.constexpr = BLOCK_N // 2
    left, right = tl.split(tl.permute(tl.reshape(total, (BLOCK_M, 2, HALF)), (0, 2, 1)))
    columns = tile_n * BLOCK_N + tl.arange(0, HALF)
    for half in tl.static_range(2):
        finish(
            *(left if half == 0 else right, rows, columns + half * HALF),
            *(x_scale_ptr, w_scale_ptr, w_sums_ptr, bias_ptr, out_ptr, m, n, out_n, out_stride),
            *(OFFSET, SCALED_ROWS, SCALED_COLUMNS),
        )


def is_aligned(x: Tensor) -> bool:
    """Tell whether rows of x are contiguous, begin at multiples of 16 bytes and have a multiple of 16 elements."""
    return x.stride(1) == 1 and not any(value % 16 for value in (x.shape[1], x.stride(0), x.data_ptr()))


def aligned(codes: Tensor) -> Tensor:
    """Codes [rows, K]; in a copy, with zeros at the end of K, where they are not aligned.

    From other rows bytes are loaded one by one, and all their addresses do not fit the registers.
    """
    if is_aligned(codes):
        return codes
    rows, k = codes.shape
    copy = codes.new_zeros(rows, triton.cdiv(k, 16) * 16)
    copy[:, :k] = codes
    return copy


def int_matmul(
    x: Tensor,
    x_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    x_bits: int,
    x_signed: bool,
    w_bits: int,
    dtype: torch.dtype,
    *,
    out: Tensor,
    of: Architecture | None = None,
) -> bool:
    """Write the reference's result into out; False where only that will do: where no accumulator here is exact.

    of: how to multiply; None: as is pinned for the device of x.
    """
    check(x, x_scale, w, w_scale, bias)
    (m, k), n, bits = x.shape, w.shape[0], (x_bits, x_signed, w_bits)
    of = of or architecture(x.device)
    float8 = x.dtype is torch.float8_e4m3fn
    halves = not float8 and of.halves and k <= largest_k_in_halves(*bits)
    largest = largest_k_in_float8 if float8 else largest_k_in_halves if halves else largest_k
    if dtype not in _DTYPES or k > largest(*bits) or (float8 and not of.float8):
        return False
    x, w = aligned(x), aligned(w)
    k = x.shape[1]
    shift = offset(x_bits, x_signed)
    fits = out.dtype is dtype and out.shape == (m, n) and is_aligned(out)
    # Else whole rows of 16 bytes, too: a store of single elements has as many addresses.
    target = out if fits else out.new_empty((m, triton.cdiv(n, 16) * 16), dtype=dtype)
    config = choose(of.float8 if float8 else of.configs, m, n, processors(x.device))
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    if tiles:
        int_matmul_kernel[(tiles,)](
            x,
            x_scale.contiguous(),
            w,
            w_scale.contiguous(),
            w.sum(1, dtype=torch.int32) if shift else None,
            None if bias is None else bias.contiguous(),
            target,
            m,
            n,
            target.shape[1],
            k,
            x.stride(0),
            w.stride(0),
            target.stride(0),
            OFFSET=shift,
            SCALED_ROWS=x_scale.dim() == 1,
            SCALED_COLUMNS=w_scale.dim() == 1,
            HALVES=halves,
            PROMOTED=SLICE if float8 else None,
            EVEN_K=k % config.block_k == 0,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP=_GROUP,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            # The reference multiplies and then adds.
            enable_fp_fusion=False,
        )
    if target is not out:
        out.copy_(target[:, :n])
    return True
