"""The joint graph of forward and backward as AOTAutograd traces it (aten ops): what lies in which half, and views."""

import operator
from typing import Any, Final

import torch
from torch import fx

import octav_fx.ops  # noqa: F401  registers torch.ops.octav
from octav_fx.compat.tensors import OpOverload
from octav_fx.ir.calls import arguments_of

aten = torch.ops.aten

CONVERT: Final = torch.ops.prims.convert_element_type.default

# They are the value itself; dropout of nothing is a clone.
COPIES: Final = frozenset({aten.alias.default, aten.detach.default, aten.clone.default})
# They show the same values in another shape, layout or dtype, or pad them: who reads them reads the value.
VIEWS: Final = frozenset(
    {
        *(aten.view.default, aten.reshape.default, aten.permute.default, aten.expand.default, aten.t.default),
        *(aten.transpose.int, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims),
        *(aten.slice.Tensor, aten.select.int, aten.constant_pad_nd.default, aten._unsafe_view.default),
        *(*COPIES, aten._to_copy.default, CONVERT),
    }
)


def backward_of(graph: fx.Graph) -> set[fx.Node]:
    """Return everything that is computed from the gradients of the outputs; nothing in an inference graph."""
    found = {node for node in graph.find_nodes(op="placeholder") if "tangents" in str(node.target)}
    for node in graph.nodes:
        if found.intersection(node.all_input_nodes):
            found.add(node)
    return found


def origin(node: fx.Node, targets: frozenset[Any]) -> fx.Node:
    """Return what the node is made of by these targets alone."""
    while node.target in targets:
        (node, *_) = node.all_input_nodes
    return node


def closure(node: fx.Node, targets: frozenset[Any]) -> list[fx.Node]:
    """Return the node, and what these targets make of it, and of that, and so on."""
    found = [node]
    for source in found:
        found += [user for user in source.users if user.target in targets and user not in found]
    return found


def is_pointwise(node: fx.Node) -> bool:
    """Tell whether each element of the node is made of one of each input, or shows it: Inductor fuses such nodes."""
    target = node.target
    return target in VIEWS or (isinstance(target, OpOverload) and torch.Tag.pointwise in target.tags)


def results_of(node: fx.Node) -> dict[int, fx.Node]:
    """Return the results of a call that has several, by their index, as far as somebody reads them."""
    return {user.args[1]: user for user in node.users if user.target is operator.getitem}  # type: ignore[misc]


def gradients_of(quantizer: fx.Node) -> list[fx.Node]:
    """Return the gradients of a call of fake_quantize or quantize: they read the same x and the same clip."""
    call = arguments_of(quantizer)
    found = []
    for user in call.clip.users:
        if user.target is torch.ops.octav.fake_quantize_backward.default:
            gradient = arguments_of(user)
            if gradient.x is call.x and gradient.spec == call.spec:
                found.append(user)
    return found


def replace(node: fx.Node, by: fx.Node) -> None:
    """Let whoever reads the node read another one, and erase it."""
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


def recompute_as(source: fx.Node, node: fx.Node) -> fx.Node:
    """Have backward compute a node again where save_codes said so of another one, which it stands for; return it."""
    node.meta.update({key: source.meta[key] for key in ("recompute", "ac_graph_id") if key in source.meta})
    return node


def erase_unread(node: fx.Node, targets: frozenset[Any]) -> None:
    """Erase a call of these targets that nobody reads, and then what only it read, and so on."""
    if node.users or node.target not in targets:
        return
    inputs = node.all_input_nodes
    node.graph.erase_node(node)
    for source in inputs:
        erase_unread(source, targets)
