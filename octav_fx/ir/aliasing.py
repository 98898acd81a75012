"""Who writes into whose memory: fake tensors share storages exactly where the real ones will."""

from dataclasses import dataclass

from torch import Tensor, fx

from octav_fx.compat.tensors import pytree, storage_id
from octav_fx.ir.meta import fake
from octav_fx.ir.ops import in_place


@dataclass(frozen=True, slots=True)
class Aliasing:
    """Positions of the nodes of a graph, and of the writes into each storage."""

    position: dict[fx.Node, int]
    writes: dict[int, list[int]]

    def written(self, node: fx.Node, after: fx.Node, before: fx.Node | None = None) -> bool:
        """Return whether anything writes into the value of node, by any of its views, between two nodes."""
        first = self.position[after]
        last = len(self.position) if before is None else self.position[before]
        return any(first < at < last for storage in _storages(node) for at in self.writes.get(storage, ()))


def aliasing(graph: fx.Graph) -> Aliasing:
    """Read off the aliasing of a captured graph."""
    position: dict[fx.Node, int] = {}
    writes: dict[int, list[int]] = {}
    for at, node in enumerate(graph.nodes):
        position[node] = at
        if in_place(node):
            for storage in {storage for source in node.all_input_nodes[:1] for storage in _storages(source)}:
                writes.setdefault(storage, []).append(at)
    return Aliasing(position, writes)


def _storages(node: fx.Node) -> set[int]:
    leaves = pytree.tree_leaves(fake(node))
    return {storage_id(leaf) for leaf in leaves if isinstance(leaf, Tensor)}
