"""Fold the factor and offset of a channel into the scale of the weight and the bias of the convolution before it.

    affine(conv2d(x, weight(), b))  ->  conv2d(x, weight(), bias)

    scale of the weight = scale * factor             [C]; codes stay as they are
    bias                = b * factor + offset        [C]

A negative factor makes a negative scale: with the sign in the codes the lowest of them, which has no opposite, would
have to change. A target that wants positive scales turns the codes when it writes them. A factor of zero makes a scale
of zero, which round_biases mends.
"""

from typing import Final

from torch import Tensor, fx, nn

from octav_fx.ir.arguments import argument, module_input, set_argument
from octav_fx.ir.dataflow import value_of
from octav_fx.ir.edits import Edit, erase_unused
from octav_fx.ir.op import Op, Trait
from octav_fx.ir.ops import module_of, op_of
from octav_fx.nn import ChannelAffine, IntegerWeight

_FOLDED: Final = "folded"


def fold_affine_into_scale(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits: list[Edit] = []
    for node in list(gm.graph.find_nodes(op="call_module")):
        if not isinstance(affine := module_of(node), ChannelAffine):
            continue
        name = str(node.target)
        if reason := _refusal(node):
            edits.append(Edit.info(name, reason))
            continue
        _fold(gm, node, affine)
        edits.append(Edit(name, "fold", f"{len(affine.factor)} channels"))
    return edits


def _refusal(node: fx.Node) -> str | None:
    conv = module_input(node)
    op = op_of(conv)
    if op is None or not _is_convolution(op):
        return f"not folded: its input {conv} is not a convolution"
    if len(conv.users) > 1:
        return f"not folded: {conv} has other readers"
    weight = argument(conv, "weight")
    if not isinstance(weight, fx.Node) or weight.op != "call_module":
        return f"not folded: the weight of {conv} is not stored as integers"
    stored = module_of(weight)
    if not isinstance(stored, IntegerWeight) or stored.dim != 0:
        return f"not folded: the weight of {conv} has no scale for each output channel"
    if len(weight.users) > 1 or len(node.graph.find_nodes(op="call_module", target=weight.target)) > 1:
        return f"not folded: the weight of {conv} has other readers"
    return None


def _is_convolution(op: Op) -> bool:
    return Trait.FEEDS_NORM in op.traits and op.spatial > 0 and Trait.TRANSPOSED not in op.traits


def _fold(gm: fx.GraphModule, node: fx.Node, affine: ChannelAffine) -> None:
    graph, conv = gm.graph, module_input(node)
    bias, stored = argument(conv, "bias"), module_of(argument(conv, "weight"))
    assert isinstance(stored, IntegerWeight)
    factor, offset = affine.factor.double(), affine.offset.double()
    stored.scale = (stored.scale.double() * factor).float()
    if isinstance(bias, fx.Node):
        value = value_of(gm, bias)
        assert isinstance(value, Tensor)
        offset = offset + value.detach().double() * factor
    holder, path = nn.Module(), f"{_FOLDED}.{node.name}"
    holder.register_buffer("bias", offset.to(affine.offset.dtype))
    gm.add_submodule(path, holder)
    with graph.inserting_before(conv):
        set_argument(conv, "bias", graph.get_attr(f"{path}.bias"))
    node.replace_all_uses_with(conv)
    graph.erase_node(node)
    erase_unused(bias)
