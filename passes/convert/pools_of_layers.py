"""Pool the float result of an integer layer by the op that pools codes.

    max_pool2d(integer_conv(...), 3, 2, 1)  ->  max_pool(integer_conv(...), [3, 3], [2, 2], [1, 1], [1, 1], False)

That is what codes_between_layers leaves: pools that something else reads besides a quantizer, such as a residual sum.
The result is the same. torch's own pool also finds indices and takes three times as long; compiled, it takes longer.
"""

from torch import fx

from octav_fx.ir.arguments import argument
from octav_fx.ir.edits import Edit
from octav_fx.ir.pools import max_window
from octav_fx.nn.integer import integer_conv, max_pool


def pools_of_layers(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits = []
    for node in list(gm.graph.nodes):
        if (window := max_window(node)) is None:
            continue
        layer = argument(node, "input")
        if layer.target is not integer_conv or "step" in layer.kwargs:
            continue
        with gm.graph.inserting_before(node):
            node.replace_all_uses_with(gm.graph.call_function(max_pool, (layer, *window)))
        gm.graph.erase_node(node)
        edits.append(Edit(node.name, "pool", f"behind {layer.name}"))
    return edits
