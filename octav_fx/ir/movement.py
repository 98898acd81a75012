"""selects(): does a node return elements of its input unchanged, moved, repeated, or the largest of each window."""

from typing import Any, Final

from torch import fx

from octav_fx.ir.arguments import called_module
from octav_fx.ir.dataflow import written_before
from octav_fx.ir.ops import is_op
from octav_fx.ir.pools import pads_with_zeros, repeats_nearest
from octav_fx.nn import FakeQuantizer

# Ops that move elements and compute nothing, and a max pool.
_SELECTING: Final = (
    *("flatten", "reshape", "permute", "transpose", "movedim", "squeeze", "unsqueeze", "contiguous"),
    "max_pool",
)


def selects(node: fx.Node) -> bool:
    """Tell whether each element that a node returns is one of its input, or a zero around them."""
    return is_op(node, *_SELECTING) or pads_with_zeros(node) or repeats_nearest(node)


def quantizer_before(value: Any, reader: fx.Node) -> fx.Node | None:
    """Return the call of a fake-quantizer whose levels a node reads, seen through what selects them; else None."""
    while not isinstance(called_module(value), FakeQuantizer):
        if not isinstance(value, fx.Node) or not selects(value) or written_before(value, reader):
            return None
        value = value.all_input_nodes[0]
    return value
