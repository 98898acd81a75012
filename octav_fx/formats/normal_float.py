"""NF4: sixteen levels that are equally likely for normally distributed values (QLoRA, arXiv 2305.14314, appendix E)."""

from statistics import NormalDist

from octav_fx.formats.codebook import Codebook

# As in the paper: the mean of where 30 and 32 halves of a bin end.
_OFFSET = (1 - 1 / 32 + 1 - 1 / 30) / 2


def _quantiles(count: int) -> list[float]:
    """Return so many quantiles above zero, the greatest first, the last of which is above the median."""
    shares = [_OFFSET + (0.5 - _OFFSET) * i / count for i in range(count)]
    return [NormalDist().inv_cdf(share) for share in shares]


def _levels() -> tuple[float, ...]:
    """Return eight levels above zero, zero, and seven below, the greatest magnitude 1."""
    above, below = _quantiles(8), [-level for level in _quantiles(7)]
    return tuple(level / above[0] for level in sorted([*above, 0.0, *below]))


NF4 = Codebook("nf4", 4, _levels())
