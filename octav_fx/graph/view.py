"""The graph as networkx sees it: nodes, and an edge wherever tensors flow."""

from collections.abc import Iterable
from typing import Final

import networkx as nx
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

# On a placeholder of a Dynamo graph: the name of the parameter or buffer that it stands for.
STATE: Final = "state"
# And whether it is a parameter.
PARAMETER: Final = "parameter"


def state_name(node: fx.Node) -> str | None:
    """The name of the parameter or buffer that a node reads, or None for any other node."""
    return str(node.target) if node.op == "get_attr" else node.meta.get(STATE)


def holds_tensor(node: fx.Node) -> bool:
    """Whether the value of a captured node is or contains a tensor; sizes and flags do not."""
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(node.meta.get("value")))


def brings_in_values(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node is a parameter, a module with parameters, or an input of floating point."""
    match node.op:
        case "placeholder" if STATE in node.meta:
            return bool(node.meta[PARAMETER])
        case "placeholder":
            leaves = pytree.tree_leaves(node.meta.get("value"))
            return any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves)
        case "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            return name in root.get_submodule(owner)._parameters
        case "call_module":
            return next(root.get_submodule(str(node.target)).parameters(), None) is not None
    return False


def tensor_flow(graph: fx.Graph) -> "nx.DiGraph[fx.Node]":
    """A directed graph of fx nodes with the edges that carry tensors, so that a shared shape links nothing."""
    flow: nx.DiGraph[fx.Node] = nx.DiGraph()
    flow.add_nodes_from(graph.nodes)
    flow.add_edges_from(
        (source, node) for node in graph.nodes for source in node.all_input_nodes if holds_tensor(source)
    )
    return flow


def downstream(flow: "nx.DiGraph[fx.Node]", nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Everything that is computed from one of the nodes, without the nodes that only start a path."""
    return {reached for node in nodes for reached in nx.descendants(flow, node)}


def upstream(flow: "nx.DiGraph[fx.Node]", nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Everything that one of the nodes is computed from."""
    return {reached for node in nodes for reached in nx.ancestors(flow, node)}


def static(flow: "nx.DiGraph[fx.Node]") -> set[fx.Node]:
    """The nodes computed from parameters, buffers and constants alone."""
    inputs = [node for node in flow if node.op == "placeholder" and STATE not in node.meta]
    return set(flow) - set(inputs) - downstream(flow, inputs)
