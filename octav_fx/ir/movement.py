"""selects(): does a node return elements of its input unchanged, moved, repeated, or the largest of each window."""

from typing import Final

from torch import fx

from octav_fx.ir.ops import is_op
from octav_fx.ir.pools import pads_with_zeros, repeats_nearest

# Ops that move elements and compute nothing, and a max pool.
_SELECTING: Final = (
    *("flatten", "reshape", "permute", "transpose", "movedim", "squeeze", "unsqueeze", "contiguous"),
    "max_pool",
)


def selects(node: fx.Node) -> bool:
    """Tell whether each element that a node returns is one of its input, or a zero around them."""
    return is_op(node, *_SELECTING) or pads_with_zeros(node) or repeats_nearest(node)
