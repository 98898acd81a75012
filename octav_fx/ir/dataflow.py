"""The graph as networkx sees it: nodes, and an edge wherever tensors flow."""

import functools
from collections.abc import Callable, Collection, Iterable
from typing import Any, Final

import networkx as nx
import torch
from torch import Tensor, fx, nn

from octav_fx.compat.modules import parameters_of
from octav_fx.compat.tensors import pytree
from octav_fx.errors import OctavError
from octav_fx.ir.meta import fake, info
from octav_fx.ir.op import Trait
from octav_fx.ir.ops import OPS, in_place, module_of, op_of

# What tells sizes.
_METHODS: Final = ("size", "dim", "numel", "nelement")
_FUNCTIONS: Final = (len, torch.numel, *(getattr(Tensor, name) for name in _METHODS))
_ATTRIBUTES: Final = ("shape", "ndim")


def state_name(node: fx.Node) -> str | None:
    """Return the name of the parameter or buffer that a node reads, or None for any other node."""
    if node.op == "get_attr":
        return str(node.target)
    state = info(node).state
    return None if state is None else state.name


def holds_tensor(node: fx.Node) -> bool:
    """Return whether the value of a captured node is or contains a tensor; sizes and flags do not."""
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(fake(node)))


def is_value_source(node: fx.Node, root: nn.Module) -> bool:
    """Return whether a node is a parameter, a module with parameters, or an input of floating point."""
    match node.op:
        case "placeholder" if (state := info(node).state) is not None:
            return state.is_parameter
        case "placeholder":
            leaves = pytree.tree_leaves(fake(node))
            return any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves)
        case "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            return name in parameters_of(root.get_submodule(owner))
        case "call_module":
            return next(root.get_submodule(str(node.target)).parameters(), None) is not None
    return False


def tensor_flow(graph: fx.Graph) -> "nx.DiGraph[fx.Node]":
    """Return a directed graph of fx nodes with the edges that carry tensors, so that a shared shape links nothing."""
    flow: nx.DiGraph[fx.Node] = nx.DiGraph()
    flow.add_nodes_from(graph.nodes)
    # Each node is asked once: a dense block concatenates what all layers before it made.
    holding = {node for node in graph.nodes if holds_tensor(node)}
    flow.add_edges_from((source, node) for node in graph.nodes for source in node.all_input_nodes if source in holding)
    return flow


def readers(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that read more of a value than its sizes."""
    return [user for user in node.users if not reads_sizes(user)]


def reads_sizes(node: fx.Node) -> bool:
    """Tell whether a node reads no more of a value than its sizes: x.size(0), x.shape, torch.numel(x), len(x)."""
    if node.op == "call_method":
        return node.target in _METHODS
    return node.target in _FUNCTIONS or (node.target is getattr and node.args[1] in _ATTRIBUTES)


def writes_for_others(node: fx.Node) -> bool:
    """Tell whether a node writes into memory that other nodes read, too: its input, or what that is a view of.

    Such a node does more than return its result, and what computes the result otherwise may not take its place.
    """
    if not in_place(node):
        return False
    memory = node.all_input_nodes[0]
    while len(memory.users) == 1:
        if not (in_place(memory) or may_be_view(memory)):
            return False
        if not memory.all_input_nodes:
            break
        memory = memory.all_input_nodes[0]
    return True


def written_before(value: fx.Node, reader: fx.Node, known: Collection[fx.Node] = ()) -> bool:
    """Tell whether something writes into a value, or into what may be a view of it, before a later node reads it.

    known: nodes whose writes the caller has accounted for. aliasing() is exact, of graphs that have fake tensors.
    """
    views, node = {value}, value.next
    while node is not reader:
        if not views.isdisjoint(node.all_input_nodes):
            if in_place(node) and node not in known:
                return True
            if in_place(node) or may_be_view(node):
                views.add(node)
        node = node.next
    return False


def downstream(flow: "nx.DiGraph[fx.Node]", nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Return everything that is computed from one of the nodes, without the nodes that only start a path."""
    return _reached(nodes, flow.successors)


def upstream(flow: "nx.DiGraph[fx.Node]", nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Return everything that one of the nodes is computed from."""
    return _reached(nodes, flow.predecessors)


def _reached(nodes: Iterable[fx.Node], following: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        new = [node for node in following(pending.pop()) if node not in found]
        found.update(new)
        pending += new
    return found


def constants(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes whose value a module's state alone decides, whatever the inputs are, their shapes included.

    State that the graph writes into is none; nor is what may differ between two calls (factories, dropout, modules).
    """
    written = {_written_state(node) for node in graph.nodes if in_place(node)}
    found: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        op = op_of(node)
        is_random = op is not None and Trait.RANDOM in op.traits
        is_state = node.op == "get_attr" and node.target not in written
        repeats = node.op in ("call_function", "call_method") and not in_place(node) and not is_random
        if is_state or (repeats and inputs and found.issuperset(inputs)):
            found.add(node)
    return found


def _written_state(node: fx.Node) -> str | None:
    """Return the name of the state that an in-place node may write into, seen through views of it."""
    target: Any = next(iter(node.all_input_nodes), None)
    while isinstance(target, fx.Node) and target.op != "get_attr":
        target = next(iter(target.all_input_nodes), None) if may_be_view(target) else None
    return None if target is None else str(target.target)


def may_be_view(node: fx.Node) -> bool:
    """Tell whether a node may share memory with its first input; of an op without a row here nothing is known."""
    called = type(module_of(node)) if node.op == "call_module" else node.target
    if node.op == "placeholder" or str(getattr(called, "__module__", "")).startswith("octav_fx."):
        return False
    op = op_of(node)
    return op is None or op.name not in OPS or Trait.VIEW in op.traits


def value_of(module: nn.Module, node: fx.Node) -> Any:
    """Return the present value of one of the constants of a module's graph."""
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
    """Return the node and everything it is computed from, nearest first, sizes and flags among it."""
    found = {node: None}
    pending = [node]
    for reached in pending:
        new = [source for source in reached.all_input_nodes if source not in found]
        found.update(dict.fromkeys(new))
        pending += new
    return pending


def state_only(flow: "nx.DiGraph[fx.Node]") -> set[fx.Node]:
    """Return the nodes computed from parameters, buffers and constants alone."""
    inputs = [node for node in flow if node.op == "placeholder" and info(node).state is None]
    return set(flow) - set(inputs) - downstream(flow, inputs)
