"""The paper's clip (arXiv 2206.06501, eq. 6) in Triton, from one pass over a half-precision tensor, two over float32.

Let n(s) and S(s) be number and sum of the magnitudes >= s, N the number of non-zeros, and D(s) = n(s) + noise *
(N - n(s)). The fixed point is the largest s with g(s) = S(s) - s * D(s) >= 0, and g falls strictly. So a histogram of
the magnitudes above any bound below the fixed point is enough to find it, without a step of Newton's: it is max(v,
S / D), v the largest bin with g(v) >= 0, and S and D of what lies above v. That g(v) >= 0 for some bin says that the
bound was low enough.

The first launch counts SPAN bins from a bound that the hint gives, 16 octaves and more. If no bin has g >= 0, or
something lies above them all, a second launch counts every bin there is; else it exits at once. Programs count in
several copies of the bins. The last of a copy's programs adds it to what is merged; the last of these finds the clip.

In half precision each magnitude has a bin of its own. Those of float32 are the upper 16 bits, with the sum of the lower
ones beside the count; a last launch takes apart, by the lower bits, the one bin in which g changes its sign. Counts and
sums are integers, and chunks of bins are added in one order: the same tensor gives the same bits, from every hint.
"""

import math
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from octav_fx.formats.grid import Grid
from octav_fx.ops import cpu
from octav_fx.ops.kernels.launch.kernel import launch
from octav_fx.ops.kernels.solve_passes.kernel import is_last_of, program_count

# How far below the hint the bound lies. What lies above it costs an atomic each: at few bits that is much of the
# tensor, but then the clip moves less from step to step, too. 1 bit: "octav-tight" at 2.
KEEP: Final = {1: 0.75, 2: 0.75, 3: 0.75, 4: 0.75, 5: 0.75, 6: 0.6, 7: 0.6, 8: 0.6}
BINS: Final = 2**15
FINE_BINS: Final = 2**16
# Bins that the last program looks at together; spans begin and end with a chunk.
CHUNK: Final = 1024
# A tile is of so many rows, each thread has one word of each: loads that are under way together.
ROWS: Final = 8
# Words of one tile. Two numbers of half precision are a word.
BLOCK: Final = 256 * ROWS
# Of a thread. Left to itself, NVIDIA's assembler spills some for the sake of more programs than are launched.
REGISTERS: Final = 96
# How many of a tile, or of its lower halves, are in the highest bin if that is counted apart.
HOT: Final = 8
# Copies of the bins: an H200 adds to the few next to the bound, half of all there is to add, one behind the other. With
# 8 copies that took four times as long as reading the tensor. Of every bin, which are seldom counted, there are fewer.
REPLICAS: Final = 128
COLD_REPLICAS: Final = 8
# A counter of float32 holds a count in its upper and a sum of 16 bits each in its lower 40 bits, of so many elements.
PACKED: Final = 2**23

BFLOAT16, FLOAT16, FLOAT32 = (tl.constexpr(i) for i in range(3))
# For each dtype: the pattern of inf, how many low bits share a bin, how many bins the first launch counts, and from
# which on if there is no hint. bfloat16 and the upper half of float32 have 128 bins for an octave, float16 has 1024.
PATTERNS: Final = {
    torch.bfloat16: (BFLOAT16, 0x7F80, 0, 3 * CHUNK, (127 - 12) << 7),
    torch.float16: (FLOAT16, 0x7C00, 0, 9 * CHUNK, (15 - 4) << 10),
    torch.float32: (FLOAT32, 0x7F800000, 16, 3 * CHUNK, (127 - 12) << 7),
}

WARM = tl.constexpr(0)
COLD = tl.constexpr(1)
FINE = tl.constexpr(2)
_BINS = tl.constexpr(BINS)
_FINE_BINS = tl.constexpr(FINE_BINS)
_ROWS = tl.constexpr(ROWS)
_HOT = tl.constexpr(HOT)
_LOW_BITS = tl.constexpr(2**40 - 1)
# What counters hold, behind the ticket. NONZERO: of the tensor. CROSSING: the bin of float32 in which g changes its
# sign; COUNT and SUM (float64): what lies above it.
NONZERO, SOLVED, CROSSING, COUNT, SUM = (tl.constexpr(i) for i in range(1, 6))
# Behind them the ticket of each copy.
TICKETS = tl.constexpr(16)


