"""Write the product with a stored matrix as the linear layer that it is.

    matmul(x, weight())                    ->  linear(x, weight())        weight [in, out] becomes [out, in]
    addmm(b, x, weight())                  ->  linear(x, weight(), b)     b: a constant [out]

The codes are transposed where they are stored. Everything behind knows linear layers: their bias is on the grid of the
sums, they multiply codes, and a file has them as a Gemm with integers inside. transformers' Conv1D is an addmm.
"""

from typing import Any, Final

from torch import fx
from torch.nn import functional as F

from octav_fx.ir.arguments import argument, called_module
from octav_fx.ir.dataflow import constants, value_of
from octav_fx.ir.edits import Edit
from octav_fx.ir.meta import copy_meta
from octav_fx.ir.ops import op_of
from octav_fx.nn import IntegerWeight

# What multiplies, what with, and what is added.
_OPERANDS: Final = {"matmul": ("input", "other", None), "addmm": ("mat1", "mat2", "input")}


def products_as_linear(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits: list[Edit] = []
    known = constants(gm.graph)
    for node in list(gm.graph.nodes):
        op = op_of(node)
        if op is None or op.name not in _OPERANDS or node.op != "call_function":
            continue
        x, stored, bias = (None if name is None else argument(node, name) for name in _OPERANDS[op.name])
        weight = called_module(stored)
        if not isinstance(weight, IntegerWeight) or not isinstance(stored, fx.Node):
            continue
        if reason := _refusal(gm, node, weight, stored, bias, known):
            edits.append(Edit.info(node.name, reason))
            continue
        weight.transpose()
        with gm.graph.inserting_before(node):
            linear = gm.graph.call_function(F.linear, (x, stored, bias))
        node.replace_all_uses_with(copy_meta(node, linear))
        gm.graph.erase_node(node)
        edits.append(Edit(str(stored.target), "transpose", str(weight.shape)))
    return edits


def _refusal(
    gm: fx.GraphModule, node: fx.Node, weight: IntegerWeight, stored: Any, bias: Any, known: set[fx.Node]
) -> str | None:
    """Return why a product with a stored tensor is no linear layer, or None."""
    if len(weight.shape) != 2 or weight.dim not in (None, 1, -1):
        return "not a linear layer: no matrix with scales of its columns"
    if len(stored.users) > 1 or len(node.graph.find_nodes(op="call_module", target=stored.target)) > 1:
        return "not a linear layer: its weight has other readers"
    if bias is None:
        return None
    if argument(node, "alpha") != 1 or argument(node, "beta") != 1:
        return "not a linear layer: it has factors"
    if bias not in known or value_of(gm, bias).shape != (weight.shape[1],):
        return "not a linear layer: what it adds is no constant of each column"
    return None
