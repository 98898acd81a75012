"""Add and average codes, where a quantizer alone reads the result.

    quantizer3(quantizer1(x) + quantizer2(y))
        ->  levels(code_sum(codes1, codes2, s1, s2, s3, bits1, signed1, bits2, signed2, bits3, signed3), s3, ...)
    quantizer2(flatten(adaptive_avg_pool2d(quantizer1(x), 1)))
        ->  levels(flatten(code_mean(codes1, s1, s2, bits1, signed1, bits2, signed2, True, axes=...)), s2, ...)

    codes1 = integer_codes(x, s1, bits1, signed1)        uint8, as the layers read them: on_codes.py

Bits are those that nn/integer_rule.py defines, for the nodes that multiply_codes takes.
"""

from typing import Any

import torch
from torch import fx

from octav_fx.ir.arguments import argument
from octav_fx.ir.dataflow import readers
from octav_fx.ir.edits import Edit, erase_unused
from octav_fx.ir.pools import axes_of_mean, keeps_axes, pads_with_zeros
from octav_fx.nn import IntegerWeight, StaticQuantizer
from octav_fx.nn.integer import code_mean, code_sum
from octav_fx.passes.convert.codes_between_layers import move_codes, moves
from octav_fx.passes.convert.multiply_codes import is_plain_sum, result_of
from octav_fx.passes.convert.on_codes import OnCodes, grid_of, on_codes, put_levels
from octav_fx.passes.convert.saturate_codes import holds_zero


def combine_codes(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits: list[Edit] = []
    if not _is_float32_on_cpu(gm):
        return edits
    for node in list(gm.graph.nodes):
        operands = _operands(node)
        if not operands or any(grid_of(operand) is None for operand in operands):
            continue
        found = result_of(node)
        if found is None or (between := _between(node, *found)) is None:
            continue
        _combine(node, len(operands), between, *found)
        edits.append(Edit(str(found[0].target), "combine", "codes"))
    return edits


def _is_float32_on_cpu(gm: fx.GraphModule) -> bool:
    """Tell whether levels of codes are what the model computes with: it has weights, and all are in float32."""
    weights = [module for module in gm.modules() if isinstance(module, IntegerWeight)]
    places = {(weight.dtype, weight.codes.device.type) for weight in weights}
    return places == {(torch.float32, "cpu")}


def _operands(node: fx.Node) -> tuple[Any, ...]:
    """Return the two operands of a sum, the one of a mean, none of another node."""
    if is_plain_sum(node):
        return node.args
    return () if axes_of_mean(node) is None else (argument(node, "input"),)


def _between(node: fx.Node, reader: fx.Node, result: StaticQuantizer) -> list[fx.Node] | None:
    """Return the nodes from one to the quantizer that reads it, if all do to codes what they do to levels."""
    found: list[fx.Node] = []
    (user,) = readers(node)
    while user is not reader:
        if not moves(user) or (pads_with_zeros(user) and not holds_zero((result.floor, result.ceiling))):
            return None
        found.append(user)
        (user,) = readers(user)
    return found


def _combine(node: fx.Node, count: int, between: list[fx.Node], reader: fx.Node, result: StaticQuantizer) -> None:
    graph, sources = node.graph, list[OnCodes]()
    while len(sources) < count:
        # Asked for anew: both may be one quantizer, which is rewritten.
        sources.append(on_codes(_operands(node)[len(sources)]))
    grids = [part for x in sources for part in (x.bits, x.signed)] + [result.bits, result.signed]
    with graph.inserting_before(node):
        step = graph.get_attr(f"{reader.target}.scale")
        tensors = [*(x.codes for x in sources), *(x.scale for x in sources), step]
        clamp = () if result.floor is result.ceiling is None else (result.floor, result.ceiling)
        if count == 2:
            new = graph.call_function(code_sum, (*tensors, *grids, *clamp))
        else:
            axes: dict[str, Any] = {"axes": axes_of_mean(node)}
            new = graph.call_function(code_mean, (*tensors, *grids, keeps_axes(node), *clamp), axes)
    levels = [argument for argument in node.all_input_nodes if grid_of(argument) is not None]
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    erase_unused(*levels)
    move_codes(between, result.bits, result.signed)
    put_levels(reader, OnCodes(reader.all_input_nodes[0], step, result.bits, result.signed))
