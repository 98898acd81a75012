"""Move codes in place of their levels, on the way to a quantizer.

    integer_codes(quantizer(x), ...)
        ->  integer_codes(levels(integer_codes(x, s, bits, signed), s, bits, signed), ...)
    integer_codes(max_pool2d(levels(codes, s, bits, signed), 3), ...)
        ->  integer_codes(levels(max_pool(codes, [3, 3], ...), s, bits, signed), ...)
    integer_codes(chunk(levels(codes, s, bits, signed), 2, 1)[0], ...)
        ->  integer_codes(levels(chunk(codes, 2, 1)[0], s, bits, signed), ...)

Codes rise with their levels and belong to one element each: see codes_between_layers. What quantizes them again is then
a function of one code, and what is moved is a byte. Levels that something writes into, or into a view of them, stay
levels: codes would not have what is written.
"""

from typing import Any, Final

from torch import fx

from octav_fx.ir.arguments import bound_arguments, called_module
from octav_fx.ir.dataflow import readers, reads_sizes, written_before
from octav_fx.ir.edits import Edit, erase_unused
from octav_fx.ir.ops import is_op
from octav_fx.nn import StaticQuantizer
from octav_fx.nn.integer import integer_codes, levels
from octav_fx.passes.convert.codes_between_layers import move_codes, moves
from octav_fx.passes.convert.on_codes import OnCodes, grid_of, is_levels, on_codes

_PARTS: Final = "chunk"
_ITEM: Final = "getitem"


def moves_on_codes(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits = []
    for node in list(gm.graph.find_nodes(op="call_function", target=integer_codes)):
        if isinstance(called_module(source := _source(bound_arguments(node)["x"])), StaticQuantizer):
            on_codes(source)
    end = gm.graph.output_node()
    for node in list(gm.graph.nodes):
        if not _moves(node) or not is_levels(source := node.all_input_nodes[0]) or not _leads_to_codes(node):
            continue
        if is_op(node, _PARTS) and not all(is_op(reader, _ITEM) for reader in readers(node)):
            continue
        if written_before(source, end):
            continue
        x = on_codes(source)
        node.replace_input_with(source, x.codes)
        for moved in readers(node) if is_op(node, _PARTS) else [node]:
            _put_levels_behind(moved, x)
        move_codes([node], x.bits, x.signed)
        erase_unused(source)
        edits.append(Edit(node.name, "move", "codes"))
    return edits


def _source(node: Any) -> Any:
    """Return the levels that a node is, or moves; else None."""
    while isinstance(node, fx.Node) and grid_of(node) is None:
        node = node.all_input_nodes[0] if _moves(node) else None
    return node


def _moves(node: fx.Node) -> bool:
    """Tell whether a node does to codes what it does to levels, dividing them and taking a part among it."""
    return bool(node.all_input_nodes) and (moves(node) or is_op(node, _PARTS, _ITEM))


def _leads_to_codes(node: fx.Node) -> bool:
    """Tell whether something quantizes what a node returns, seen through what moves it."""
    found = readers(node)
    is_quantized = any(reader.target is integer_codes for reader in found)
    return is_quantized or any(_leads_to_codes(reader) for reader in found if _moves(reader))


def _put_levels_behind(node: fx.Node, x: OnCodes) -> None:
    """Let readers of a node, which returns codes by now, read levels of them; those of sizes may stay."""
    with node.graph.inserting_after(node):
        new = node.graph.call_function(levels, (node, x.scale, x.bits, x.signed))
    node.replace_all_uses_with(new, delete_user_cb=lambda reader: reader is not new and not reads_sizes(reader))
