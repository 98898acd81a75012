"""Levels that hardware multiplies by shifting: powers of two, and sums of two (APoT, arXiv 1909.13144, eq. 5)."""

from octav_fx.formats.codebook import Codebook, symmetric

POWERS_OF_TWO: Codebook = symmetric("pow2", 4, [2.0**-i for i in range(7)])
# Four bits: a sign, and a magnitude that is one of 0, 1, 1/2, 1/4 plus one of 0, 1/8.
APOT: Codebook = symmetric("apot", 4, [p + q for p in (0.0, 1.0, 0.5, 0.25) for q in (0.0, 0.125)])
POWERS: tuple[Codebook, ...] = (POWERS_OF_TWO, APOT)
