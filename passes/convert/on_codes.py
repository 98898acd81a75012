"""The codes of a quantizer, for the passes that compute with them.

    quantizer(x)  ->  codes = integer_codes(x, s, bits, signed); levels(codes, s, bits, signed)

Whatever reads floats reads the levels. A clamp that saturate_codes took away comes back, for a layer to do.
"""

from typing import Any, NamedTuple

import torch
from torch import fx

from octav_fx.formats.grid import Grid
from octav_fx.ir.arguments import bound_arguments, called_module, module_input
from octav_fx.nn import StaticQuantizer
from octav_fx.nn.integer import integer_codes, levels


class OnCodes(NamedTuple):
    """The nodes of codes and of their scale, and their grid."""

    codes: fx.Node
    scale: fx.Node
    bits: int
    signed: bool


def grid_of(node: Any) -> tuple[int, bool] | None:
    """Return bits and sign of levels with one scale, which a quantizer or codes give; None of any other node."""
    quantizer = called_module(node)
    if isinstance(quantizer, StaticQuantizer) and quantizer.dim is None:
        return quantizer.bits, quantizer.signed
    if not is_levels(node):
        return None
    read = bound_arguments(node)
    return read["bits"], read["signed"]


def is_levels(node: Any) -> bool:
    """Tell whether a node is the levels of codes."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is levels


def on_codes(source: fx.Node) -> OnCodes:
    """Return the codes of a node that grid_of knows: of a quantizer, which is rewritten, or those of levels."""
    if not is_levels(source):
        source = _rewrite(source)
    return OnCodes(*source.args)  # type: ignore[arg-type]


def _rewrite(source: fx.Node) -> fx.Node:
    """Insert the codes of a quantizer's input, and let their levels take the place of its call."""
    quantizer, x, graph = called_module(source), module_input(source), source.graph
    assert isinstance(quantizer, StaticQuantizer)
    grid = Grid(quantizer.bits, quantizer.signed)
    with graph.inserting_before(source):
        if quantizer.range != (grid.low, grid.high):
            x = graph.call_function(torch.clamp, (x, quantizer.floor, quantizer.ceiling))
        scale = graph.get_attr(f"{source.target}.scale")
        codes = graph.call_function(integer_codes, (x, scale, quantizer.bits, quantizer.signed))
    return put_levels(source, OnCodes(codes, scale, quantizer.bits, quantizer.signed))


def put_levels(node: fx.Node, x: OnCodes) -> fx.Node:
    """Let the levels of codes take the place of a node. Returns them."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(levels, tuple(x))
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    return new
