"""Concatenate codes, where a quantizer takes what others of its grid have quantized.

    integer_codes(cat([quantizer1(x), quantizer2(y)], 1), s, bits, signed)
        ->  code_cat([integer_codes(x, s, bits, signed), integer_codes(y, s, bits, signed)], s, 1)

seen through what moves or selects elements. quantizers_before_cats makes such quantizers. The codes are the same.
"""

from typing import Any

import torch
from torch import fx

from octav_fx.ir.arguments import argument, bound_arguments
from octav_fx.ir.dataflow import written_before
from octav_fx.ir.edits import Edit, erase_unused
from octav_fx.ir.ops import module_of
from octav_fx.nn import StaticQuantizer
from octav_fx.nn.integer import code_cat, integer_codes
from octav_fx.passes.convert.codes_between_layers import move_codes, moves
from octav_fx.passes.convert.on_codes import grid_of, on_codes
from octav_fx.passes.convert.quantizers_before_cats import cat_before, parts_of


def codes_of_cats(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits = []
    for node in list(gm.graph.find_nodes(op="call_function", target=integer_codes)):
        read = bound_arguments(node)
        cat = cat_before(read["x"])
        if cat is None or not _are_alike(gm, parts_of(cat), read) or written_before(cat, node):
            continue
        between = _between(cat, node)
        if not all(moves(moved) for moved in between):
            continue
        codes = [on_codes(part).codes for part in _each(cat)]
        levels = list(dict.fromkeys(parts_of(cat)))
        with gm.graph.inserting_before(cat):
            step = gm.graph.get_attr(str(read["scale"].target))
            new = gm.graph.call_function(code_cat, (codes, step, argument(cat, "dim")))
        cat.replace_all_uses_with(new)
        erase_unused(cat, *levels)
        move_codes(between, read["bits"], read["signed"])
        node.replace_all_uses_with(node.all_input_nodes[0])
        gm.graph.erase_node(node)
        edits.append(Edit(cat.name, "concatenate", "codes"))
    return edits


def _each(cat: fx.Node) -> Any:
    """Yield the parts one by one, asked for anew: the same quantizer may come twice, and is rewritten at the first."""
    for i in range(len(parts_of(cat))):
        yield parts_of(cat)[i]


def _between(cat: fx.Node, node: fx.Node) -> list[fx.Node]:
    """Return what stands between a concatenation and the codes of it."""
    found, last = list[fx.Node](), bound_arguments(node)["x"]
    while last is not cat:
        found.insert(0, last)
        last = argument(last, "input")
    return found


def _are_alike(gm: fx.GraphModule, parts: list[fx.Node], read: dict[str, Any]) -> bool:
    """Tell whether quantizers of one grid and one scale return all parts."""
    if not parts or any(grid_of(part) != (read["bits"], read["signed"]) for part in parts):
        return False
    scale = gm.get_buffer(str(read["scale"].target))
    return all(torch.equal(_scale(gm, part), scale) for part in parts)


def _scale(gm: fx.GraphModule, part: fx.Node) -> torch.Tensor:
    """Return the scale of levels, or of the quantizer that returns them."""
    module = module_of(part) if part.op == "call_module" else None
    if isinstance(module, StaticQuantizer):
        return module.scale
    return gm.get_buffer(str(bound_arguments(part)["scale"].target))
