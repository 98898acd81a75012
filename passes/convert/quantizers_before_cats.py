"""Quantize what is concatenated, where a quantizer takes the whole.

    quantizer(cat([x, y], 1))                  ->  quantizer(cat([quantizer_0(x), quantizer_1(y)], 1))
    quantizer(max_pool2d(cat([x, y], 1), 3))   ->  quantizer(max_pool2d(cat([quantizer_0(x), quantizer_1(y)], 1), 3))

    quantizer_0, quantizer_1: copies of quantizer

Rounding a level gives the level, and rounding and saturating are monotone: the levels are the same. A layer is then
read by a quantizer, whose codes integer runtimes write at once, and codes are what is concatenated. Only where a kernel
that reads codes computes one of the parts for this quantizer alone.
"""

from typing import Any, Final

import torch
from torch import fx

from octav_fx.ir.arguments import argument, called_module, module_input
from octav_fx.ir.clamps import clamp_bounds
from octav_fx.ir.dataflow import readers
from octav_fx.ir.edits import Edit
from octav_fx.ir.movement import selects
from octav_fx.ir.ops import module_of
from octav_fx.ir.pools import pads_with_zeros
from octav_fx.nn import IntegerWeight, StaticQuantizer
from octav_fx.passes.convert.quantizers_behind_moves import call_copy
from octav_fx.passes.convert.saturate_codes import holds_zero

CATS: Final = (torch.cat, torch.concat)


def quantizers_before_cats(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits = list[Edit]()
    if any(module.dtype is not torch.float32 for module in gm.modules() if isinstance(module, IntegerWeight)):
        # A level in fewer bits is rounded, and may be nearer to another one.
        return edits
    waiting = list(gm.graph.find_nodes(op="call_module"))
    while waiting:
        node = waiting.pop(0)
        quantizer = module_of(node)
        if not isinstance(quantizer, StaticQuantizer) or quantizer.dim is not None:
            continue
        if len(gm.graph.find_nodes(op="call_module", target=node.target)) > 1:
            continue
        cat = cat_before(module_input(node))
        if cat is None or not _gains(parts := parts_of(cat)):
            continue
        # Zeros that are put around the whole would not be saturated.
        if _has_zeros(cat, node) and not holds_zero((quantizer.floor, quantizer.ceiling)):
            continue
        with gm.graph.inserting_before(cat):
            levels = [call_copy(gm, node, part) for part in parts]
        cat.args, cat.kwargs = (levels, argument(cat, "dim")), {}
        # A part may be a concatenation itself.
        waiting += levels
        # What is between the two has no other levels to saturate.
        quantizer.floor = quantizer.ceiling = None
        edits.append(Edit(str(node.target), "quantize", f"{len(parts)} parts of {cat.name}"))
    return edits


def cat_before(node: Any) -> fx.Node | None:
    """Return the concatenation that alone reaches a node, seen through what selects, the node itself included."""
    while isinstance(node, fx.Node) and len(readers(node)) == 1:
        if node.op == "call_function" and node.target in CATS:
            return node
        if not selects(node):
            return None
        node = argument(node, "input")
    return None


def parts_of(cat: fx.Node) -> list[fx.Node]:
    """Return what a concatenation puts together; nothing where the graph holds no list of it."""
    parts = argument(cat, "tensors")
    return list(parts) if isinstance(parts, (list, tuple)) else []


def _gains(parts: list[fx.Node]) -> bool:
    """Tell whether a kernel on codes writes a part that is not quantized yet."""
    return any(not isinstance(called_module(part), StaticQuantizer) and _is_of_codes(part) for part in parts)


def _is_of_codes(node: Any) -> bool:
    """Tell whether levels are what a value is computed of, and nothing else reads it up to there."""
    while isinstance(node, fx.Node) and len(readers(node)) == 1:
        if any(isinstance(called_module(source), StaticQuantizer) for source in node.all_input_nodes):
            return True
        if node.op == "call_function" and node.target in CATS:
            return any(_is_of_codes(part) for part in parts_of(node))
        if clamp_bounds(node) is None and not selects(node):
            return False
        node = argument(node, "input")
    return False


def _has_zeros(cat: fx.Node, node: fx.Node) -> bool:
    """Tell whether zeros are put around a concatenation before a quantizer takes it."""
    between: Any = module_input(node)
    while between is not cat:
        if pads_with_zeros(between):
            return True
        between = argument(between, "input")
    return False
