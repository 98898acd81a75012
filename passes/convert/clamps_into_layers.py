"""Let an integer layer do the clamp that alone reads it.

relu(integer_conv(...))             ->  integer_conv(..., low=0.0)
clamp(integer_linear(...), -1, 1)   ->  integer_linear(..., low=-1.0, high=1.0)
"""

import math
from typing import Any, Final

from torch import fx

from octav_fx.ir.clamps import clamp_bounds
from octav_fx.ir.dataflow import readers
from octav_fx.ir.edits import Edit
from octav_fx.nn.integer import integer_conv, integer_linear

LAYERS: Final = (integer_conv, integer_linear)


def clamps_into_layers(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits = []
    for node in gm.graph.nodes:
        while is_layer(node) and len(found := readers(node)) == 1:
            (reader,) = found
            bounds = clamp_bounds(reader)
            if bounds is None:
                break
            node.kwargs = {**node.kwargs, **within(node.kwargs, *bounds)}
            reader.replace_all_uses_with(node)
            gm.graph.erase_node(reader)
            edits.append(Edit(str(reader.name), "fuse", f"into {node.name}"))
    return edits


def is_layer(node: fx.Node) -> bool:
    """Tell whether a node is an integer layer with a float result."""
    return node.op == "call_function" and node.target in LAYERS and "step" not in node.kwargs


def within(known: Any, low: float | None, high: float | None) -> dict[str, float | None]:
    """Return the bounds of a clamp to low .. high behind the clamp that is known: where -inf and inf end up."""
    below, above = (-math.inf if low is None else low), (math.inf if high is None else high)
    first, last = known.get("low"), known.get("high")
    ends = (-math.inf if first is None else first), (math.inf if last is None else last)
    lower, upper = (min(max(end, below), above) for end in ends)
    return {"low": None if lower == -math.inf else lower, "high": None if upper == math.inf else upper}
