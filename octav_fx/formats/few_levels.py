"""Formats of two bits without a wasted level: ternary, and four levels around zero without zero."""

from octav_fx.formats.codebook import Codebook

# Stored in two bits; log2(3) would do.
TERNARY = Codebook("ternary", 2, (-1.0, 0.0, 1.0))
# ParetoQ's grid for two bits (arXiv 2502.02631).
ZERO_FREE = Codebook("zero-free", 2, (-1.5, -0.5, 0.5, 1.5))
FEW_LEVELS: tuple[Codebook, ...] = (TERNARY, ZERO_FREE)
