"""Keep autocast from what has integers by definition and computes levels in float.

    linear(quantizer(x), weight(), bias())  ->  linear(quantizer(x), weight(), bias())    nn/integer_rule.py's, and conv

for the layers that no kernel multiplies here: autocast would round their levels and sums to a dtype that does not hold
them, and the codes behind them would be others than those of the frozen model, and of a machine that has the kernel.
"""

from torch import fx

from octav_fx.ir.arguments import argument, called_module
from octav_fx.ir.edits import Edit, site_of
from octav_fx.ir.ops import op_of
from octav_fx.nn import IntegerBias
from octav_fx.nn.integer_rule import PRODUCTS


def products_outside_autocast(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits = []
    for node in gm.graph.nodes:
        op = op_of(node)
        if node.op != "call_function" or op is None or op.name not in PRODUCTS:
            continue
        if not isinstance(called_module(argument(node, "bias")), IntegerBias):
            continue
        node.target = PRODUCTS[op.name]
        edits.append(Edit(site_of(node), "exclude", "from autocast"))
    return edits
