"""Pool what a layer returns in floats as its codes are pooled.

    max_pool2d(integer_conv(...), 3, 2, 1)  ->  max_pool(integer_conv(...), [3, 3], [2, 2], [1, 1], [1, 1], False)

Where a pool has other readers than codes, such as a residual sum. The result is the same; torch's own pool finds
indices, too, and takes three times as long, and a compiler takes longer still.
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
