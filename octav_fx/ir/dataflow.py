"""The graph as networkx sees it: nodes, and an edge wherever tensors flow."""

import functools
from collections.abc import Iterable
from typing import Any, Final

import networkx as nx
from torch import Tensor, fx, nn

from octav_fx.compat.modules import parameters_of
from octav_fx.compat.tensors import pytree
from octav_fx.errors import OctavError
from octav_fx.ir.ops import in_place, op_of

# On a placeholder of a Dynamo graph: the name of the parameter or buffer that it stands for.
STATE: Final = "state"
# And whether it is a parameter.
PARAMETER: Final = "parameter"

# What these return may share memory with their first input; so may what an op of no row returns.
_VIEWS: Final = frozenset(
    {
        *("flatten", "reshape", "permute", "transpose", "movedim", "squeeze", "unsqueeze", "expand", "contiguous"),
        *("cast", "chunk", "getitem", "identity", "dropout"),
    }
)


def state_name(node: fx.Node) -> str | None:
    """The name of the parameter or buffer that a node reads, or None for any other node."""
    return str(node.target) if node.op == "get_attr" else node.meta.get(STATE)


def holds_tensor(node: fx.Node) -> bool:
    """Whether the value of a captured node is or contains a tensor; sizes and flags do not."""
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(node.meta.get("value")))


def is_value_source(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node is a parameter, a module with parameters, or an input of floating point."""
    match node.op:
        case "placeholder" if STATE in node.meta:
            return bool(node.meta[PARAMETER])
        case "placeholder":
            leaves = pytree.tree_leaves(node.meta.get("value"))
            return any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves)
        case "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            return name in parameters_of(root.get_submodule(owner))
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


def constants(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose value a module's state alone decides, whatever the inputs are, their shapes included.

    State that the graph writes into is none; nor is what may differ between two calls (factories, dropout, modules).
    """
    written = {_written_state(node) for node in graph.nodes if in_place(node)}
    found: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        op = op_of(node)
        is_random = op is not None and op.name == "dropout"
        is_state = node.op == "get_attr" and node.target not in written
        repeats = node.op in ("call_function", "call_method") and not in_place(node) and not is_random
        if is_state or (repeats and inputs and found.issuperset(inputs)):
            found.add(node)
    return found


def _written_state(node: fx.Node) -> str | None:
    """The name of the state that an in-place node may write into, seen through views of it."""
    target: Any = next(iter(node.all_input_nodes), None)
    while isinstance(target, fx.Node) and target.op != "get_attr":
        op = op_of(target)
        is_view = target.op != "placeholder" and (op is None or op.name in _VIEWS)
        target = next(iter(target.all_input_nodes), None) if is_view else None
    return None if target is None else str(target.target)


def value_of(module: nn.Module, node: fx.Node) -> Any:
    """The present value of one of the constants of a module's graph."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: value_of(module, source))
    match node.op:
        case "get_attr":
            return functools.reduce(getattr, str(node.target).split("."), module)
        case "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        case "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    raise OctavError(f"{node.name} ({node.op} {node.target}) is not computed from the module's state alone")


def ancestors(node: fx.Node) -> list[fx.Node]:
    """The node and everything it is computed from, nearest first, sizes and flags among it."""
    found = {node: None}
    pending = [node]
    for reached in pending:
        new = [source for source in reached.all_input_nodes if source not in found]
        found.update(dict.fromkeys(new))
        pending += new
    return pending


def static(flow: "nx.DiGraph[fx.Node]") -> set[fx.Node]:
    """The nodes computed from parameters, buffers and constants alone."""
    inputs = [node for node in flow if node.op == "placeholder" and STATE not in node.meta]
    return set(flow) - set(inputs) - downstream(flow, inputs)
