"""int_matmul on GPUs: integer tensor cores, the scales and the bias in the epilogue."""

import triton
import triton.language as tl


@triton.jit
def int_matmul(
    x,
    x_scale,
    w,
    w_scale,
    w_sums,
    bias,
    out,
    m,
    n,
    k,
    x_stride,
    w_stride,
    out_stride,
    OFFSET: tl.constexpr,
    SCALED_ROWS: tl.constexpr,
    SCALED_COLUMNS: tl.constexpr,
    HALVES: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of out [m, n] from int8 x [m, k] and w [n, k], each row of which is contiguous.

    HALVES: multiply as bfloat16, which holds every int8, and sum in float32; exact while the sums are below 2**24.
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
    x_tile = x + (rows % m).to(tl.int64)[:, None] * x_stride + inner[None, :]
    w_tile = w + (columns % n).to(tl.int64)[None, :] * w_stride + inner[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32 if HALVES else tl.int32)
    for start in range(0, k, BLOCK_K):
        if EVEN_K:
            a = tl.load(x_tile)
            b = tl.load(w_tile)
        else:
            a = tl.load(x_tile, mask=inner[None, :] < k - start, other=0)
            b = tl.load(w_tile, mask=inner[:, None] < k - start, other=0)
        if HALVES:
            total = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), total)
        else:
            total = tl.dot(a, b, total, out_dtype=tl.int32)
        x_tile += BLOCK_K
        w_tile += BLOCK_K

    inside = columns < n
    sums = total.to(tl.int32)
    if OFFSET != 0:
        sums += OFFSET * tl.load(w_sums + columns, mask=inside, other=0)[None, :]
    # The product of two float32 is exact in float64.
    scale = tl.load(w_scale + columns, mask=inside, other=0.0) if SCALED_COLUMNS else tl.load(w_scale)
    scale = scale.to(tl.float64)
    if SCALED_ROWS:
        row_scale = tl.load(x_scale + rows, mask=rows < m, other=0.0).to(tl.float64)
        scale = row_scale[:, None] * (scale[None, :] if SCALED_COLUMNS else scale)
    else:
        scale = tl.load(x_scale).to(tl.float64) * (scale[None, :] if SCALED_COLUMNS else scale)
    y = sums.to(tl.float64) * scale
    if bias is not None:
        y += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float64)[None, :]
    target = out + rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
    tl.store(target, y.to(out.dtype.element_ty), mask=(rows < m)[:, None] & inside[None, :])
