"""Marks: places in a graph that a trace can go back to, where what came since is to be another call."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import fx

from octav_fx.ir.meta import info

if TYPE_CHECKING:
    from octav_fx.capture.symbolic.tracer import ValueTracer


@dataclass(frozen=True, slots=True)
class Mark:
    """The last node so far, and how many branches and errors there were."""

    last: fx.Node
    branches: int
    failed: int

    @classmethod
    def of(cls, tracer: "ValueTracer") -> "Mark":
        """Return the present place."""
        return cls(next(iter(reversed(tracer.graph.nodes))), len(tracer.branched_on), len(tracer.failed))

    def is_random(self, tracer: "ValueTracer") -> bool:
        """Tell whether what was traced since then is a switch of training (stochastic depth) and multiplies nothing."""
        return len(tracer.branched_on) > self.branches and not any(info(node).macs for node in self._since())

    def go_back(self, tracer: "ValueTracer") -> None:
        """Take back what was traced since then."""
        nodes = self._since()
        for node in reversed(nodes):
            tracer.graph.erase_node(node)
        gone = set(nodes)
        tracer.attribute_nodes = {place: n for place, n in tracer.attribute_nodes.items() if n not in gone}
        tracer.latest = {node: new for node, new in tracer.latest.items() if new not in gone}
        tracer.checked = {(node, expected) for node, expected in tracer.checked if node not in gone}
        del tracer.failed[self.failed :]
        del tracer.branched_on[self.branches :]

    def _since(self) -> list[fx.Node]:
        nodes = []
        node = self.last.next
        while node.op != "root":
            nodes.append(node)
            node = node.next
        return nodes
