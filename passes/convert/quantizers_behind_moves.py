"""Quantize once more where a layer reads levels that have been moved.

    conv2d(max_pool2d(quantizer(x), 3), weight())  ->  conv2d(quantizer_0(max_pool2d(quantizer(x), 3)), weight())

quantizer_0: a copy of quantizer

Rounding a level gives the level, so nothing changes but where it is written: passes and runtimes ask the operand of a
layer itself for its grid. Codes that are moved, and read on the grid that they have, are codes: no kernel runs for the
copy.
"""

import copy

from torch import fx

from octav_fx.ir.arguments import called_module, operand_of, operands_of, set_operand
from octav_fx.ir.edits import Edit
from octav_fx.ir.movement import quantizer_before
from octav_fx.nn import FakeQuantizer


def quantizers_behind_moves(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits = []
    copies: dict[fx.Node, fx.Node] = {}
    for node in list(gm.graph.nodes):
        for operand in operands_of(node):
            value = operand_of(node, operand)
            call = quantizer_before(value, node)
            if call is None or value is call or not _is_plain(call):
                continue
            if value not in copies:
                with gm.graph.inserting_after(value):
                    copies[value] = call_copy(gm, call, value)
                edits.append(Edit(str(call.target), "quantize", f"{value.name} once more"))
            set_operand(node, operand, copies[value])
    return edits


def call_copy(gm: fx.GraphModule, call: fx.Node, value: fx.Node) -> fx.Node:
    """Make a call of a copy of the quantizer that a node calls, under a name of its own, for another value."""
    known = {name for name, _ in gm.named_modules()}
    name = next(name for i in range(len(known) + 1) if (name := f"{call.target}_{i}") not in known)
    gm.add_submodule(name, copy.deepcopy(gm.get_submodule(str(call.target))))
    return gm.graph.call_module(name, (value,))


def _is_plain(call: fx.Node) -> bool:
    """Tell whether a quantizer has one static clip for the whole, and integers on a grid."""
    quantizer = called_module(call)
    assert isinstance(quantizer, FakeQuantizer)
    plain = quantizer.spec.even
    return quantizer.clip is not None and plain is not None and plain[1] is None
