"""What Dynamo has to ask of a converted model before each call: less than of any other.

It guards each tensor that a graph reads, in 4 us each. A converted MobileNetV2 reads 220, and runs in 7 ms. But layers
on codes look at their constants in each call anyway, for which weights were packed, and raise where they do not fit.
"""

import re
from typing import Any, Final

import torch
from torch import fx

from octav_fx.compat.graphs import dynamo_source
from octav_fx.compat.inductor import drop_guards

_OPS: Final[Any] = torch.ops.octav
# Those that look at the tensors behind their first arguments, by how many of these are codes.
_LOOKING: Final = {
    _OPS.integer_conv.default: 1,
    _OPS.integer_linear.default: 1,
    _OPS.code_sum.default: 2,
    _OPS.code_mean.default: 1,
    _OPS.lookup.default: 1,
}
# A buffer of a module, whose name is the group.
_BUFFER: Final = re.compile(r"(.*)\._buffers\['[^']*'\]")


def without_guards(gm: fx.GraphModule) -> None:
    """Drop the guards on modules whose buffers are constants of layers on codes, and of nothing else in a graph."""
    buffers: dict[str, list[fx.Node]] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        if (found := _BUFFER.fullmatch(dynamo_source(node))) is not None:
            buffers.setdefault(found[1], []).append(node)
    drop_guards(module for module, nodes in buffers.items() if all(map(_is_constant, nodes)))


def _is_constant(node: fx.Node) -> bool:
    """Tell whether all readers of a node look at it."""
    return all(user.target in _LOOKING and node not in user.args[: _LOOKING[user.target]] for user in node.users)
