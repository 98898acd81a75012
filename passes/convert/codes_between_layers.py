"""Let an integer layer return the codes that the next one reads.

    integer_codes(max_pool2d(integer_conv(...)), s, bits, signed)
        ->  max_pool(integer_conv(..., step=s, bits=bits, signed=signed))
    integer_codes(flatten(integer_conv(...)), s, bits, signed)
        ->  flatten(integer_conv(..., step=s, bits=bits, signed=signed))
    integer_codes(pad(integer_conv(...), (0, 1, 0, 1)), s, bits, signed)
        ->  pad(integer_conv(..., step=s, bits=bits, signed=signed), (0, 1, 0, 1), "constant", code of zero)

where nothing else reads more of the floats than their sizes. Codes rise with their levels and belong to one element
each: what moves elements, takes the largest of them or puts zeros around them does to codes what it does to floats.
"""

from typing import Any

from torch import fx
from torch.nn import functional as F

from octav_fx.formats.grid import Grid
from octav_fx.ir.arguments import argument, bound_arguments
from octav_fx.ir.dataflow import readers
from octav_fx.ir.edits import Edit
from octav_fx.ir.movement import selects
from octav_fx.ir.ops import is_op
from octav_fx.ir.pools import max_window, pads_with_zeros
from octav_fx.nn.integer import integer_codes, max_pool
from octav_fx.passes.convert.clamps_into_layers import is_layer


def codes_between_layers(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits = []
    for node in list(gm.graph.find_nodes(op="call_function", target=integer_codes)):
        read = bound_arguments(node)
        chain = _chain(read["x"])
        if chain is None:
            continue
        layer, *between = chain
        with gm.graph.inserting_before(layer):
            step = gm.graph.get_attr(str(read["scale"].target))
        layer.kwargs = {**layer.kwargs, "step": step, "bits": read["bits"], "signed": read["signed"]}
        node.replace_all_uses_with(chain[-1])
        gm.graph.erase_node(node)
        move_codes(between, read["bits"], read["signed"])
        edits.append(Edit(layer.name, "return", f"{read['bits']}-bit codes"))
    return edits


def moves(node: fx.Node) -> bool:
    """Tell whether a node does to codes what it does to their levels."""
    return max_window(node) is not None or (selects(node) and not is_op(node, "max_pool"))


def move_codes(between: list[fx.Node], bits: int, signed: bool) -> None:
    """Let nodes that moves() knows, each the input of the next, take codes in place of levels."""
    for moved in between:
        source, graph = argument(moved, "input"), moved.graph
        with graph.inserting_before(moved):
            if (window := max_window(moved)) is not None:
                new = graph.call_function(max_pool, (source, *window))
            elif pads_with_zeros(moved):
                zero = -Grid(bits, signed).low
                new = graph.call_function(F.pad, (source, argument(moved, "pad"), "constant", zero))
            else:
                continue
        moved.replace_all_uses_with(new)
        graph.erase_node(moved)


def _chain(node: Any) -> list[fx.Node] | None:
    """Return an integer layer and what moves its result up to a node, if each is read by the next alone; else None."""
    found: list[fx.Node] = []
    while len(readers(node)) == 1:
        found.insert(0, node)
        if is_layer(node):
            return found
        if not moves(node):
            return None
        node = argument(node, "input")
    return None