@triton.jit
def floor_of(hint_ptr, keep, UNKNOWN: tl.constexpr, DTYPE: tl.constexpr):
    """Return the bin of keep * hint; UNKNOWN without a hint."""
    hint = tl.load(hint_ptr)
    bound = tl.where(hint < float("inf"), hint * keep, 0.0)
    if DTYPE == FLOAT16:
        bin = bound.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    else:
        bin = bound.to(tl.int32, bitcast=True) >> 16
    return tl.where(bound > 0, bin, UNKNOWN)


@triton.jit
def value_of(pattern, INFINITE: tl.constexpr, DTYPE: tl.constexpr):
    """Return the magnitude of a pattern, float64; inf from that of inf on."""
    if DTYPE == FLOAT16:
        value = pattern.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float64)
    elif DTYPE == BFLOAT16:
        value = (pattern << 16).to(tl.float32, bitcast=True).to(tl.float64)
    else:
        value = pattern.to(tl.float32, bitcast=True).to(tl.float64)
    # Behind the last pattern numbers of 32 bits are negative.
    return tl.where((pattern >= 0) & (pattern < INFINITE), value, float("inf"))


@triton.jit
def merge(bins_ptr, merged_ptr, SPAN: tl.constexpr, HAS_SUMS: tl.constexpr, CHUNK: tl.constexpr):
    """Add a copy of [SPAN] bins to [SPAN] counts, int64, and where it HAS_SUMS to as many sums behind them."""
    lanes = tl.arange(0, CHUNK)
    for begin in range(0, SPAN, CHUNK):
        there = begin + lanes < SPAN
        # Past the cache of this multiprocessor, which does not see what others add.
        stored = tl.load(bins_ptr + begin + lanes, mask=there, other=0, cache_modifier=".cg").to(tl.int64)
        count = stored
        if HAS_SUMS:
            count = stored >> 40
            low = stored & _LOW_BITS
            tl.atomic_add(merged_ptr + SPAN + begin + lanes, low, mask=there & (low != 0), sem="relaxed")
        tl.atomic_add(merged_ptr + begin + lanes, count, mask=there & (count != 0), sem="relaxed")


@triton.jit
def contents(
    merged_ptr,
    bins,
    origin,
    sums,
    SHIFT: tl.constexpr,
    INFINITE: tl.constexpr,
    DTYPE: tl.constexpr,
    HAS_SUMS: tl.constexpr,
):
    """Return least magnitude, number and sum of the magnitudes in each bin, exact but for the sum's rounding.

    sums: how far behind the counts the sums of lower bits are.
    """
    count = tl.load(merged_ptr + bins, cache_modifier=".cg").to(tl.int64)
    pattern = origin + (bins << SHIFT)
    # Behind the largest number the edges are inf, and nothing is counted.
    edge = value_of(pattern, INFINITE, DTYPE)
    least = tl.where(count > 0, edge, 0.0)
    total = count.to(tl.float64) * least
    if HAS_SUMS:
        low = tl.load(merged_ptr + sums + bins, cache_modifier=".cg")
        above = value_of(tl.where(count > 0, pattern + 1, 0), INFINITE, DTYPE)
        total += low.to(tl.float64) * (above - least)
    return edge, count, total


