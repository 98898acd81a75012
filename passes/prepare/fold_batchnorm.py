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

from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from octav_fx.compat.modules import has_forward_hooks
from octav_fx.formats.granularity import along
from octav_fx.ir.aliasing import aliasing
from octav_fx.ir.dataflow import state_name
from octav_fx.ir.edits import Edit, copy_meta, site_of, skip
from octav_fx.ir.ops import module_of, op_of
from octav_fx.ir.rules import RULES
from octav_fx.passes.prepare.canonicalize import parameter

_FEEDERS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear")


def folded_weight(weight: Tensor, gamma: Tensor | None, var: Tensor, eps: float, channel: int) -> Tensor:
    """Weight [..., C, ...], gamma and var [C] -> weight * gamma / sqrt(var + eps) along the channel axis."""
    return weight * along(_scale(gamma, var, eps), weight, channel)


def folded_bias(
    bias: Tensor | None, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> Tensor:
    """All [C] -> (bias - mean) * gamma / sqrt(var + eps) + beta; a missing bias or beta counts as 0."""
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
        op = op_of(norm)
        if op is None or op.name != "batch_norm":
            continue
        name = str(norm.target) if norm.op == "call_module" else norm.name
        if reason := refusal(norm):
            edits.append(skip(name, reason))
        else:
            feeder = norm.args[0]
            assert isinstance(feeder, fx.Node)
            _fold(feeder, norm)
            edits.append(Edit(site_of(feeder), "fold", name))
    return edits


def refusal(norm: fx.Node) -> str | None:
    """Why this batch norm stays, or None."""
    if reason := keeps_statistics(norm):
        return reason
    feeder = norm.args[0] if norm.args else norm.kwargs.get("input")
    op = op_of(feeder) if isinstance(feeder, fx.Node) else None
    if not isinstance(feeder, fx.Node) or op is None or op.name not in _FEEDERS or feeder.op != "call_function":
        return f"not folded: its input {feeder} is not a convolution or linear layer"
    if len(feeder.users) > 1:
        return f"not folded: {site_of(feeder)} has other readers"
    if op.name.startswith("conv_transpose") and feeder.args[6] != 1:
        return f"not folded: {site_of(feeder)} is a grouped transposed convolution"
    value = feeder.meta["value"]
    if value.dim() != (2 if op.name == "linear" else 2 + int(op.name[-2])):
        return f"not folded: {site_of(feeder)} does not have its channels in dimension 1, shape {tuple(value.shape)}"
    return None


def keeps_statistics(norm: fx.Node) -> str | None:
    """Why the statistics of this batch norm are not those of eval mode, known beforehand; or None."""
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


# Of F.batch_norm, with what stands for an argument that is not given.
_ARGUMENTS: Final = {
    "input": None,
    "running_mean": None,
    "running_var": None,
    "weight": None,
    "bias": None,
    "training": False,
    "momentum": 0.1,
    "eps": 1e-5,
}


def arguments_of(norm: fx.Node) -> dict[str, Any]:
    """The arguments of a call of F.batch_norm by name, defaults included."""
    given = dict(zip(_ARGUMENTS, norm.args, strict=False))
    return {**_ARGUMENTS, **given, **norm.kwargs}


def _refusal_of_call(norm: fx.Node) -> str | None:
    if norm.target is torch.batch_norm:
        return "not folded: torch.batch_norm takes its arguments in another order than F.batch_norm"
    found = arguments_of(norm)
    if found["training"] is not False:
        return "not folded: training mode"
    if any(isinstance(found[kind], fx.Node) and state_name(found[kind]) is None for kind in _STATE):
        return "not folded: its statistics or its scale are computed in the model"
    memory, feeder = aliasing(norm.graph), found["input"]
    if any(isinstance(found[kind], fx.Node) and memory.written(found[kind], feeder, norm) for kind in _STATE):
        return f"not folded: its statistics or its scale are written after {site_of(feeder)}"
    return None


_STATE: Final = ("weight", "bias", "running_mean", "running_var")


def _state(feeder: fx.Node, norm: fx.Node) -> tuple[list[fx.Node | None], float]:
    """gamma, beta, mean and var as nodes before the feeder, and eps."""
    if norm.op == "call_function":
        found = arguments_of(norm)
        nodes = [found[kind] for kind in _STATE]
        for node in nodes:
            if node is not None and node > feeder:
                feeder.prepend(node)
        return nodes, found["eps"]
    module: Any = module_of(norm)
    values = {kind: getattr(module, kind) for kind in _STATE}
    return [
        None if value is None else parameter(feeder, f"{norm.target}.{kind}", value) for kind, value in values.items()
    ], module.eps


def _fold(feeder: fx.Node, norm: fx.Node) -> None:
    graph, op = feeder.graph, op_of(feeder)
    assert op is not None
    channel = RULES[op.name].operands[1].channel
    (gamma, beta, mean, var), eps = _state(feeder, norm)
    weight, bias = feeder.args[1:3] if len(feeder.args) > 2 else (feeder.args[1], None)
    with graph.inserting_before(feeder):
        new_weight = graph.call_function(folded_weight, (weight, gamma, var, eps, channel))
        new_bias = graph.call_function(folded_bias, (bias, mean, var, gamma, beta, eps))
    assert isinstance(weight, fx.Node) and var is not None
    copy_meta(weight, new_weight).meta.pop("site", None)
    copy_meta(var, new_bias)
    feeder.args = (feeder.args[0], new_weight, new_bias, *feeder.args[3:])
    norm.replace_all_uses_with(feeder)
    graph.erase_node(norm)
