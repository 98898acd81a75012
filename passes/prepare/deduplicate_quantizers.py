"""Quantize a value once, however many operands read it.

    linear(quantizers.q_input(x), wq), linear(quantizers.k_input(x), wk)  ->  both read quantizers.q_input(x)

Two quantizers are one if they read the same value with the same Settings: the same node of the graph, so q, k and v
projections, residual forks, both sides of matmul(x, x), and the weight of a module that is called twice. Not if
something writes into that value between the two, nor if one of them is in another region of autocast: data is rounded
in the dtype of its region.
"""

from typing import Any

from torch import fx

from octav_fx.compat.graphs import ENTER_AUTOCAST, EXIT_AUTOCAST
from octav_fx.ir.aliasing import aliasing
from octav_fx.ir.arguments import module_input
from octav_fx.ir.edits import Edit
from octav_fx.ir.ops import module_of
from octav_fx.nn import FakeQuantizer, Settings


def deduplicate_quantizers(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits: list[Edit] = []
    memory = aliasing(gm.graph)
    first: dict[tuple[fx.Node, Settings, Any], fx.Node] = {}
    regions: list[Any] = []
    for node in list(gm.graph.nodes):
        if node.target is ENTER_AUTOCAST:
            regions.append(node.args)
        elif node.target is EXIT_AUTOCAST:
            regions.pop()
        if node.op != "call_module" or not isinstance(quantizer := module_of(node), FakeQuantizer):
            continue
        value = module_input(node)
        key = (value, quantizer.settings, tuple(regions))
        kept = first.setdefault(key, node)
        if kept is node:
            continue
        if memory.written(value, after=kept, before=node):
            edits.append(
                Edit.info(str(node.target), f"not shared with {kept.target}: {value.name} is written in place between")
            )
            first[key] = node
            continue
        node.replace_all_uses_with(kept)
        gm.graph.erase_node(node)
        edits.append(Edit(str(node.target), "share", str(kept.target)))
    return edits
