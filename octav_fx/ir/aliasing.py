"""Who writes into whose memory: fake tensors share storages exactly where the real ones will."""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from octav_fx.compat.tensors import pytree, storage_id
from octav_fx.ir.meta import fake
from octav_fx.ir.ops import in_place, module_of
from octav_fx.nn import FakeQuantizer


@dataclass(frozen=True, slots=True)
class Aliasing:
    """Positions of the nodes of a graph, and of the writes into each storage, and the nodes that have it."""

    position: dict[fx.Node, int]
    writes: dict[int, list[int]]
    holders: dict[int, list[fx.Node]]

    def written(self, node: fx.Node, after: fx.Node, before: fx.Node | None = None) -> bool:
        """Return whether anything writes into the value of node, by any of its views, between two nodes."""
        first = self.position[after]
        last = len(self.position) if before is None else self.position[before]
        return any(first < at < last for storage in _storages(node) for at in self.writes.get(storage, ()))

    def is_written_by(self, node: fx.Node, writer: fx.Node) -> bool:
        """Return whether a node writes into the value of another one, by any of its views."""
        return any(self.position[writer] in self.writes.get(storage, ()) for storage in _storages(node))

    def is_read_after(self, node: fx.Node, writer: fx.Node) -> bool:
        """Return whether anything reads what a write leaves in the value of node, by any of its views.

        Past the result of the write, that is; whose memory an argument or an attribute is, its owner reads it.
        """
        holders = {holder for storage in _storages(node) for holder in self.holders.get(storage, ())} - {writer}
        last = self.position[writer]
        return any(
            holder.op in ("placeholder", "get_attr")
            or (self.position[holder] < last and any(reader > writer for reader in holder.users))
            for holder in holders
        )


def aliasing(graph: fx.Graph) -> Aliasing:
    """Read off the aliasing of a captured graph."""
    position: dict[fx.Node, int] = {}
    writes: dict[int, list[int]] = {}
    holders: dict[int, list[fx.Node]] = {}
    for at, node in enumerate(graph.nodes):
        position[node] = at
        # What a quantizer returns is new, though the fake tensor is that of its input.
        if node.op != "call_module" or not isinstance(module_of(node), FakeQuantizer):
            for storage in _storages(node):
                holders.setdefault(storage, []).append(node)
        if in_place(node):
            for storage in {storage for source in node.all_input_nodes[:1] for storage in _storages(source)}:
                writes.setdefault(storage, []).append(at)
    return Aliasing(position, writes, holders)


def _storages(node: fx.Node) -> set[int]:
    leaves = pytree.tree_leaves(fake(node))
    # A sparse tensor has several.
    return {storage_id(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.layout is torch.strided}
