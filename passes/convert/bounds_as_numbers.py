"""Clamp to the numbers that buffers hold.

    clamp(x, self.low, self.high)    ->  clamp(x, -6.0, 6.0)
    clamp(x, self.low, None)         ->  x                          low is -inf

for bounds that the module's state alone decides. A quantizer behind it saturates there; and ONNX's optimizer, as torch
brings it, loses bounds of several clamps of one value.
"""

import math
from collections.abc import Set
from typing import Final

import torch
from torch import Tensor, fx

from octav_fx.ir.arguments import argument, set_argument
from octav_fx.ir.dataflow import constants, value_of
from octav_fx.ir.edits import Edit, erase_unused
from octav_fx.ir.ops import in_place, is_op

# What is no bound.
_OPEN: Final = {"min": -math.inf, "max": math.inf}


def bounds_as_numbers(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits = []
    known = constants(gm.graph)
    for node in list(gm.graph.nodes):
        if not is_op(node, "clamp") or node.op == "call_module" or in_place(node):
            continue
        written = {name: argument(node, name) for name in _OPEN}
        computed = {bound: _number(gm, known, bound) for bound in written.values() if isinstance(bound, fx.Node)}
        if not computed or None in computed.values():
            continue
        bounds = {name: computed.get(bound, bound) for name, bound in written.items()}
        bounds = {name: None if bound == _OPEN[name] else bound for name, bound in bounds.items()}
        edits.append(Edit(node.name, "clamp", " .. ".join(map(str, bounds.values()))))
        if set(bounds.values()) == {None}:
            node.replace_all_uses_with(argument(node, "input"))
            gm.graph.erase_node(node)
        else:
            for name, bound in bounds.items():
                if bound is not written[name]:
                    set_argument(node, name, bound)
        erase_unused(*computed)
    return edits


def _number(gm: fx.GraphModule, known: Set[fx.Node], bound: fx.Node) -> float | None:
    """Return a bound as a number; None for what a number does not stand for."""
    value = value_of(gm, bound) if bound in known else None
    # Of another dtype a number would not make the same result.
    if not isinstance(value, Tensor) or value.dim() or value.dtype is not torch.float32 or value.isnan():
        return None
    return float(value)
