"""Find the clips of tokens and groups and round to them in one pass over the data, while a row is on chip.

    clip  = optimal_clip(x, hint)               y, clip = quantize_rows(x)
    y     = fake_quantize(x, clip)         ->

    clip  = optimal_clip(x, hint)               codes, clip = quantize_rows(x)
    codes = quantize(x, clip)              ->

on each half of the graph, where what is kept between them is decided: backward, which has the clip, rounds alone. The
left side is what quantize_rows is defined as, and a clip of a row needs no hint.
"""

import operator

import torch
from torch import fx

from octav_fx.formats.spec import spec_of
from octav_fx.ir.calls import arguments_of
from octav_fx.ir.edits import Edit, insert_aten
from octav_fx.ir.joint import replace
from octav_fx.ir.meta import fake
from octav_fx.ops.cpu import TYPES
from octav_fx.ops.quantize_rows.op import is_one_pass

octav = torch.ops.octav


def rows_in_one_pass(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring. Solves that no kernel does in one pass stay."""
    edits = []
    for solve in gm.graph.find_nodes(op="call_function", target=octav.optimal_clip.default):
        call = arguments_of(solve)
        rounding = next((user for user in solve.users if _rounds(user, solve)), None)
        if rounding is None or fake(call.x).dtype not in TYPES or not is_one_pass(spec_of(call.spec), call.method):
            continue
        ceiling = arguments_of(rounding).ceiling if rounding.target is octav.quantize.default else None
        what = (call.x, call.spec, call.method, fake(rounding).dtype, ceiling)
        with gm.graph.inserting_before(solve):
            both = insert_aten(gm.graph, octav.quantize_rows.default, *what)
            rounded, clip = (insert_aten(gm.graph, operator.getitem, both, i) for i in range(2))
        edits.append(Edit(solve.name, "one pass", f"with {rounding.name}"))
        replace(rounding, rounded)
        replace(solve, clip)
    return edits


def _rounds(node: fx.Node, solve: fx.Node) -> bool:
    """Tell whether a node rounds what the clip was found for."""
    if node.target not in (octav.fake_quantize.default, octav.quantize.default):
        return False
    call, found = arguments_of(node), arguments_of(solve)
    return call.clip is solve and call.x is found.x and call.spec == found.spec
