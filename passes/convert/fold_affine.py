"""Fold the factor and offset of a channel into the scale and bias of the convolution before it.

    affine(conv2d(x, weight(), b))  ->  conv2d(x, weight(), bias)

    scale of the weight = scale * factor       [C], of either sign, or zero; codes stay as they are
    bias                = b * factor + offset  [C]

For arithmetic on codes, where a scale is one multiplication at the end (fold_affine_into_scale is the fold for runtimes
that want it positive).
"""

from typing import Any, Final

from torch import Tensor, fx, nn

from octav_fx.ir.dataflow import value_of
from octav_fx.ir.edits import Edit
from octav_fx.ir.ops import module_of, op_of
from octav_fx.nn import ChannelAffine, IntegerWeight

_FOLDED: Final = "folded"


def fold_affine(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits = []
    for node in list(gm.graph.find_nodes(op="call_module")):
        if not isinstance(affine := module_of(node), ChannelAffine) or not _fits(node):
            continue
        _fold(gm, node, affine)
        edits.append(Edit(str(node.target), "fold", f"{len(affine.factor)} channels"))
    return edits


def _fits(node: fx.Node) -> bool:
    """Whether what is scaled is a convolution with stored integers, and nothing else reads either of them."""
    conv: Any = node.args[0]
    op = op_of(conv)
    if op is None or op.name not in ("conv1d", "conv2d", "conv3d") or len(conv.users) > 1:
        return False
    weight = conv.args[1]
    stored = module_of(weight) if weight.op == "call_module" else None
    called = [*node.graph.find_nodes(op="call_module", target=weight.target)]
    applied = [*node.graph.find_nodes(op="call_module", target=node.target)]
    is_single = len(called) == len(applied) == len(weight.users) == 1
    return isinstance(stored, IntegerWeight) and stored.dim in (None, 0) and is_single


def _fold(gm: fx.GraphModule, node: fx.Node, affine: ChannelAffine) -> None:
    graph = gm.graph
    conv: Any = node.args[0]
    weight, bias = conv.args[1:3]
    stored = module_of(weight)
    assert isinstance(stored, IntegerWeight)
    factor, offset = affine.factor.double(), affine.offset.double()
    if isinstance(bias, fx.Node):
        value: Tensor = value_of(gm, bias)
        offset = offset + value.detach().double() * factor
    stored.dim, stored.scale = 0, (stored.scale.double() * factor).float()
    holder, path = nn.Module(), f"{_FOLDED}.{node.name}"
    holder.register_buffer("bias", offset.to(affine.offset.dtype))
    gm.add_submodule(path, holder)
    with graph.inserting_before(conv):
        conv.update_arg(2, graph.get_attr(f"{path}.bias"))
    node.replace_all_uses_with(conv)
    graph.erase_node(node)
    gm.delete_submodule(str(node.target))
    if isinstance(bias, fx.Node) and not bias.users:
        graph.erase_node(bias)
        owner, _, name = str(bias.target).rpartition(".")
        delattr(gm.get_submodule(owner), name)
