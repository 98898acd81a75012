"""Fold an eval-mode batch norm into the convolution or linear layer that feeds it.

    batch_norm(conv(x, w, b), mean, var, gamma, beta)  ->  conv(x, folded_weight, folded_bias)

    scale         = gamma / sqrt(var + eps)          [channels]
    folded_weight = w * scale                        along the output-channel axis of w
    folded_bias   = (b - mean) * scale + beta

The fold is computed in the graph from the parameters as they are, so no parameter changes, no key is lost, a shared
convolution can be folded differently at each call, and gradients reach w, gamma and beta.

A clip per output channel is equivariant, clip(a * w) = |a| * clip(w), and so are the codes for a > 0: folding moves no
code of a weight whose scale is positive. It is off by default in quantize(): the values of the float keys stay,
float_mode stays exact, and train() keeps updating the statistics.
"""

from typing import Final

import torch
from torch import Tensor, fx, nn

from octav_fx.compat.modules import has_forward_hooks
from octav_fx.formats.granularity import along
from octav_fx.ir.aliasing import aliasing
from octav_fx.ir.arguments import argument, arguments, set_argument
from octav_fx.ir.dataflow import state_name
from octav_fx.ir.edits import Edit, site_of
from octav_fx.ir.meta import copy_meta, fake, update
from octav_fx.ir.op import Role, Trait
from octav_fx.ir.ops import module_of, op_of
from octav_fx.ir.table.layers import BATCH_NORM
from octav_fx.passes.prepare.canonicalize import parameter


def folded_weight(weight: Tensor, gamma: Tensor | None, var: Tensor, eps: float, channel: int) -> Tensor:
    """Return, of a weight [..., C, ...], gamma and var [C], weight * gamma / sqrt(var + eps) along the channel axis."""
    return weight * along(_scale(gamma, var, eps), weight, channel)


def folded_bias(
    bias: Tensor | None, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> Tensor:
    """Return, of tensors [C], (bias - mean) * gamma / sqrt(var + eps) + beta; a missing bias or beta counts as 0."""
    centred = -mean if bias is None else bias - mean
    scaled = centred * _scale(gamma, var, eps)
    return scaled if beta is None else scaled + beta


def _scale(gamma: Tensor | None, var: Tensor, eps: float) -> Tensor:
    scale = torch.rsqrt(var + eps)
    return scale if gamma is None else gamma * scale


def fold_batchnorm(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits: list[Edit] = []
    for norm in list(gm.graph.nodes):
        if op_of(norm) is not BATCH_NORM:
            continue
        name = str(norm.target) if norm.op == "call_module" else norm.name
        if reason := refusal(norm):
            edits.append(Edit.info(name, reason))
        else:
            feeder = argument(norm, "input")
            _fold(feeder, norm)
            edits.append(Edit(site_of(feeder), "fold", name))
    return edits


def refusal(norm: fx.Node) -> str | None:
    """Return why this batch norm stays, or None."""
    if reason := keeps_statistics(norm):
        return reason
    feeder = argument(norm, "input")
    op = op_of(feeder) if isinstance(feeder, fx.Node) else None
    if op is None or Trait.FEEDS_NORM not in op.traits or feeder.op != "call_function":
        return f"not folded: its input {feeder} is not a convolution or linear layer"
    if len(feeder.users) > 1:
        return f"not folded: {site_of(feeder)} has other readers"
    if Trait.TRANSPOSED in op.traits and argument(feeder, "groups") != 1:
        return f"not folded: {site_of(feeder)} is a grouped transposed convolution"
    value = fake(feeder)
    if value.dim() != 2 + op.spatial:
        return f"not folded: {site_of(feeder)} does not have its channels in dimension 1, shape {tuple(value.shape)}"
    return None


def keeps_statistics(norm: fx.Node) -> str | None:
    """Return why the statistics of this batch norm are not those of eval mode, known beforehand; or None."""
    return _refusal_of_module(norm) if norm.op == "call_module" else _refusal_of_call(norm)


def _refusal_of_module(norm: fx.Node) -> str | None:
    module = module_of(norm)
    assert isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
    if module.training:
        return "not folded: training mode"
    if module.running_var is None:
        return "not folded: it keeps no running statistics"
    if has_forward_hooks(module):
        return "not folded: the module has hooks"
    return None


def _refusal_of_call(norm: fx.Node) -> str | None:
    if norm.target is torch.batch_norm:
        return "not folded: torch.batch_norm takes its arguments in another order than F.batch_norm"
    given = arguments(norm)
    if given["training"] is not False:
        return "not folded: training mode"
    state = [given[kind] for kind in _STATE if isinstance(given[kind], fx.Node)]
    if any(state_name(node) is None for node in state):
        return "not folded: its statistics or its scale are computed in the model"
    memory, feeder = aliasing(norm.graph), given["input"]
    if any(memory.written(node, feeder, norm) for node in state):
        return f"not folded: its statistics or its scale are written after {site_of(feeder)}"
    return None


_STATE: Final = ("weight", "bias", "running_mean", "running_var")


def _state(feeder: fx.Node, norm: fx.Node) -> list[fx.Node | None]:
    """Return gamma, beta, mean and var as nodes before the feeder, None for what the batch norm lacks."""
    given = arguments(norm)
    nodes = [
        parameter(feeder, f"{norm.target}.{kind}", given[kind]) if isinstance(given[kind], Tensor) else given[kind]
        for kind in _STATE
    ]
    for node in nodes:
        if node is not None and node > feeder:
            feeder.prepend(node)
    return nodes


def _fold(feeder: fx.Node, norm: fx.Node) -> None:
    graph, op = feeder.graph, op_of(feeder)
    assert op is not None
    (channel,) = (operand.channel for operand in op.operands if operand.role is Role.WEIGHT)
    gamma, beta, mean, var = _state(feeder, norm)
    weight, bias, eps = argument(feeder, "weight"), argument(feeder, "bias"), argument(norm, "eps")
    with graph.inserting_before(feeder):
        new_weight = graph.call_function(folded_weight, (weight, gamma, var, eps, channel))
        new_bias = graph.call_function(folded_bias, (bias, mean, var, gamma, beta, eps))
    assert var is not None
    update(copy_meta(weight, new_weight), site=None)
    copy_meta(var, new_bias)
    set_argument(feeder, "weight", new_weight)
    set_argument(feeder, "bias", new_bias)
    norm.replace_all_uses_with(feeder)
    graph.erase_node(norm)
