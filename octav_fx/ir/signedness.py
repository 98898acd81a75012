"""Which values cannot be negative, found on the graph: an unsigned grid has twice the levels for them."""

from typing import Any

from torch import fx

from octav_fx.compat.tensors import pytree
from octav_fx.ir.aliasing import aliasing
from octav_fx.ir.arguments import arguments
from octav_fx.ir.meta import fake
from octav_fx.ir.ops import op_of


def nonnegative(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes whose values are never below zero (NaN aside). Rows of ops say why, see signs.py."""
    found: set[fx.Node] = set()
    memory = aliasing(graph)

    def is_nonnegative(argument: Any) -> bool:
        return all(_is_leaf_nonnegative(leaf, found) for leaf in pytree.tree_leaves(argument))

    for node in graph.nodes:
        op = op_of(node)
        if op is None or op.nonnegative is None or not op.nonnegative(arguments(node), is_nonnegative):
            continue
        # Of a value that is written into later, by any of its views, nothing is known.
        if not memory.written(node, after=node):
            found.add(node)
    return found


def _is_leaf_nonnegative(leaf: Any, found: set[fx.Node]) -> bool:
    if isinstance(leaf, fx.Node):
        if leaf in found:
            return True
        leaf = fake(leaf)
    return isinstance(leaf, (int, float)) and leaf >= 0
