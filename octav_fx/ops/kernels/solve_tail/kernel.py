"""The paper's clip (arXiv 2206.06501, eq. 6) in Triton, from one pass over a half-precision tensor, two over float32.

Let n(s) and S(s) be number and sum of the magnitudes >= s, N the number of non-zeros, and D(s) = n(s) + noise *
(N - n(s)). The fixed point is the largest s with g(s) = S(s) - s * D(s) >= 0, and g falls strictly. So a histogram of
the magnitudes above any bound below the fixed point is enough to find it, without a step of Newton's: it is max(v,
S / D), v the largest bin with g(v) >= 0, and S and D of what lies above v. That g(v) >= 0 for some bin says that the
bound was low enough. If there is none, a second launch fills the bins below the bound; else it exits at once.

In half precision each magnitude has a bin of its own. Those of float32 are the upper 16 bits, with the sum of the lower
ones beside the count; a last launch takes apart, by the lower bits, the one bin in which g changes its sign. Counts and
sums are integers: the same tensor gives the same bits, from every hint.
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from octav_fx.formats.grid import Grid
from octav_fx.ops import cpu
from octav_fx.ops.kernels.solve_passes.kernel import is_last, program_count

# For each dtype: its bits as integers, the pattern of inf, and how many low bits share a bin.
PATTERNS: Final = {
    torch.bfloat16: (torch.int16, 0x7F80, 0),
    torch.float16: (torch.int16, 0x7C00, 0),
    torch.float32: (torch.int32, 0x7F800000, 16),
}
# How far below the hint the bound lies. What lies above it costs an atomic each: at few bits that is much of the
# tensor, but then the clip moves less from step to step, too. 1 bit: "octav-tight" at 2.
KEEP: Final = {1: 0.75, 2: 0.75, 3: 0.75, 4: 0.75, 5: 0.75, 6: 0.6, 7: 0.6, 8: 0.6}
BINS: Final = 2**15
FINE_BINS: Final = 2**16
# Bins that the last program looks at together.
CHUNK: Final = 1024
# Elements of one tile: eight for each thread, with three counts each.
BLOCK: Final = 2048
# So that programs do not queue for the bins next to the bound.
REPLICAS: Final = 8
# A counter of float32 holds a count in its upper and a sum of 16 bits each in its lower 40 bits, of so many elements.
PACKED: Final = 2**23

WARM = tl.constexpr(0)
COLD = tl.constexpr(1)
FINE = tl.constexpr(2)
_BINS = tl.constexpr(BINS)
_FINE_BINS = tl.constexpr(FINE_BINS)
_LOW_BITS = tl.constexpr(2**40 - 1)
# What counters hold, behind the ticket. NONZERO: of the tensor. TOP: the highest bin in use. CROSSING: the bin of
# float32 in which g changes its sign; COUNT and SUM (float64): what lies above it.
NONZERO, TOP, SOLVED, CROSSING, COUNT, FINE_TOP, SUM = (tl.constexpr(i) for i in range(1, 8))


@triton.jit
def floor_of(hint_ptr, keep, IS_HALF: tl.constexpr):
    """Return the bin of keep * hint; 0 without a hint."""
    hint = tl.load(hint_ptr)
    usable = (hint > 0) & (hint < float("inf"))
    bound = tl.where(usable, hint * keep, 0.0)
    if IS_HALF:
        return bound.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    return bound.to(tl.int32, bitcast=True) >> 16


@triton.jit
def value_of(pattern, IS_HALF: tl.constexpr):
    """Return the magnitude of a pattern: of float16, or of float32."""
    if IS_HALF:
        return pattern.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32).to(tl.float64)
    return pattern.to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def edges(bins, base, STAGE: tl.constexpr, IS_HALF: tl.constexpr):
    """Return the least magnitude in each bin."""
    if IS_HALF:
        return value_of(bins, True)
    return value_of(base + bins if STAGE == FINE else bins << 16, False)


@triton.jit
def contents(bins_ptr, bins, base, replicas, STAGE: tl.constexpr, IS_HALF: tl.constexpr, HAS_SUMS: tl.constexpr):
    """Return number and sum of the magnitudes in each bin, int64 and float64, exact but for the sum's rounding."""
    count = tl.zeros_like(bins).to(tl.int64)
    low = tl.zeros_like(bins).to(tl.int64)
    for replica in range(replicas):
        # Past the cache of this multiprocessor, which does not see what others add.
        stored = tl.load(bins_ptr + replica * _BINS + bins, cache_modifier=".cg").to(tl.int64)
        if HAS_SUMS:
            count += stored >> 40
            low += stored & _LOW_BITS
        else:
            count += stored
    edge = edges(bins, base, STAGE, IS_HALF)
    total = count.to(tl.float64) * edge
    if HAS_SUMS:
        total += low.to(tl.float64) * (value_of((bins << 16) | 1, False) - edge)
    # Behind the largest number the edges are inf and NaN.
    return count, tl.where(count > 0, total, 0.0)


