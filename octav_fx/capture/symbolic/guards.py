"""What a trace took for granted: checks in its graph, and the guards that are made of them."""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from octav_fx.capture.guards import DoesNotHold, Facts, Guards, expect, is_expected
from octav_fx.capture.kinds import ANY_FLOAT, MISSING, kind_of, kind_of_attribute, kind_of_number, same_tensors
from octav_fx.capture.symbolic.reads import Reads
from octav_fx.capture.symbolic.regions import Kept
from octav_fx.capture.symbolic.sizes import forward_sizes
from octav_fx.capture.symbolic.stand_ins import put_stand_ins
from octav_fx.capture.symbolic.without_effects import drop_effects, moves_buffers
from octav_fx.compat.tensors import is_mutable, pytree
from octav_fx.ir.dataflow import ancestors
from octav_fx.ir.meta import fake
from octav_fx.ir.ops import in_place


@fx.node.has_side_effect
def guard_equal(value: Any, expected: Any, where: str) -> None:
    """Raise DoesNotHold when a value that decided a branch at capture is another one now."""
    if not is_expected(value, expected):
        raise DoesNotHold(f"{where}: this graph holds for the value {expected!r} there, these inputs give {value!r}")


def take_guards(
    graph: fx.Graph,
    root: nn.Module,
    kinds: Mapping[str, Any],
    same: tuple[int, ...] = (),
    attributes: Sequence[tuple[str, Any]] = (),
    modes: Reads | None = None,
) -> Guards:
    """Make guards of the checks in a trace, which keeps only those of sizes that it computes on its way.

    kinds: what kind_of found in each argument of forward. same: what same_tensors found in all of them. attributes:
    paths of plain attributes that forward read, and what kind_of found there. modes: those that forward asked for.
    """
    for check in graph.find_nodes(op="call_function", target=guard_equal):
        if _is_number_of_axes(check.args[0]):
            graph.erase_node(check)
    checks = list(graph.find_nodes(op="call_function", target=guard_equal))
    sizes: Facts | None = None
    deep: Facts | None = None
    dtypes: Facts | None = None
    if checks:
        near = _copied(graph, root)
        drop_effects(near)
        forward_sizes(near)
        _remove_unused(near)
        asked = near.find_nodes(op="call_function", target=guard_equal)
        tensors, writes = _downstream(near, _computes_tensors), _downstream(near, _writes)
        is_deep = [check in tensors for check in asked]
        # What writes into an argument must run once, in the graph, where the check stays.
        is_known_before = [flag and check not in writes for check, flag in zip(asked, is_deep, strict=True)]
        is_of_dtypes = [check in writes and _asks_dtypes(check) and _writes_arguments(check) for check in asked]
        put_stand_ins(near)
        if any(is_of_dtypes):
            dtypes = _expecting(_copied(near, root), is_of_dtypes)
        if any(is_known_before):
            deep = _expecting(near if all(is_deep) else _copied(near, root), is_known_before)
        sizes = None if all(is_deep) else _checked(near, is_deep)
        for check, kept in zip(checks, is_deep, strict=True):
            if not kept:
                graph.erase_node(check)
    return Guards(_arguments(graph, kinds, same), _attributes(graph, attributes, modes), sizes, deep, dtypes)


def _is_number_of_axes(value: Any) -> bool:
    """Tell whether a value is the length of a tuple of sizes: the kinds of the arguments decide that."""
    if not isinstance(value, fx.Node) or value.target is not len:
        return False
    counted = value.args[0]
    return isinstance(counted, fx.Node) and isinstance(fake(counted), torch.Size)


