"""Let the layer that multiplies codes look them up.

    codes = lookup(x, table); integer_linear(codes, ...)                ->  integer_linear(x, ..., table=table)
    codes = lookup(x, table); integer_conv(codes, ...) of 1x1 filters   ->  integer_conv(x, ..., table=table)

where such layers alone read them, and their quantizer has one table. The codes are the same, and go through no memory:
nets of 4 bits that read sums of 8 bits spent 2 to 4 % of their time on that. Larger filters read a code several times:
it is looked up before.
"""

import inspect

from torch import fx

from octav_fx.ir.edits import Edit
from octav_fx.nn.integer import integer_conv, integer_linear, lookup
from octav_fx.ops.integer_conv import reference
from octav_fx.passes.convert.functions_of_codes import tables_of


def tables_into_layers(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits = []
    for node in list(gm.graph.find_nodes(op="call_function", target=lookup)):
        codes, table = node.all_input_nodes
        quantizer = gm.get_submodule(str(table.target).rpartition(".")[0])
        # Of several calls of one quantizer, deploy/codes.py asks for the order.
        if tables_of(quantizer) > 1 or not all(_reads_once(reader) for reader in node.users):
            continue
        for layer in list(node.users):
            layer.replace_input_with(node, codes)
            layer.kwargs = {**layer.kwargs, "table": table}
            edits.append(Edit(layer.name, "look up", str(table)))
        gm.graph.erase_node(node)
    return edits


def _reads_once(layer: fx.Node) -> bool:
    """Tell whether a node is a layer that takes each code that it reads once for each of its channels."""
    if layer.op != "call_function" or "table" in layer.kwargs:
        return False
    if layer.target is integer_linear:
        return True
    if layer.target is not integer_conv:
        return False
    given = inspect.signature(reference.integer_conv).bind(*layer.args, **layer.kwargs).arguments
    _, _, *kernel = given["shape"]
    return given["groups"] == 1 and not any(given["padding"]) and all(size == 1 for size in kernel)
