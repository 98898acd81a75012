"""Let a quantizer's own saturation do the work of a clamp before it.

    quantizer(relu6(x))                       ->  quantizer(x)                    floor 0, ceiling 6
    quantizer(max_pool2d(relu(x), 3))         ->  quantizer(max_pool2d(x, 3))     floor 0
    quantizer(pad(relu(x), (0, 1, 0, 1)))     ->  quantizer(pad(x, (0, 1, 0, 1)))

and so of whatever else selects elements: ir/movement.py.

    round(min(x, 6) / scale) = min(round(x / scale), round(6 / scale)), as rounding is monotone

Integer runtimes then have nothing between a product and its codes. Only where the clamp has no other reader.
"""

from typing import Any

from torch import fx

from octav_fx.ir.arguments import argument, module_input
from octav_fx.ir.clamps import clamp_bounds
from octav_fx.ir.dataflow import readers, writes_for_others
from octav_fx.ir.edits import Edit
from octav_fx.ir.movement import selects
from octav_fx.ir.ops import module_of
from octav_fx.ir.pools import pads_with_zeros
from octav_fx.nn import StaticQuantizer


def saturate_codes(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits = []
    for node in list(gm.graph.find_nodes(op="call_module")):
        quantizer = module_of(node)
        if not isinstance(quantizer, StaticQuantizer) or quantizer.dim is not None:
            continue
        if len(gm.graph.find_nodes(op="call_module", target=node.target)) > 1:
            continue
        while (found := _clamp_before(node)) is not None:
            clamp, ends = found
            if not quantizer.narrow(*ends):
                break
            source = argument(clamp, "input")
            clamp.replace_all_uses_with(source)
            gm.graph.erase_node(clamp)
            edits.append(Edit(str(node.target), "saturate", "{} to {}".format(*ends)))
    return edits


def _clamp_before(quantizer: fx.Node) -> tuple[fx.Node, tuple[float | None, float | None]] | None:
    """Return the clamp whose result reaches the quantizer and nothing else, seen through what selects; its bounds."""
    node: Any = module_input(quantizer)
    has_zeros = False
    while isinstance(node, fx.Node) and len(readers(node)) == 1:
        if (bounds := clamp_bounds(node)) is not None:
            # Zeros that are put around it must not be clamped to something else.
            is_kept = writes_for_others(node) or (has_zeros and not holds_zero(bounds))
            return None if is_kept else (node, bounds)
        if not selects(node):
            return None
        has_zeros |= pads_with_zeros(node)
        node = argument(node, "input")
    return None


def holds_zero(bounds: tuple[float | None, float | None]) -> bool:
    """Tell whether zeros around a tensor may be clamped with it."""
    low, high = bounds
    return (low is None or low <= 0) and (high is None or high >= 0)
