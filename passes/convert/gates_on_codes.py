"""Multiply codes by the float gates of their channels, where a quantizer takes the product.

    integer_codes(sigmoid(y) * quantizer1(x), s2, bits2, signed2)
        ->  gated_codes(codes, s1, sigmoid(y), s2, bits1, signed1, bits2, signed2)

    codes = integer_codes(x, s1, bits1, signed1)        uint8: on_codes.py

The gate is [N, C, 1, 1], as in a squeeze-and-excitation block: small, and float. The codes are those of the product of
floats; its factors may stand in either order.
"""

from typing import Any

from torch import fx

from octav_fx.ir.arguments import argument, bound_arguments
from octav_fx.ir.dataflow import writes_for_others
from octav_fx.ir.edits import Edit, erase_unused
from octav_fx.ir.ops import is_op
from octav_fx.nn.integer import gated_codes, integer_codes
from octav_fx.passes.convert.on_codes import grid_of, on_codes


def gates_on_codes(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits: list[Edit] = []
    for node in list(gm.graph.find_nodes(op="call_function", target=integer_codes)):
        read = bound_arguments(node)
        product = read["x"]
        if (operands := _factors(product)) is None:
            continue
        source, gate = operands
        x = on_codes(source)
        with gm.graph.inserting_before(node):
            grids = (x.bits, x.signed, read["bits"], read["signed"])
            new = gm.graph.call_function(gated_codes, (x.codes, x.scale, gate, read["scale"], *grids))
        levels = [given for given in product.all_input_nodes if given is not gate]
        node.replace_all_uses_with(new)
        erase_unused(node, product, *levels)
        edits.append(Edit(product.name, "gate", "codes"))
    return edits


def _factors(product: Any) -> tuple[fx.Node, fx.Node] | None:
    """Return the quantized and the float factor of a product that one node reads; None for anything else."""
    if not is_op(product, "mul") or len(product.users) > 1 or writes_for_others(product):
        return None
    first, second = argument(product, "input"), argument(product, "other")
    quantized = [grid_of(factor) is not None for factor in (first, second)]
    if not all(isinstance(factor, fx.Node) for factor in (first, second)) or sum(quantized) != 1:
        return None
    return (first, second) if quantized[0] else (second, first)
