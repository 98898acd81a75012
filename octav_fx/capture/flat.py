"""Graphs as rows of plain values, which copy and pickle: fx nodes link to their neighbours, too deep for both."""

from typing import Any

from torch import fx

from octav_fx.ir.meta import info, update


class _Ref(str):
    """The name of a node, in place of the node."""

    __slots__ = ()


def flatten(graph: fx.Graph) -> list[Any]:
    """Return a row for each node of a graph."""

    def refer(argument: Any) -> Any:
        return fx.node.map_arg(argument, lambda node: _Ref(node.name))

    return [
        (node.op, node.target, refer(node.args), refer(node.kwargs), node.name, info(node).site) for node in graph.nodes
    ]


def unflatten(rows: list[Any]) -> fx.Graph:
    """Return the graph of rows that flatten made."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}

    def resolve(argument: Any) -> Any:
        return fx.node.map_aggregate(argument, lambda leaf: nodes[leaf] if isinstance(leaf, _Ref) else leaf)

    for op, target, args, kwargs, name, site in rows:
        nodes[name] = graph.create_node(op, target, resolve(args), resolve(kwargs), name)
        if site is not None:
            update(nodes[name], site=site)
    return graph
