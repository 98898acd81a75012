"""Tensors of every shape, memory layout and floating-point dtype, and allocators that show what a kernel leaves out."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from octav_fx.clips import methods
from octav_fx.formats.granularity import TENSOR, Granularity
from octav_fx.formats.grid import Grid
from octav_fx.formats.registry import format_of
from octav_fx.formats.spec import Spec

# "percentile" is another name of one of the others, as tests/clips/test_percentile.py asserts.
METHODS = [name for name in methods.METHODS if name != "percentile"]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# What the C++ kernels take.
NATIVE = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [0, 1, 2, 3, 5, 8, 17, 33]
# One of each way to round, and grids of all kinds.
FORMS = ["int4", "uint3", "int8-narrow", "e2m1", "e4m3", "ternary", "zero-free", "nf4"]
# 1 / 512 is half of the smallest step for a clip of 1: multiples of it hit every tie of every grid.
TIE = 1 / 512
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0, 1e30, -1e-40]


@st.composite
def tensors(draw: st.DrawFn, dtypes: list[torch.dtype], special: bool = True) -> Tensor:
    """Normal values, ties and, if special, what is not a normal number; dense in any order, strided or expanded."""
    shape = draw(st.lists(st.sampled_from(SIZES), max_size=3))
    order = draw(st.permutations(range(len(shape))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    layout = draw(st.sampled_from(["dense", "dense", "strided", "expanded"])) if shape else "dense"
    # Permuting by order and then by its inverse gives the shape back and leaves the strides in that order.
    stored = [shape[axis] for axis in order]
    if layout == "strided":
        stored[-1] *= 2
    elif layout == "expanded":
        stored[0] = 1
    values = torch.randn(stored, generator=generator)
    ties = torch.randint(-600, 600, stored, generator=generator) * TIE
    values = torch.where(torch.rand(stored, generator=generator) < 0.3, ties, values)
    if special:
        others = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), stored, generator=generator)]
        values = torch.where(torch.rand(stored, generator=generator) < 0.1, others, values)
    values = values.to(draw(st.sampled_from(dtypes)))
    if layout == "strided":
        values = values[..., ::2]
    elif layout == "expanded":
        values = values.expand(shape[order[0]], *stored[1:])
    return values.permute([order.index(axis) for axis in range(len(shape))])


@st.composite
def axes(draw: st.DrawFn, x: Tensor) -> int | None:
    """No channel axis, or any of x's, counted from either end."""
    return draw(st.sampled_from([None, *range(-x.dim(), x.dim())]))


@st.composite
def clips(draw: st.DrawFn, x: Tensor, dim: int | None) -> Tensor:
    """A clip, or one for each channel: ordinary ones, 1 (see TIE), 0, and one whose step is not a normal number."""
    values = torch.tensor([1.0, 0.7, 3.3, 0.0, 1e-40])
    if dim is None:
        return draw(st.sampled_from(list(values)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return values[torch.randint(len(values), (x.shape[dim],), generator=generator)]


@st.composite
def codes(draw: st.DrawFn, grid: Grid) -> Tensor:
    """Codes of the grid, what stands for not finite, and any other integer of their dtype; dense or strided."""
    like = draw(tensors([torch.float32]))
    values = torch.iinfo(grid.codes_dtype)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    near = torch.randint(grid.low - 3, grid.high + 3, like.shape, generator=generator)
    far = torch.randint(values.min, values.max + 1, like.shape, generator=generator)
    chosen = torch.where(torch.rand(like.shape, generator=generator) < 0.7, near, far)
    chosen[torch.rand(like.shape, generator=generator) < 0.1] = values.min
    # copy_ refuses memory that several elements share.
    stored = torch.empty_strided(like.shape, like.stride(), dtype=grid.codes_dtype)
    return stored.copy_(chosen) if 0 not in like.stride() else chosen.to(grid.codes_dtype)


def every_number(dtype: torch.dtype) -> Tensor:
    """All numbers of 16 bits, subnormal ones, infinities and NaN among them; of float32 those in bfloat16."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    return bits.view(torch.bfloat16).float() if dtype is torch.float32 else bits.view(dtype)


@contextmanager
def filled_with_nan() -> Iterator[list[int]]:
    """What the allocators return is NaN or no code, so an element that is never written shows; counts their calls."""
    calls = [0]

    def poisoned(allocate):
        def wrapped(*args, **kwargs):
            calls[0] += 1
            empty = allocate(*args, **kwargs)
            return empty.fill_(math.nan if empty.is_floating_point() else torch.iinfo(empty.dtype).max)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty_like", poisoned(torch.empty_like))
        patch.setattr(torch, "empty", poisoned(torch.empty))
        patch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
        yield calls


def laid_out(dtype: torch.dtype) -> list[torch.Tensor]:
    """Tensors of shape [2, 3, 4, 5] as they may lie in memory: two dense, one with gaps, one with axes exchanged."""
    return [
        torch.empty(2, 3, 4, 5, dtype=dtype),
        torch.empty(2, 3, 4, 5, dtype=dtype, memory_format=torch.channels_last),
        torch.empty(2, 3, 4, 10, dtype=dtype)[..., ::2],
        torch.empty(5, 3, 4, 2, dtype=dtype).transpose(0, 3),
    ]


@st.composite
def specs(draw: st.DrawFn, x: Tensor, forms: list[str], scales: list[str]) -> str:
    """A spec of any granularity that x has; the axis of rows is counted from the front."""
    axis = draw(st.integers(0, x.dim() - 1)) if x.dim() else None
    shared = [TENSOR]
    if axis is not None:
        sizes = [size for size in (1, 2, 8, 16, 17, 32) if x.shape[axis] % size == 0]
        groups = [Granularity("group", axis, size) for size in sizes]
        shared += [Granularity("channel", axis), Granularity("token", axis), *groups]
    form, scale = draw(st.sampled_from(forms)), draw(st.sampled_from(scales))
    return str(Spec(format_of(form), draw(st.sampled_from(shared)), scale))
