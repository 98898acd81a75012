"""Levels evenly spaced under a power: small values get more of them (NUPES, arXiv 2308.05600)."""

from octav_fx.formats.codebook import Codebook, symmetric

# The source searches for the exponent of each layer; here it is one half. The source rounds what the root of a value
# gives; here as everywhere a value goes to the nearest level.
NUPES = Codebook("nupes", 4, symmetric([(i / 7) ** 2 for i in range(8)]))
