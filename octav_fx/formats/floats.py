"""Floating-point formats of 4 and 8 bits: E2M1 and E4M3FN, E5M2 of the OCP specifications, without inf and NaN."""

from octav_fx.formats.codebook import Codebook, symmetric


def _magnitudes(exponent_bits: int, mantissa_bits: int, bias: int, count: int) -> list[float]:
    """Return the first count magnitudes in the order of their codes; those of exponent zero are subnormal."""
    found = []
    for code in range(count):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        assert exponent < 2**exponent_bits
        whole = mantissa / 2**mantissa_bits + (exponent > 0)
        found.append(whole * 2.0 ** (max(exponent, 1) - bias))
    return found


E2M1: Codebook = symmetric("e2m1", 4, _magnitudes(2, 1, 1, 8))
# The code of all ones is NaN.
E4M3: Codebook = symmetric("e4m3", 8, _magnitudes(4, 3, 7, 127))
# The codes with the highest exponent are inf and NaN.
E5M2: Codebook = symmetric("e5m2", 8, _magnitudes(5, 2, 15, 124))
FLOATS: tuple[Codebook, ...] = (E2M1, E4M3, E5M2)
