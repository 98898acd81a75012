"""Which values cannot be negative, found on the graph: an unsigned grid has twice the levels for them."""

import operator
from typing import Any, Final

import torch
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


# Never below zero where no number that they are of is.
_OF_NUMBERS: Final = (
    *(operator.add, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.pow),
    *(abs, float, int, max, min, round, torch.sym_max, torch.sym_min, torch.sym_float, torch.sym_int),
)


def _is_leaf_nonnegative(leaf: Any, found: set[fx.Node]) -> bool:
    if isinstance(leaf, fx.Node):
        return leaf in found or _is_number_nonnegative(leaf)
    return isinstance(leaf, (int, float)) and leaf >= 0


def _is_number_nonnegative(node: fx.Node) -> bool:
    """Tell whether a number is never below zero: a size or a guarded attribute is not, their difference may be."""
    value = fake(node)
    if not isinstance(value, (int, float)) or value < 0:
        return False
    numbers = [source for source in node.all_input_nodes if isinstance(fake(source), (int, float))]
    if not numbers:
        return True
    literals = [arg for arg in node.args if isinstance(arg, (int, float))]
    is_kept = node.target in _OF_NUMBERS and all(literal >= 0 for literal in literals)
    return is_kept and all(map(_is_number_nonnegative, numbers))
