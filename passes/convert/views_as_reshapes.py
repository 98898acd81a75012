"""Let views take images with channels last, which integer layers return and the model's own mostly are not.

    y.view(n, -1), y.view_as(z)  ->  y.reshape(n, -1), y.reshape_as(z)

A reshape is the view where there is one, and else a copy. Where something writes into the memory of either it stays a
view: the copy would not have what is written, and where there is no view PyTorch says so.
"""

from typing import Any, Final

import torch
from torch import fx

from octav_fx.compat.tensors import pytree
from octav_fx.ir.dataflow import may_be_view
from octav_fx.ir.edits import Edit, site_of
from octav_fx.ir.ops import in_place

_METHODS: Final = {"view": "reshape", "view_as": "reshape_as"}


def views_as_reshapes(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits = []
    written = {_memory(node) for node in gm.graph.nodes if in_place(node)}
    for node in gm.graph.nodes:
        is_view = node.op == "call_method" and node.target in _METHODS
        if not is_view or _asks_for_dtype(node) or _memory(node) in written:
            continue
        node.target = _METHODS[node.target]
        edits.append(Edit(site_of(node), "replace", f"by {node.target}"))
    return edits


def _memory(node: fx.Node) -> fx.Node:
    """Return the node that made the memory that a node returns, as far as is known."""
    while (may_be_view(node) or in_place(node)) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _asks_for_dtype(node: fx.Node) -> bool:
    """Tell whether a view is one of the bits of a tensor, as another dtype."""
    return any(map(_is_dtype, pytree.tree_leaves((node.args, node.kwargs))))


def _is_dtype(value: Any) -> bool:
    is_read = isinstance(value, fx.Node) and value.target is getattr and "dtype" in value.args
    return is_read or isinstance(value, torch.dtype)
