"""Which op multiplies codes where: one row for each kernel, asked in order.

The pass integer_matmul brings a matmul or a convolution of levels into the form of octav.int_matmul: codes [M, K] and
[N, K] in the dtype that a row names, a scale for each row and each column, a bias. It then inserts the op of the first
row for the device that does not decline. Another kernel is another row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch

from octav_fx.formats.grid import Grid
from octav_fx.ops.int_matmul import configs
from octav_fx.ops.int_matmul.op import int_matmul
from octav_fx.ops.int_matmul.range import largest_k, largest_k_in_float8


@dataclass(frozen=True, slots=True)
class CodesMatmul:
    """A matmul of codes: [M, K] on the grid x times [K, N] on the grid w, with a result in dtype."""

    m: int
    n: int
    k: int
    x: Grid
    w: Grid
    dtype: torch.dtype


# Why a matmul stays in floating point, or None.
Reason = str | None


@dataclass(frozen=True, slots=True)
class MatmulKernel:
    """An op that multiplies codes on one type of device."""

    device: str
    # It takes those of int_matmul's arguments, by their names, that its schema has.
    op: Any
    # Why its numbers would be wrong: grids, lengths or dtypes that it does not take.
    cannot: Callable[[CodesMatmul], Reason]
    # Why it would not be faster than floating point on this device.
    declined: Callable[[torch.device, int, int, int], Reason]
    # What holds the codes.
    operand: torch.dtype = torch.int8


def fits_int32(matmul: CodesMatmul) -> Reason:
    """Return why a kernel that adds up in 32 bits and writes float32 or a half cannot compute it."""
    largest = largest_k(matmul.x.bits, matmul.x.signed, matmul.w.bits)
    too_long = f"sums over K = {matmul.k} may not fit 32 bits, the largest is {largest}"
    return _result(matmul) or (too_long if matmul.k > largest else None)


def fits_float8(matmul: CodesMatmul) -> Reason:
    """Return why a kernel that adds up slices of float8 and then float32 would not be exact."""
    largest = largest_k_in_float8(matmul.x.bits, matmul.x.signed, matmul.w.bits)
    if not largest:
        return f"sums of products of {matmul.x.bits} and {matmul.w.bits} bits are not exact in float8"
    too_long = f"sums over K = {matmul.k} are not exact in float32, the largest is {largest}"
    return _result(matmul) or (too_long if matmul.k > largest else None)


def _result(matmul: CodesMatmul) -> Reason:
    """Return why neither writes it, whatever it sums."""
    if matmul.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its result is {matmul.dtype}"
    return None if matmul.w.signed else "its weight is unsigned"


FLOAT8: Final = torch.float8_e4m3fn

MATMULS: Final[tuple[MatmulKernel, ...]] = (
    # Triton; scales and bias at the end. Sums in float32 first: float8 is the faster for what it is exact for.
    MatmulKernel("cuda", int_matmul.default, fits_float8, partial(configs.declined, FLOAT8), FLOAT8),
    MatmulKernel("cuda", int_matmul.default, fits_int32, partial(configs.declined, torch.int8)),
)


def has_kernel(device: torch.device) -> bool:
    """Return whether any row is for this device."""
    return any(kernel.device == device.type for kernel in MATMULS)


def kernel_for(device: torch.device, matmul: CodesMatmul) -> MatmulKernel | str:
    """Return the first kernel for the device that takes the matmul, or why none does."""
    reasons = []
    for kernel in MATMULS:
        if kernel.device == device.type:
            reason = kernel.cannot(matmul) or kernel.declined(device, matmul.m, matmul.n, matmul.k)
            if reason is None:
                return kernel
            reasons.append(reason)
    return "; ".join(dict.fromkeys(reasons)) or f"no kernel multiplies integers on {device.type}"