@triton.jit
def search(
    bins_ptr,
    lowest,
    top,
    base,
    replicas,
    count,
    total,
    nonzero,
    NOISE: tl.constexpr,
    STAGE: tl.constexpr,
    IS_HALF: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Return the largest bin from lowest to top with g >= 0 at its edge, -1 if none; count and sum of what is above.

    count, total: what lies above all bins.
    """
    lanes = tl.arange(0, CHUNK)
    chunk = top // CHUNK
    # First the chunk: g falls, so its sign at the lower end says whether it changes in there.
    searching = chunk >= lowest // CHUNK
    while searching:
        bins = chunk * CHUNK + lanes
        counts, totals = contents(bins_ptr, bins, base, replicas, STAGE, IS_HALF, HAS_SUMS)
        n, s = count + tl.sum(counts), total + tl.sum(totals)
        edge = edges(tl.maximum(chunk * CHUNK, lowest), base, STAGE, IS_HALF)
        here = s >= edge * (n.to(tl.float64) * (1 - NOISE) + nonzero.to(tl.float64) * NOISE)
        searching = (here == 0) & (chunk > lowest // CHUNK)
        count, total = tl.where(here | (searching == 0), count, n), tl.where(here | (searching == 0), total, s)
        chunk = tl.where(searching, chunk - 1, chunk)
    bins = tl.maximum(chunk, 0) * CHUNK + lanes
    counts, totals = contents(bins_ptr, bins, base, replicas, STAGE, IS_HALF, HAS_SUMS)
    n = count + tl.cumsum(counts, reverse=True)
    s = total + tl.cumsum(totals, reverse=True)
    edge = edges(bins, base, STAGE, IS_HALF)
    holds = s >= edge * (n.to(tl.float64) * (1 - NOISE) + nonzero.to(tl.float64) * NOISE)
    found = tl.max(tl.where(holds & (bins >= lowest) & (bins <= tl.maximum(top, lowest)), bins, -1))
    above = bins > found
    return found, count + tl.sum(tl.where(above, counts, 0)), total + tl.sum(tl.where(above, totals, 0.0))


@triton.jit
def solve_tail_kernel(
    x_ptr,
    hint_ptr,
    clip_ptr,
    bins_ptr,
    counters_ptr,
    numbers_ptr,
    n,
    replicas,
    keep,
    STAGE: tl.constexpr,
    SIGNED: tl.constexpr,
    NOISE: tl.constexpr,
    INFINITE: tl.constexpr,
    SHIFT: tl.constexpr,
    IS_HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """x: [n] as it lies in memory, its bits as integers. bins: [replicas, BINS], of FINE [1, FINE_BINS], zeros."""
    floor = floor_of(hint_ptr, keep, IS_HALF)
    has_sums: tl.constexpr = STAGE != FINE and SHIFT > 0
    copies = 1 if STAGE == FINE else replicas
    base = 0
    if STAGE == WARM:
        first, behind, active = floor, _BINS + 0, True
    elif STAGE == COLD:
        first, behind, active = floor * 0, floor, tl.load(counters_ptr + SOLVED) == 0
    else:
        base = tl.load(counters_ptr + CROSSING).to(tl.int32) << 16
        first, behind, active = 0, _FINE_BINS + 0, tl.load(counters_ptr + NONZERO) > 0
    if active:
        lanes = tl.arange(0, BLOCK)
        seen, hot_count = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
        hot_low, top = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
        own = bins_ptr + tl.program_id(0) % copies * _BINS
        hot = -1
        # Tiles of 2**31 elements at most, in 32 bits: the host takes care of it.
        for tile in range(tl.program_id(0), tl.cdiv(n, BLOCK), tl.num_programs(0)):
            bits = tl.load(x_ptr + tile * BLOCK + lanes, mask=tile * BLOCK + lanes < n, other=0).to(tl.int32)
            # Those of negative numbers are negative.
            pattern = bits & (INFINITE | (INFINITE - 1)) if SIGNED else bits
            valid = (pattern > 0) & (pattern < INFINITE)
            bin = (pattern - base) >> (0 if STAGE == FINE else SHIFT)
            wanted = valid & (bin >= first) & (bin < behind)
            seen += valid.to(tl.int32)
            top = tl.maximum(top, tl.where(wanted, bin, 0))
            if hot < 0:
                # A ceiling, or the only magnitude there is, is not counted one by one.
                hot = tl.max(tl.where(wanted, bin, 0))
            is_hot = wanted & (bin == hot)
            hot_count += is_hot.to(tl.int32)
            if has_sums:
                hot_low += tl.where(is_hot, pattern & 0xFFFF, 0)
                one = (pattern & 0xFFFF).to(tl.int64) + (1 << 40)
            else:
                one = 1
            tl.atomic_add(own + bin, one, mask=wanted & (bin != hot), sem="relaxed")
        hot_total = tl.sum(hot_count)
        packed = hot_total
        if has_sums:
            packed = (hot_total.to(tl.int64) << 40) + tl.sum(hot_low.to(tl.int64))
        tl.atomic_add(own + tl.maximum(hot, 0), packed, mask=hot_total > 0, sem="relaxed")
        if STAGE == WARM:
            tl.atomic_add(counters_ptr + NONZERO, tl.sum(seen).to(tl.int64), sem="relaxed")
        top_ptr = counters_ptr + (FINE_TOP if STAGE == FINE else TOP)
        tl.atomic_max(top_ptr, tl.max(top).to(tl.int64), sem="relaxed")
        if is_last(counters_ptr):
            nonzero = tl.load(counters_ptr + NONZERO, cache_modifier=".cg")
            highest = tl.load(top_ptr, cache_modifier=".cg").to(tl.int32)
            if STAGE == FINE:
                count, total = tl.load(counters_ptr + COUNT), tl.load(numbers_ptr + SUM)
            else:
                count, total = tl.zeros((), tl.int64), tl.zeros((), tl.float64)
            found, count, total = search(
                bins_ptr, first, highest, base, copies, count, total, nonzero, NOISE, STAGE, IS_HALF, has_sums, CHUNK
            )
            if SHIFT > 0 and STAGE != FINE:
                tl.store(counters_ptr + CROSSING, found.to(tl.int64))
                tl.store(counters_ptr + COUNT, count)
                tl.store(numbers_ptr + SUM, total)
                # What stays if there is nothing to take apart.
                tl.store(clip_ptr, 0.0)
            else:
                # D is at least noise for one non-zero, and at most 2**31.
                d = count.to(tl.float64) * (1 - NOISE) + nonzero.to(tl.float64) * NOISE
                ratio = total / tl.where(nonzero > 0, d, 1.0)
                at = edges(tl.maximum(found, 0), base, STAGE, IS_HALF)
                tl.store(clip_ptr, tl.where(nonzero > 0, tl.maximum(ratio, at), 0.0).to(tl.float32))
            tl.store(counters_ptr + SOLVED, ((found >= 0) | (nonzero == 0)).to(tl.int64))


def solve_tail(
    x: Tensor, hint: Tensor, bits: int, signed: bool, *, out: Tensor, block: int = BLOCK, chunk: int = CHUNK
) -> bool:
    """Write the paper's clip of the whole tensor into out []; False where another solve has to. Gaps are copied away.

    Scratch is zeroed in each call, so calls on several streams do not meet.
    """
    if x.dtype not in PATTERNS or out.shape or out.dtype is not torch.float32 or x.numel() + block > 2**31:
        return False
    hint = cpu.checked(hint, ())
    x = x if cpu.is_dense(x) else x.contiguous()
    integers, infinite, shift = PATTERNS[x.dtype]
    programs = program_count(x, block)
    replicas = min(REPLICAS, programs)
    if shift:
        # A program's share is of whole tiles, a replica's of whole programs.
        share = triton.cdiv(triton.cdiv(x.numel(), block), programs) * block
        replicas = min(programs, max(replicas, triton.cdiv(programs, max(1, (PACKED - 1) // share))) if share else 1)
        if triton.cdiv(programs, replicas) * share >= PACKED:
            return False
    # One allocation and one launch that zeroes it: the counters, the bins, and those of FINE.
    words = replicas * BINS if shift else replicas * BINS // 2
    scratch = torch.zeros(16 + words + (FINE_BINS // 2 if shift else 0), dtype=torch.int64, device=x.device)
    counters, bins, fine = scratch[:16], scratch[16 : 16 + words], scratch[16 + words :].view(torch.int32)
    stages = (
        [(WARM, bins), (COLD, bins), (FINE, fine)] if shift else [(s, bins.view(torch.int32)) for s in (WARM, COLD)]
    )
    for stage, filled in stages:
        solve_tail_kernel[(programs,)](
            x.view(integers),
            hint,
            out,
            filled,
            counters,
            counters.view(torch.float64),
            x.numel(),
            replicas,
            KEEP[bits],
            STAGE=stage,
            SIGNED=signed,
            NOISE=Grid(bits, signed).noise,
            INFINITE=infinite,
            SHIFT=shift,
            IS_HALF=x.dtype is torch.float16,
            BLOCK=block,
            CHUNK=chunk,
            num_warps=8,
        )
    return True
