"""Remove what returns its input in eval mode.

    self.dropout(x), self.identity(x)                              ->  x
    stochastic_depth(x, 0.2, "row", self.block.drop.training)      ->  x        torchvision's, training is False

A layer is then read by the quantizer that its codes are for.
"""

from typing import Any, Final

from torch import fx

from octav_fx.compat.modules import has_forward_hooks
from octav_fx.ir.arguments import bound_arguments
from octav_fx.ir.dataflow import value_of
from octav_fx.ir.edits import Edit, erase_unused
from octav_fx.ir.ops import module_of, op_of

_MODULES: Final = frozenset({"dropout", "identity"})


def drop_identities(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits = []
    for node in list(gm.graph.nodes):
        if (source := _same(gm, node)) is None:
            continue
        others = [given for given in node.all_input_nodes if given is not source]
        node.replace_all_uses_with(source)
        gm.graph.erase_node(node)
        erase_unused(*others)
        edits.append(Edit(node.name, "remove", "returns its input"))
    return edits


def _same(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Return the input that a node returns in eval mode; None of any other node."""
    if node.op == "call_module":
        op, module = op_of(node), module_of(node)
        is_same = op is not None and op.name in _MODULES and len(node.all_input_nodes) == 1
        return node.all_input_nodes[0] if is_same and not has_forward_hooks(module) else None
    if node.op != "call_function" or getattr(node.target, "__module__", "") != "torchvision.ops.stochastic_depth":
        return None
    given = bound_arguments(node)
    training: Any = given.get("training", True)
    training = value_of(gm, training) if isinstance(training, fx.Node) else training
    return None if training else given["input"]
