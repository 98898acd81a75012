"""Which values cannot be negative, found on the graph: an unsigned grid has twice the levels for them."""

from collections.abc import Callable
from typing import Any, Final

from torch import fx

from octav_fx.compat.tensors import pytree
from octav_fx.ir.aliasing import aliasing
from octav_fx.ir.ops import module_of, op_of

# What these return is never below zero, whatever goes in.
ALWAYS: Final = frozenset(
    {"relu", "relu6", "sigmoid", "hardsigmoid", "softmax", "softplus", "abs", "exp", "square", "sqrt"}
)

# These move, select, average or scale up what they are given: never below zero if their first input is not.
PRESERVING: Final = frozenset(
    {
        *(
            "max_pool",
            "avg_pool",
            "adaptive_avg_pool",
            "adaptive_max_pool",
            "mean",
            "sum",
            "amax",
            "flatten",
            "reshape",
        ),
        *("permute", "transpose", "movedim", "squeeze", "unsqueeze", "expand", "repeat", "contiguous", "cast", "roll"),
        *("pixel_shuffle", "chunk", "getitem", "dropout", "identity"),
    }
)

# These are, if none of their inputs is below zero.
COMBINING: Final = frozenset({"add", "mul", "div", "cat", "maximum"})


def nonnegative(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose values are never below zero (NaN aside)."""
    found: set[fx.Node] = set()
    memory = aliasing(graph)
    for node in graph.nodes:
        op = op_of(node)
        if op is None or not _is_nonnegative(op.name, node, found):
            continue
        # Of a value that is written into later, by any of its views, nothing is known.
        if not memory.written(node, after=node):
            found.add(node)
    return found


def _is_nonnegative(op: str, node: fx.Node, found: set[fx.Node]) -> bool:
    if op in ALWAYS:
        return True
    if op in PRESERVING:
        return _operand(node, 0, "input") in found
    if op in COMBINING:
        squares = op == "mul" and len(node.args) == 2 and node.args[0] is node.args[1]
        return squares or all(_is_input_nonnegative(leaf, found) for leaf in pytree.tree_leaves(node.args))
    return op in _CASES and _CASES[op](node, found)


def _is_input_nonnegative(leaf: Any, found: set[fx.Node]) -> bool:
    if isinstance(leaf, fx.Node):
        value = leaf.meta.get("value")
        return leaf in found or (isinstance(value, (int, float)) and value >= 0)
    return leaf is None or isinstance(leaf, str) or leaf >= 0


def _clamp(node: fx.Node, found: set[fx.Node]) -> bool:
    low = module_of(node).min_val if node.op == "call_module" else _operand(node, 1, "min", "min_val")
    return (isinstance(low, (int, float)) and low >= 0) or _operand(node, 0, "input") in found


def _pow(node: fx.Node, found: set[fx.Node]) -> bool:
    exponent = _operand(node, 1, "exponent")
    return (isinstance(exponent, int) and exponent % 2 == 0) or _operand(node, 0, "input") in found


def _interpolate(node: fx.Node, found: set[fx.Node]) -> bool:
    # A bicubic kernel has negative lobes.
    mode = module_of(node).mode if node.op == "call_module" else _operand(node, 3, "mode")
    return mode != "bicubic" and _operand(node, 0, "input") in found


def _pad(node: fx.Node, found: set[fx.Node]) -> bool:
    fill = 0 if node.op == "call_module" else _operand(node, 3, "value")
    return (fill is None or (isinstance(fill, (int, float)) and fill >= 0)) and _operand(node, 0, "input") in found


_CASES: Final[dict[str, Callable[[fx.Node, set[fx.Node]], bool]]] = {
    "clamp": _clamp,
    "pow": _pow,
    "interpolate": _interpolate,
    "pad": _pad,
}


def _operand(node: fx.Node, index: int, *names: str) -> Any:
    if index < len(node.args):
        return node.args[index]
    return next((node.kwargs[name] for name in names if name in node.kwargs), None)
