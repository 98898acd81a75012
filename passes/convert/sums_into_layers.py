"""Let an integer convolution add its result to a sum in place.

    relu(add(integer_conv(...), r))  ->  integer_conv_add(r, True, ...)
    add(r, integer_conv(...))        ->  integer_conv_add(r, False, ...)

where the memory of r is its own, nothing reads it later, and what read it before took no view of it. The convolution
moves behind all that reads r.
"""

from typing import Any, Final

from torch import fx

from octav_fx.ir.edits import Edit, copy_meta
from octav_fx.ir.ops import in_place, op_of
from octav_fx.nn.integer import integer_codes, integer_conv, integer_conv_add, integer_linear
from octav_fx.passes.convert.clamps_into_layers import is_layer

# Their results lie in memory of their own; so do those of the ops below where they are not in place.
_OWNERS: Final = (integer_conv, integer_linear, integer_conv_add)
_OWNING: Final = ("max_pool", "avg_pool", "add", "relu")


def sums_into_layers(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits = []
    for node in list(gm.graph.nodes):
        op = op_of(node)
        if op is None or op.name != "add" or len(node.args) != 2 or node.kwargs:
            continue
        for layer, total in (node.args, node.args[::-1]):
            if _adds(layer) and _is_free(total, node):
                edits.append(Edit(node.name, "fuse", f"into {layer}"))
                _rewrite(gm.graph, node, layer, total)
                break
    return edits


def _adds(node: Any) -> bool:
    """Whether a value is that of an integer convolution which nothing else reads."""
    is_conv = isinstance(node, fx.Node) and node.target is integer_conv and is_layer(node)
    return is_conv and len(node.users) == 1 and all(bound is None for bound in node.kwargs.values())


def _is_free(total: Any, before: fx.Node) -> bool:
    """Whether the memory of a value may be overwritten by the node that reads it last."""
    if not isinstance(total, fx.Node):
        return False
    op = op_of(total)
    owned = total.target in _OWNERS or (op is not None and op.name in _OWNING and not in_place(total))
    readers = [reader for reader in total.users if reader is not before]
    return owned and all(reader.target is integer_codes and reader < before for reader in readers)


def _rewrite(graph: fx.Graph, node: fx.Node, layer: Any, total: Any) -> None:
    (reader, *others) = node.users
    op = op_of(reader)
    has_relu = not others and op is not None and op.name == "relu"
    with graph.inserting_before(node):
        new = copy_meta(layer, graph.call_function(integer_conv_add, (total, has_relu, *layer.args)))
    (reader if has_relu else node).replace_all_uses_with(new)
    for unused in (reader, node, layer) if has_relu else (node, layer):
        graph.erase_node(unused)
