"""Permute the summands of a gradient, on a GPU, so that the sum is written in the layout in which it is read.

    dx = add(slice_scatter(..), slice_scatter(..))          a  = permute(slice_scatter(..), order)
    y  = clone(permute(dx, order))                    ->    b  = permute(slice_scatter(..), order)
                                                            y  = clone(add(a, b))

on the half of the graph that it is in, for sums as select_gradients leaves them, of any number of parts, and permute,
unsqueeze and squeeze in a row: nn.MultiheadAttention permutes its projection before it takes query, key and value out.
The values are the same. Inductor stores a sum that reads more than eight values, as three gradients do with what their
masks are made of, and the clone was one more kernel that read and wrote all of it. The permuted sum goes through memory
in the order of its clone, and both are one kernel.

Sums that something else reads too stay, and so do those on other devices, where gradients are no slices.
"""

from typing import Any, Final

import torch
from torch import fx

from octav_fx.ir.calls import arguments_of, insert_call
from octav_fx.ir.edits import Edit
from octav_fx.ir.joint import erase_unread, replace
from octav_fx.ir.meta import fake

aten = torch.ops.aten

_PERMUTATIONS: Final = frozenset({aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim})


def permute_summands(gm: fx.GraphModule, device: str = "cuda") -> list[Edit]:
    """See the module's docstring. Gradients on other devices are not looked at."""
    edits = []
    for clone in gm.graph.find_nodes(op="call_function", target=aten.clone.default):
        permuted = arguments_of(clone)["self"]
        total, permutations = _permutations(permuted)
        is_sum = total.target is aten.add.Tensor and _is_of_parts(total, fake(total).shape)
        if fake(clone).device.type != device or not permutations or not is_sum:
            continue
        with gm.graph.inserting_before(permuted):
            new = _permute(total, permutations)
        edits.append(Edit(total.name, "permute summands", f"{list(fake(new).shape)}"))
        (source,) = permuted.all_input_nodes
        replace(permuted, new)
        erase_unread(source, _PERMUTATIONS | {aten.add.Tensor})
    return edits


def _permutations(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """Return the value that a node shows in another order, and the calls that order it, the first one first."""
    found: list[fx.Node] = []
    while node.target in _PERMUTATIONS and len(node.users) == 1:
        found.insert(0, node)
        (node,) = node.all_input_nodes
    return node, found


def _is_of_parts(node: Any, shape: torch.Size) -> bool:
    """Tell whether a value of this shape is filled up with zeros around a part, or a sum of such, for one reader."""
    if not isinstance(node, fx.Node) or len(node.users) != 1 or fake(node).shape != shape:
        return False
    if node.target is not aten.add.Tensor:
        return node.target is aten.slice_scatter.default
    call = arguments_of(node)
    return _is_of_parts(call["self"], shape) and _is_of_parts(call.other, shape)


def _permute(node: fx.Node, permutations: list[fx.Node]) -> fx.Node:
    """Insert the sum of a sum's permuted summands; of a summand, its permutations."""
    if node.target is aten.add.Tensor:
        call = arguments_of(node)
        terms = {"self": _permute(call["self"], permutations), "other": _permute(call.other, permutations)}
        return insert_call(node.graph, aten.add.Tensor, call, terms)
    for permutation in permutations:
        target: Any = permutation.target
        node = insert_call(node.graph, target, arguments_of(permutation), {"self": node})
    return node