@triton.jit
def search(
    merged_ptr,
    lowest,
    origin,
    sums,
    count,
    total,
    nonzero,
    SPAN: tl.constexpr,
    NOISE: tl.constexpr,
    SHIFT: tl.constexpr,
    INFINITE: tl.constexpr,
    DTYPE: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Return the largest bin from lowest to SPAN with g >= 0 at its edge, -1 if none; count and sum of what is above.

    count, total: what lies above all bins.
    """
    lanes = tl.arange(0, CHUNK)
    chunk = lowest * 0 + (SPAN // CHUNK - 1)
    # First the chunk: g falls, so its sign at the lower end says whether it changes in there.
    searching = True
    while searching:
        edge, counts, totals = contents(
            merged_ptr, chunk * CHUNK + lanes, origin, sums, SHIFT, INFINITE, DTYPE, HAS_SUMS
        )
        n, s = count + tl.sum(counts), total + tl.sum(totals)
        edge = value_of(origin + (tl.maximum(chunk * CHUNK, lowest) << SHIFT), INFINITE, DTYPE)
        here = s >= edge * (n.to(tl.float64) * (1 - NOISE) + nonzero.to(tl.float64) * NOISE)
        searching = (here == 0) & (chunk > lowest // CHUNK)
        count, total = tl.where(searching, n, count), tl.where(searching, s, total)
        chunk = tl.where(searching, chunk - 1, chunk)
    bins = chunk * CHUNK + lanes
    edge, counts, totals = contents(merged_ptr, bins, origin, sums, SHIFT, INFINITE, DTYPE, HAS_SUMS)
    n = count + tl.cumsum(counts, reverse=True)
    s = total + tl.cumsum(totals, reverse=True)
    holds = s >= edge * (n.to(tl.float64) * (1 - NOISE) + nonzero.to(tl.float64) * NOISE)
    found = tl.max(tl.where(holds & (bins >= lowest), bins, -1))
    above = bins > found
    return found, count + tl.sum(tl.where(above, counts, 0)), total + tl.sum(tl.where(above, totals, 0.0))


@triton.jit
def bin_of(pattern, base, last, SHIFT: tl.constexpr):
    """Return the bin of a pattern behind that of base; the last for what lies above them all, and for what is below."""
    return tl.minimum((pattern - base) >> SHIFT, last).to(tl.int32)


@triton.jit
def nonzeros(word, SIGNED: tl.constexpr, INFINITE: tl.constexpr, PAIRS: tl.constexpr):
    """Return how many of the numbers in each column of words are finite and not zero, [columns]."""
    if PAIRS:
        # Both at once: a sum carries into the highest bit of its half, where the sign was, and no further.
        magnitudes = word & 0x7FFF7FFF
        below_inf = (magnitudes + (0x8000 - INFINITE) * 0x10001) ^ 0x80008000
        flags = (magnitudes + 0x7FFF7FFF) & below_inf & 0x80008000
        if not SIGNED:
            flags &= word ^ 0x80008000
        counts = tl.sum(flags >> 15, 0)
        return ((counts & 0xFFFF) + (counts >> 16)).to(tl.int32)
    pattern, _ = patterns_of(word, SIGNED, INFINITE, PAIRS)
    return tl.sum((pattern - 1 < INFINITE - 1).to(tl.int32), 0)


@triton.jit
def patterns_of(word, SIGNED: tl.constexpr, INFINITE: tl.constexpr, PAIRS: tl.constexpr):
    """Return the lower and the upper number of a word as patterns of magnitudes; above that of inf what is not counted.

    The lower one is the whole word where it does not hold two.
    """
    if INFINITE < 2**16:
        magnitudes = word & 0x7FFF7FFF if SIGNED else word
        return magnitudes & 0xFFFF, magnitudes >> 16
    return word & 0x7FFFFFFF if SIGNED else word, word


@triton.jit
def largest(pattern, low, width, base, last, SHIFT: tl.constexpr):
    """Return the highest bin in use by a tile of patterns, 0 if none is."""
    bins = tl.where(pattern - low < width, bin_of(pattern, base, last, SHIFT), 0)
    return tl.max(tl.max(bins, 0), 0)


@triton.jit
def tally(
    pattern,
    low,
    width,
    base,
    last,
    own,
    unit,
    hot,
    hot_count,
    hot_low,
    SHIFT: tl.constexpr,
    HAS_HOT: tl.constexpr,
    HAS_SUMS: tl.constexpr,
):
    """Count a tile of patterns by their bins in memory, and those of the hot bin apart."""
    # Of unsigned numbers one comparison tells a range.
    counted = pattern - low < width
    bin = bin_of(pattern, base, last, SHIFT)
    if HAS_HOT:
        is_hot = counted & (bin == hot)
        hot_count += is_hot.to(tl.int32)
        if HAS_SUMS:
            hot_low += tl.where(is_hot, pattern & 0xFFFF, 0).to(tl.int32)
        counted &= bin != hot
    one = unit
    if HAS_SUMS:
        one = (pattern & 0xFFFF).to(tl.int64) + (1 << 40)
    tl.atomic_add(own + bin, one, mask=counted, sem="relaxed")
    return hot_count, hot_low


@triton.jit
def tally_all(
    x_ptr,
    within,
    n,
    low,
    width,
    base,
    last,
    own,
    unit,
    hot,
    SIGNED: tl.constexpr,
    INFINITE: tl.constexpr,
    SHIFT: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_FIRST: tl.constexpr,
    HAS_HOT: tl.constexpr,
    HAS_SUMS: tl.constexpr,
):
    """Count this program's tiles; return how many are finite and not zero, if it is the first launch."""
    seen = tl.zeros((BLOCK // _ROWS,), tl.int32)
    hot_count, hot_low = tl.zeros((_ROWS, BLOCK // _ROWS), tl.int32), tl.zeros((_ROWS, BLOCK // _ROWS), tl.int32)
    word = words_of(x_ptr, tl.program_id(0) * BLOCK + within, n)
    # Tiles of 2**31 words at most, in 32 bits: the host takes care of it.
    for tile in range(tl.program_id(0), tl.cdiv(n, BLOCK), tl.num_programs(0)):
        # On its way while this one is counted: there are too few programs at a time for others to fill the wait.
        following = words_of(x_ptr, (tile + tl.num_programs(0)) * BLOCK + within, n)
        if IS_FIRST:
            seen += nonzeros(word, SIGNED, INFINITE, PAIRS)
        lower, upper = patterns_of(word, SIGNED, INFINITE, PAIRS)
        hot_count, hot_low = tally(
            lower, low, width, base, last, own, unit, hot, hot_count, hot_low, SHIFT, HAS_HOT, HAS_SUMS
        )
        if PAIRS:
            hot_count, hot_low = tally(
                upper, low, width, base, last, own, unit, hot, hot_count, hot_low, SHIFT, HAS_HOT, HAS_SUMS
            )
        word = following
    if HAS_HOT:
        hot_total = tl.sum(tl.sum(hot_count, 0), 0)
        packed = hot_total
        if HAS_SUMS:
            packed = (hot_total.to(tl.int64) << 40) + tl.sum(tl.sum(hot_low.to(tl.int64), 0), 0)
        tl.atomic_add(own + hot, packed, sem="relaxed")
    return tl.sum(seen, 0).to(tl.int64)


@triton.jit
def words_of(x_ptr, at, n):
    """Return words, uint32, zeros behind the last."""
    return tl.load(x_ptr + at, mask=at < n, other=0).to(tl.int32).to(tl.uint32, bitcast=True)


@triton.jit(do_not_specialize=["unit"])
def solve_tail_kernel(
    x_ptr,
    hint_ptr,
    clip_ptr,
    bins_ptr,
    merged_ptr,
    every_bin_ptr,
    counters_ptr,
    numbers_ptr,
    n,
    replicas,
    cold_replicas,
    keep,
    unit,
    STAGE: tl.constexpr,
    SPAN: tl.constexpr,
    UNKNOWN: tl.constexpr,
    SIGNED: tl.constexpr,
    NOISE: tl.constexpr,
    INFINITE: tl.constexpr,
    SHIFT: tl.constexpr,
    DTYPE: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """x: [n] words as they lie in memory, one number each, or PAIRS. bins: [replicas, SPAN + 1], of FINE [1, SPAN].

    merged: [SPAN + 1], int64, and as many sums; of FINE its bins. All are zeros. every_bin: the bins of the second
    launch, [cold_replicas, SPAN], which the first fills with zeros if that needs them. unit: 1. The compiler
    must not know: it would load 16 bytes in each thread, and carry every element through shared memory to the threads
    that add it to its bin.
    """
    has_sums: tl.constexpr = STAGE != FINE and SHIFT > 0
    stride: tl.constexpr = SPAN + (STAGE == WARM)
    floor, origin, active = tl.zeros((), tl.int32), tl.zeros((), tl.int32), True
    end = origin + INFINITE
    if STAGE == WARM:
        floor = floor_of(hint_ptr, keep, UNKNOWN, DTYPE)
        origin = floor // CHUNK * CHUNK << SHIFT
    elif STAGE == COLD:
        active = tl.load(counters_ptr + SOLVED) == 0
    else:
        origin = tl.load(counters_ptr + CROSSING).to(tl.int32) << 16
        end = origin + SPAN
        active = tl.load(counters_ptr + NONZERO) > 0
    # From which pattern on, and behind how many, magnitudes are counted.
    low = tl.maximum(floor << SHIFT if STAGE == WARM else origin, 1).to(tl.uint32)
    width = end.to(tl.uint32) - low
    if active:
        shift: tl.constexpr = 0 if STAGE == FINE else SHIFT
        columns: tl.constexpr = BLOCK // _ROWS
        within = tl.arange(0, _ROWS)[:, None] * columns + tl.arange(0, columns)[None, :] * unit
        # Where a pattern is its bin, both ask how far it is from low.
        base = low if shift == 0 else origin.to(tl.uint32)
        skipped = (base - origin.to(tl.uint32)) >> shift
        last = SPAN - skipped
        replica = tl.program_id(0) % replicas
        own = bins_ptr + replica * stride + skipped
        # Of a ceiling, or of the only magnitude there is: programs would queue for it. Seldom enough in COLD.
        word = words_of(x_ptr, tl.program_id(0) * BLOCK + within, n)
        lower, upper = patterns_of(word, SIGNED, INFINITE, PAIRS)
        hot = largest(lower, low, width, base, last, shift)
        if PAIRS:
            hot = tl.maximum(hot, largest(upper, low, width, base, last, shift))
        is_hot = (lower - low < width) & (bin_of(lower, base, last, shift) == hot)
        if STAGE != COLD and tl.sum(tl.sum(is_hot.to(tl.int32), 0), 0) >= _HOT:
            seen = tally_all(
                *(x_ptr, within, n, low, width, base, last, own, unit, hot, SIGNED, INFINITE, shift, PAIRS, BLOCK),
                *(STAGE == WARM, True, has_sums),
            )
        else:
            seen = tally_all(
                *(x_ptr, within, n, low, width, base, last, own, unit, hot, SIGNED, INFINITE, shift, PAIRS, BLOCK),
                *(STAGE == WARM, False, has_sums),
            )
        if STAGE == WARM:
            tl.atomic_add(counters_ptr + NONZERO, seen, sem="relaxed")
        last = is_last_of(counters_ptr + TICKETS + replica, (tl.num_programs(0) - 1 - replica) // replicas + 1)
        # Not in one condition: of the first the compiler knows the value.
        if STAGE != FINE:  # noqa: SIM102
            if last:
                merge(bins_ptr + replica * stride, merged_ptr, stride, has_sums, CHUNK)
                last = is_last_of(counters_ptr, replicas)
        if last:
            nonzero = tl.load(counters_ptr + NONZERO, cache_modifier=".cg")
            if STAGE == FINE:
                count, total = tl.load(counters_ptr + COUNT), tl.load(numbers_ptr + SUM)
            else:
                count, total = tl.zeros((), tl.int64), tl.zeros((), tl.float64)
            lowest = floor - (origin >> SHIFT) if STAGE == WARM else origin * 0
            found, count, total = search(
                *(merged_ptr, lowest, origin, stride, count, total, nonzero),
                *(SPAN, NOISE, shift, INFINITE, DTYPE, has_sums, CHUNK),
            )
            if SHIFT > 0 and STAGE != FINE:
                tl.store(counters_ptr + CROSSING, (origin >> SHIFT) + found.to(tl.int64))
                tl.store(counters_ptr + COUNT, count)
                tl.store(numbers_ptr + SUM, total)
                # What stays if there is nothing to take apart.
                tl.store(clip_ptr, 0.0)
            else:
                # D is at least noise for one non-zero, and at most 2**31.
                d = count.to(tl.float64) * (1 - NOISE) + nonzero.to(tl.float64) * NOISE
                ratio = total / tl.where(nonzero > 0, d, 1.0)
                at = value_of(origin + (tl.maximum(found, 0) << shift), INFINITE, DTYPE)
                tl.store(clip_ptr, tl.where(nonzero > 0, tl.maximum(ratio, at), 0.0).to(tl.float32))
            if STAGE == WARM:
                above = tl.load(merged_ptr + SPAN, cache_modifier=".cg")
                solved = ((found >= 0) & (above == 0)) | (nonzero == 0)
                tl.store(counters_ptr + SOLVED, solved.to(tl.int64))
                if solved == 0:
                    for begin in range(0, cold_replicas * _BINS, CHUNK):
                        tl.store(every_bin_ptr + begin + tl.arange(0, CHUNK), 0)


def solve_tail(
    x: Tensor, hint: Tensor, bits: int, signed: bool, *, out: Tensor, block: int = BLOCK, chunk: int = CHUNK
) -> bool:
    """Write the paper's clip of the whole tensor into out []; False where another solve has to. Gaps are copied away.

    Scratch is zeroed in each call, so calls on several streams do not meet.
    """
    if x.dtype not in PATTERNS or out.shape or out.dtype is not torch.float32 or x.numel() + 2 * block > 2**31:
        return False
    hint = cpu.checked(hint, ())
    dtype, infinite, shift, span, unknown = PATTERNS[x.dtype]
    words = _words(x)
    programs = program_count(words, block)
    # A program looks for its next tile behind the last one, in 32 bits.
    if words.numel() + (programs + 2) * block > 2**31:
        return False
    needed = 1
    if shift:
        # A program's share is of whole tiles, a copy's of whole programs.
        share = triton.cdiv(triton.cdiv(x.numel(), block), programs) * block
        needed = min(programs, triton.cdiv(programs, max(1, (PACKED - 1) // share))) if share else 1
        if triton.cdiv(programs, needed) * share >= PACKED:
            return False
    replicas, cold_replicas = (min(programs, max(count, needed)) for count in (REPLICAS, COLD_REPLICAS))
    # One allocation and one launch that zeroes it.
    count, sums = (torch.int64, 2) if shift else (torch.int32, 1)
    sizes = {
        "counters": TICKETS.value + replicas,
        "bins": math.ceil(replicas * (span + 1) * count.itemsize / 8),
        "merged": sums * (span + 1),
        "all merged": sums * BINS,
        "fine": FINE_BINS // 2 if shift else 0,
    }
    # Each begins at a multiple of 16 bytes.
    lengths = [math.ceil(size / 2) * 2 for size in sizes.values()]
    scratch = torch.zeros(sum(lengths), dtype=torch.int64, device=x.device)
    counters, bins, merged, all_merged, fine = scratch.split(lengths)
    every_bin = torch.empty(cold_replicas * BINS, dtype=count, device=x.device)
    stages = [
        (WARM, bins.view(count), merged, replicas, span),
        (COLD, every_bin, all_merged, cold_replicas, BINS),
    ]
    if shift:
        fine = fine.view(torch.int32)
        stages.append((FINE, fine, fine, 1, FINE_BINS))
    registers = {} if torch.version.hip else {"maxnreg": REGISTERS}
    constants = {
        **{"UNKNOWN": unknown, "SIGNED": signed, "NOISE": Grid(bits, signed).noise, "INFINITE": infinite},
        **{"SHIFT": shift, "DTYPE": dtype.value, "PAIRS": words.dtype is torch.int32 and not shift},
        **{"BLOCK": block, "CHUNK": chunk},
    }
    for stage, bins, merged, copies, size in stages:
        launch(
            solve_tail_kernel,
            programs,
            words,
            hint,
            out,
            bins,
            merged,
            every_bin,
            counters,
            counters.view(torch.float64),
            words.numel(),
            copies,
            cold_replicas,
            KEEP[bits],
            1,
            constants={**constants, "STAGE": stage.value, "SPAN": size},
            num_warps=8,
            **registers,
        )
    return True


def _words(x: Tensor) -> Tensor:
    """Return a tensor as it lies in memory, as words of 32 bits; of 16 where it does not consist of whole ones."""
    x = x if cpu.is_dense(x) else x.contiguous()
    flat = x.as_strided((x.numel(),), (1,))
    if x.element_size() == 4:
        return flat.view(torch.int32)
    halves = flat.view(torch.int16)
    return halves.view(torch.int32) if x.numel() % 2 == 0 and halves.data_ptr() % 4 == 0 else halves
