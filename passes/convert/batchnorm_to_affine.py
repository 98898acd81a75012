"""Fold the statistics and parameters of an eval-mode batch norm into one factor and one offset for each channel.

    self.norm(x)                                  ->  self.norm(x)      a ChannelAffine
    batch_norm(x, mean, var, gamma, beta)         ->  folded.batch_norm(x)

    factor = gamma / sqrt(var + eps)              [C], of either sign, or zero
    offset = beta - mean * factor                 [C]

No integer code of a weight changes, as the weight stays out of it, and the rounding is that of torch's own kernel on a
CPU: there the result is the same to the last bit. (fold_batchnorm is the fold into a weight that is still to be
quantized.) Where codes meet the factor, in an accelerator's output scale, is for the exporter to say.
"""

from typing import Any

import torch
from torch import Tensor, fx

from octav_fx.ir.arguments import argument, arguments
from octav_fx.ir.dataflow import constants, value_of
from octav_fx.ir.edits import Edit
from octav_fx.ir.ops import op_of
from octav_fx.ir.table.layers import BATCH_NORM
from octav_fx.nn import ChannelAffine
from octav_fx.passes.prepare.fold_batchnorm import keeps_statistics

_FOLDED = "folded"


def batchnorm_to_affine(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits: list[Edit] = []
    known = constants(gm.graph)
    for node in list(gm.graph.nodes):
        if op_of(node) is not BATCH_NORM:
            continue
        name = str(node.target) if node.op == "call_module" else node.name
        if (reason := keeps_statistics(node) or _precision(gm, node, known)) is not None:
            edits.append(Edit.info(name, reason))
            continue
        affine = _affine(**_state(gm, node))
        if node.op == "call_module":
            gm.set_submodule(name, affine, strict=True)
        else:
            gm.add_submodule(f"{_FOLDED}.{name}", affine)
            _call(gm.graph, node, f"{_FOLDED}.{name}")
        edits.append(Edit(name, "fold", f"{len(affine.factor)} channels"))
    return edits


def _precision(gm: fx.GraphModule, node: fx.Node, known: set[fx.Node]) -> str | None:
    """Return why the values of a batch norm cannot be folded, or None."""
    given = arguments(node)
    if any(isinstance(given[kind], fx.Node) and given[kind] not in known for kind in _KINDS):
        return "not folded: its statistics or its scale are computed in the model"
    if _state(gm, node)["running_var"].dtype not in (torch.float32, torch.float64):
        return "not folded: statistics in half precision"
    return None


_KINDS = ("running_mean", "running_var", "weight", "bias")


def _state(gm: fx.GraphModule, node: fx.Node) -> dict[str, Any]:
    """Return the four tensors of a batch norm, None for one it lacks, and eps."""
    given = arguments(node)
    read = {kind: given[kind] for kind in (*_KINDS, "eps")}
    return {kind: value_of(gm, value) if isinstance(value, fx.Node) else value for kind, value in read.items()}


def _affine(
    running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> ChannelAffine:
    factor = torch.rsqrt(running_var + eps)
    factor = factor if weight is None else weight.detach() * factor
    # In float64 the product is exact: one rounding, as fused multiply-add does it.
    offset = -running_mean.double() * factor.double()
    offset = offset if bias is None else bias.detach().double() + offset
    return ChannelAffine(factor, offset.to(factor.dtype))


def _call(graph: fx.Graph, node: fx.Node, target: str) -> None:
    with graph.inserting_before(node):
        new = graph.call_module(target, (argument(node, "input"),))
    node.replace_all_uses_with(new)
    sources = node.all_input_nodes
    graph.erase_node(node)
    for source in sources:
        if source.op == "get_attr" and not source.users:
            graph.erase_node(source)
