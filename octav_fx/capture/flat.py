"""Graphs as rows of plain values, which copy and pickle: fx nodes link to their neighbours, too deep for both."""

import operator
from types import FunctionType
from typing import Any

import torch
from torch import fx

from octav_fx.compat.tensors import OpOverload, OpOverloadPacket
from octav_fx.ir.meta import info, update


class _Ref(str):
    """The name of a node, in place of the node."""

    __slots__ = ()


class _OfTorch(str):
    """Where an object is found in torch that does not pickle, in its place."""

    __slots__ = ()

    def found(self) -> Any:
        """Return the object."""
        return operator.attrgetter(self)(torch)


def flatten(graph: fx.Graph) -> list[Any]:
    """Return a row for each node of a graph."""

    def refer(argument: Any) -> Any:
        return fx.node.map_aggregate(argument, _plain)

    return [
        (node.op, _plain(node.target), refer(node.args), refer(node.kwargs), node.name, info(node).site)
        for node in graph.nodes
    ]


def _plain(leaf: Any) -> Any:
    """Return what stands for a value in a row."""
    match leaf:
        case fx.Node():
            return _Ref(leaf.name)
        case OpOverload() | OpOverloadPacket():
            return _OfTorch(f"ops.{leaf}")
        # Not by the protocol of torch.save.
        case torch.memory_format():
            return _OfTorch(str(leaf).removeprefix("torch."))
        # F.max_pool2d, torch.unique and their kin: made in a function, of which pickle would ask for them.
        case FunctionType() if "<locals>" in leaf.__qualname__ and leaf.__module__.startswith("torch."):
            return _OfTorch(f"{leaf.__module__}.{leaf.__name__}".removeprefix("torch."))
    return leaf


def unflatten(rows: list[Any]) -> fx.Graph:
    """Return the graph of rows that flatten made."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}

    def resolve(argument: Any) -> Any:
        return fx.node.map_aggregate(argument, value_of)

    def value_of(leaf: Any) -> Any:
        return nodes[leaf] if isinstance(leaf, _Ref) else leaf.found() if isinstance(leaf, _OfTorch) else leaf

    for op, target, args, kwargs, name, site in rows:
        nodes[name] = graph.create_node(op, value_of(target), resolve(args), resolve(kwargs), name)
        if site is not None:
            update(nodes[name], site=site)
    return graph
