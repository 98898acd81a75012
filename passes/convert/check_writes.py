"""Refuse a write that is seen elsewhere in one layout of memory, and not in another.

    y = flatten(a, 1); b = relu_(a); return b, y        ->  OctavError

flatten, reshape and contiguous return a view where the elements lie in their order, and else a copy. Integer layers
return images with channels last, which the model's own mostly do not: y would hold what a was before the write.
"""

from collections import defaultdict
from typing import Final

import torch
from torch import fx, nn

from octav_fx.errors import OctavError
from octav_fx.ir.dataflow import readers
from octav_fx.ir.edits import Edit
from octav_fx.ir.op import Trait
from octav_fx.ir.ops import in_place, module_of, op_of

# What returns a view or a copy, as the elements lie.
_METHODS: Final = ("flatten", "reshape", "contiguous")
_FUNCTIONS: Final = (torch.flatten, torch.reshape)


def check_writes(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring. Changes nothing."""
    # In the order of the graph: the nodes so far that surely share memory with a node, and those that may.
    shared: dict[fx.Node, set[fx.Node]] = defaultdict(set)
    possible: dict[fx.Node, set[fx.Node]] = defaultdict(set)
    for node in gm.graph.nodes:
        source = next(iter(node.all_input_nodes), None)
        is_write = in_place(node)
        if source is None or not (is_write or _is_view(node)):
            continue
        if is_write:
            _check(node, source, _linked(source, shared), _linked(source, shared, possible))
        links = possible if _may_be_copy(node) else shared
        links[source].add(node)
        links[node].add(source)
    return []


def _check(write: fx.Node, target: fx.Node, sure: set[fx.Node], possible: set[fx.Node]) -> None:
    """Raise OctavError where something that may share memory with a target is read after the write into it."""
    for view in sorted(possible - sure):
        if any(reader > write for reader in readers(view)):
            raise OctavError(
                f"{write} writes into {target}, and {view}, which is read later, sees that in one layout of memory "
                "only, while integer layers return images with channels last: write into no tensor there (x = x + y in "
                "place of x += y), or use convert(q, integers=False)"
            )


def _linked(node: fx.Node, *links: dict[fx.Node, set[fx.Node]]) -> set[fx.Node]:
    """Return what links lead to from a node, itself included."""
    found, waiting = {node}, [node]
    while waiting:
        reached = waiting.pop()
        new = {other for known in links for other in known.get(reached, ())} - found
        found |= new
        waiting += new
    return found


def _is_view(node: fx.Node) -> bool:
    op = op_of(node)
    return op is not None and Trait.VIEW in op.traits


def _may_be_copy(node: fx.Node) -> bool:
    match node.op:
        case "call_method":
            return node.target in _METHODS
        case "call_module":
            return isinstance(module_of(node), nn.Flatten)
    return node.target in _FUNCTIONS
