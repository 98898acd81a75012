"""A place for each node of a graph: in the direction of the data by its depth, across it in lanes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import fx, nn

from octav_fx.capture.modules import QuantizedModule
from octav_fx.ir.edits import site_of
from octav_fx.ir.ops import op_of
from octav_fx.nn.fake_quantizer import QUANTIZERS


def drawn(parts: Sequence[QuantizedModule], names: Mapping[nn.Module, str]) -> dict[str, Any]:
    """Return the nodes of the graphs, one graph behind the other, and the pairs of nodes that a value joins.

    Quantizers and parameters are left out: they are in the rows.
    """
    nodes: list[dict[str, Any]] = []
    edges: list[tuple[int, int]] = []
    start = 0
    for part in parts:
        places = placed(part.graph)
        number = {node: len(nodes) + i for i, node in enumerate(places)}
        nodes += [
            {"node": _site(node), "op": _kind(node), "graph": names[part.owner], "x": start + depth, "y": lane}
            for node, (depth, lane) in places.items()
        ]
        edges += [(number[source], number[node]) for node in places for source in sources_of(node) if source in number]
        start += max((depth for depth, _ in places.values()), default=0) + 2
    return {"nodes": nodes, "edges": edges}


def placed(graph: fx.Graph) -> dict[fx.Node, tuple[int, int]]:
    """Return depth and lane of each node that data flow through.

    The depth is the longest way from an input. A node keeps the lane of its first source where it is free.
    """
    found: dict[fx.Node, tuple[int, int]] = {}
    taken: set[tuple[int, int]] = set()
    for node in graph.nodes:
        sources = [source for source in sources_of(node) if source in found]
        if _is_quantizer(node) or node.op == "get_attr" or (not sources and node.op != "placeholder"):
            continue
        depth = max((found[source][0] + 1 for source in sources), default=0)
        wanted = found[sources[0]][1] if sources else 0
        lane = next(wanted + step for step in _outwards() if (depth, wanted + step) not in taken)
        taken.add((depth, lane))
        found[node] = (depth, lane)
    return found


def sources_of(node: fx.Node) -> list[fx.Node]:
    """Return what a node reads, seen through quantizers, each once."""
    found: dict[fx.Node, None] = {}
    for source in node.all_input_nodes:
        while _is_quantizer(source):
            source = source.all_input_nodes[0]
        found[source] = None
    return list(found)


def _outwards() -> Iterator[int]:
    """Yield 0, 1, -1, 2, -2, and so on."""
    yield 0
    step = 1
    while True:
        yield step
        yield -step
        step += 1


def _is_quantizer(node: fx.Node) -> bool:
    return node.op == "call_module" and str(node.target).startswith(f"{QUANTIZERS}.")


def _site(node: fx.Node) -> str:
    return node.name if node.op in ("placeholder", "output") else site_of(node)


def _kind(node: fx.Node) -> str:
    op = op_of(node)
    if op is not None:
        return op.name
    return node.op if node.op in ("placeholder", "output") else str(getattr(node.target, "__name__", node.target))
