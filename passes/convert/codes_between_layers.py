"""Let an integer layer return the codes that the next one reads.

    integer_codes(max_pool2d(integer_conv(...)), s, bits, signed)
        ->  max_pool(integer_conv(..., step=s, bits=bits, signed=signed))
    integer_codes(flatten(integer_conv(...)), s, bits, signed)
        ->  flatten(integer_conv(..., step=s, bits=bits, signed=signed))

where nothing else reads the floats. Codes rise with their levels and belong to one element each: what moves elements or
takes the largest of them does to codes what it does to floats.
"""

from typing import Any, Final

from torch import fx

from octav_fx.ir.arguments import argument, bound_arguments
from octav_fx.ir.edits import Edit
from octav_fx.ir.ops import op_of
from octav_fx.ir.pools import max_window
from octav_fx.nn.integer import integer_codes, max_pool
from octav_fx.passes.convert.clamps_into_layers import is_layer

# What moves elements and computes nothing.
MOVING: Final = frozenset(
    {"flatten", "reshape", "permute", "transpose", "movedim", "squeeze", "unsqueeze", "contiguous"}
)


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
        for moved in between:
            if (window := max_window(moved)) is not None:
                with gm.graph.inserting_before(moved):
                    moved.replace_all_uses_with(gm.graph.call_function(max_pool, (argument(moved, "input"), *window)))
                gm.graph.erase_node(moved)
        edits.append(Edit(layer.name, "return", f"{read['bits']}-bit codes"))
    return edits


def _chain(node: Any) -> list[fx.Node] | None:
    """Return an integer layer and what moves its result up to a node, if each is read by the next alone; else None."""
    found: list[fx.Node] = []
    while len(node.users) == 1:
        found.insert(0, node)
        if is_layer(node):
            return found
        op = op_of(node)
        moves = op is not None and (op.name in MOVING or max_window(node) is not None)
        if not moves or len(node.all_input_nodes) != 1:
            return None
        node = node.all_input_nodes[0]
    return None
