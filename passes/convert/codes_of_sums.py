"""Quantize a sum in the pass that adds it up.

    r = relu(add(x, y)); integer_codes(r, s, bits, signed)
        ->  t = integer_sum(x, y, True, s, bits, signed); r = t[0]; t[1]

The sum itself goes on in float, to the next sum. Compiled, both are written out and fuse with what is around them.
Where something writes into the sum before it is quantized, or the sum is written into memory that others read, all
stays.
"""

import operator

from torch import fx

from octav_fx.ir.arguments import bound_arguments
from octav_fx.ir.dataflow import written_before
from octav_fx.ir.edits import Edit, erase_unused
from octav_fx.ir.ops import is_op
from octav_fx.nn.integer import integer_codes, integer_sum
from octav_fx.passes.convert.multiply_codes import is_plain_sum


def codes_of_sums(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits = []
    for node in list(gm.graph.find_nodes(op="call_function", target=integer_codes)):
        value = bound_arguments(node)["x"]
        has_relu = is_op(value, "relu") and len(value.all_input_nodes) == 1
        add = value.all_input_nodes[0] if has_relu else value
        if (has_relu and len(add.users) > 1) or not is_plain_sum(add) or written_before(value, node):
            continue
        _rewrite(gm.graph, node, value, add)
        edits.append(Edit(add.name, "fuse", f"with {node.name}"))
    return edits


def _rewrite(graph: fx.Graph, node: fx.Node, value: fx.Node, add: fx.Node) -> None:
    read = bound_arguments(node)
    with graph.inserting_before(value):
        step = graph.get_attr(str(read["scale"].target))
        both = graph.call_function(integer_sum, (*add.args, value is not add, step, read["bits"], read["signed"]))
        total, codes = (graph.call_function(operator.getitem, (both, i)) for i in range(2))
    node.replace_all_uses_with(codes)
    graph.erase_node(node)
    value.replace_all_uses_with(total)
    for unused in dict.fromkeys((value, add)):
        graph.erase_node(unused)
    erase_unused(total)
