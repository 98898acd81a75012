"""How large the sums of products of codes can be, and for which K the accumulators hold them."""

from typing import Final

from octav_fx.formats.grid import Grid

# The integers that an accumulator holds, and their negatives: all up to the largest.
INT32: Final = 2**31 - 1
FLOAT32: Final = 2**24
# float8_e4m3fn holds every integer up to this one.
FLOAT8: Final = 16
# Of products of float8 Hopper's tensor cores keep 14 bits of a sum (arXiv 2412.19437, 3.3.2). The kernel moves it to
# float32 after each slice of so many products.
TENSOR_CORE: Final = 2**14
SLICE: Final = 128


def offset(bits: int, signed: bool) -> int:
    """Return what is subtracted from codes so that they fit int8: codes 0..255 become -128..127."""
    return 128 if Grid(bits, signed).high > 127 else 0


def largest_k(x_bits: int, x_signed: bool, w_bits: int) -> int:
    """Return the K up to which the integer product of codes fits int32: 131071 at 8 signed bits, 65793 unsigned.

    No partial sum has to fit, as integers of 32 bits wrap around and a sum that fits comes out right.
    """
    return INT32 // (_magnitude(x_bits, x_signed, 0) * _magnitude(w_bits, True, 0))


def largest_k_in_halves(x_bits: int, x_signed: bool, w_bits: int) -> int:
    """Return the K up to which float32 holds every partial sum of the codes as they are multiplied: 1024 at 8 bits."""
    shift = offset(x_bits, x_signed)
    return FLOAT32 // (_magnitude(x_bits, x_signed, shift) * _magnitude(w_bits, True, 0))


def largest_k_in_float8(x_bits: int, x_signed: bool, w_bits: int) -> int:
    """Return the K up to which products in float8_e4m3fn are added exactly: 139810 at 4 bits; 0 where none is."""
    x, w = _magnitude(x_bits, x_signed, 0), _magnitude(w_bits, True, 0)
    return FLOAT32 // (x * w) if max(x, w) <= FLOAT8 and x * w * SLICE <= TENSOR_CORE else 0


def _magnitude(bits: int, signed: bool, shift: int) -> int:
    """Return the largest |code - shift| on a grid."""
    grid = Grid(bits, signed)
    return max(abs(grid.low - shift), abs(grid.high - shift))