def _downstream(graph: fx.Graph, test: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """Return the nodes for which a test holds, and what is computed from them."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if not found.isdisjoint(node.all_input_nodes) or test(node):
            found.add(node)
    return found


def _remove_unused(graph: fx.Graph) -> None:
    """Drop what no check and no result is computed from."""
    for node in reversed(graph.nodes):
        if not node.users and node.op not in ("placeholder", "output") and node.target not in (guard_equal, expect):
            graph.erase_node(node)


def _copied(graph: fx.Graph, root: nn.Module) -> fx.Graph:
    copied, nodes = fx.Graph(), dict[fx.Node, fx.Node]()
    copied.graph_copy(graph, nodes)
    copied.owning_module = root  # type: ignore[assignment]
    return copied


def _computes_tensors(node: fx.Node) -> bool:
    is_given = node.op in ("placeholder", "get_attr")
    return not is_given and any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(fake(node)))


def _writes(node: fx.Node) -> bool:
    """Tell whether a node may write: into a tensor, an object (a cache), or buffers."""
    if node.op == "call_module":
        return moves_buffers(node)
    is_call = node.op in ("call_function", "call_method")
    is_write = in_place(node) or is_mutable(node.target)
    return is_call and (is_write or (node.target not in _READS and _has_object(node)))


def _asks_dtypes(check: fx.Node) -> bool:
    """Tell whether a check asks for nothing of tensors but their dtypes."""
    pending = list(check.all_input_nodes)
    for node in pending:
        if node.target is getattr and node.args[1] == "dtype":
            continue
        if isinstance(fake(node), Tensor) or not node.all_input_nodes:
            return False
        pending += node.all_input_nodes
    return True


def _writes_arguments(check: fx.Node) -> bool:
    """Tell whether all that is written before a check is in arguments, of which there are copies."""
    for node in filter(_writes, ancestors(check)):
        into = [source for source in node.all_input_nodes if _is_object(source)]
        if in_place(node) and node.op != "call_module" and isinstance(target := node.args[0], fx.Node):
            into.append(target)
        held = (source for written in into for source in ancestors(written))
        if not into or any(source.op == "get_attr" for source in held):
            return False
    return True


_READS: Final = (getattr, operator.getitem, len)
_PLAIN: Final = (Tensor, int, float, str, slice, type(None), torch.Size, torch.dtype, torch.device)
_VALUES: Final = (*_PLAIN, nn.Module, Kept)


def _has_object(node: fx.Node) -> bool:
    return any(map(_is_object, node.all_input_nodes))


def _is_object(node: fx.Node) -> bool:
    return any(not isinstance(leaf, _VALUES) for leaf in pytree.tree_leaves(fake(node)))


def _arguments(graph: fx.Graph, kinds: Mapping[str, Any], same: tuple[int, ...]) -> Facts:
    asked = _with_inputs(graph)
    inputs, rows = list(asked.find_nodes(op="placeholder")), list[tuple[Any, Any, str]]()
    for node in inputs:
        name = str(node.target).lstrip("*")
        rows.append((asked.call_function(kind_of, (node,)), kinds[name], f"argument {name}"))
    if len(same) > 1:
        rows.append((asked.call_function(same_tensors, tuple(inputs)), same, "which arguments are the same tensor"))
    return _facts(asked, rows)


def _attributes(graph: fx.Graph, attributes: Sequence[tuple[str, Any]], modes: Reads | None) -> Facts | None:
    asked = _with_inputs(graph)
    rows = []
    for path, kind in attributes:
        if isinstance(kind, tuple) and kind[:1] == (ANY_FLOAT,):
            rows.append((asked.call_function(kind_of_number, (asked.get_attr(path),)), kind[1], path))
            continue
        owner, _, name = path.rpartition(".")
        # What forward looked for in vain is nothing that code could name.
        is_missing = kind == kind_of(MISSING)
        args = (asked.get_attr(owner), name) if is_missing else (asked.get_attr(path),)
        rows.append((asked.call_function(kind_of_attribute if is_missing else kind_of, args), kind, path))
    if modes is not None and modes.gradient_mode is not None:
        rows.append((asked.call_function(torch.is_grad_enabled), modes.gradient_mode, "torch.is_grad_enabled()"))
    for kind, mode in () if modes is None else modes.autocast.items():
        rows.append((asked.call_function(torch.is_autocast_enabled, (kind,)), mode, "torch.is_autocast_enabled()"))
    return _facts(asked, rows) if rows else None


def _with_inputs(graph: fx.Graph) -> fx.Graph:
    copied = fx.Graph()
    for node in graph.find_nodes(op="placeholder"):
        copied.node_copy(node)
    return copied


def _checked(graph: fx.Graph, is_deep: list[bool]) -> Facts:
    """Make a graph return what its checks are about that are not deep."""
    checks = graph.find_nodes(op="call_function", target=guard_equal)
    own = [check for check, flag in zip(checks, is_deep, strict=True) if not flag]
    return _facts(graph, [(check.args[0], check.args[1], str(check.args[2])) for check in own])


def _expecting(graph: fx.Graph, wanted: list[bool]) -> Facts:
    """Make a graph ask for what the wanted ones of its checks are about, each once and where it is computed."""
    _merge_equal(graph)
    asked = set()
    for check, is_wanted in zip(graph.find_nodes(op="call_function", target=guard_equal), wanted, strict=True):
        value, expected, _ = check.args
        if not is_wanted or (value, repr(expected)) in asked:
            graph.erase_node(check)
            continue
        asked.add((value, repr(expected)))
        check.target = expect
    graph.output(())
    _stand_alone(graph)
    return Facts(graph)


def _facts(graph: fx.Graph, rows: list[tuple[Any, Any, str]]) -> Facts:
    """Make a graph return what the rows are about, each once, and drop all else."""
    merged = _merge_equal(graph)
    rows = [(merged.get(value, value), expected, where) for value, expected, where in rows]
    rows = list({(value, repr(expected)): (value, expected, where) for value, expected, where in rows}.values())
    graph.output(tuple(value for value, *_ in rows))
    for check in graph.find_nodes(op="call_function", target=guard_equal):
        graph.erase_node(check)
    _stand_alone(graph)
    return Facts(graph, tuple(expected for _, expected, _ in rows), tuple(where for *_, where in rows))


def _stand_alone(graph: fx.Graph) -> None:
    """Drop what no fact is computed from, and what only the trace needed."""
    _remove_unused(graph)
    for node in graph.nodes:
        node.meta = {}
    graph.owning_module = None


def _merge_equal(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Let equal reads of sizes, and what is computed from them, be one node; return what took whose place."""
    first: dict[Any, fx.Node] = {}
    merged: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        is_plain = not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(fake(node)))
        if node.op not in ("call_function", "call_method") or node.target is guard_equal or not is_plain:
            continue
        kept = first.setdefault((node.op, node.target, repr(node.args), repr(node.kwargs)), node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            merged[node] = kept
    return merged
