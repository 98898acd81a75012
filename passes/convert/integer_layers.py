"""Multiply codes: convolutions and linear layers whose operands are both on grids.

    conv2d(quantizer(x), weight(), b, ...)  ->  integer_conv(codes, s, bits, signed, w, sw, shape, b, ...)
    linear(quantizer(x), weight(), b)       ->  integer_linear(codes, s, bits, signed, w, sw, shape, b)

    codes = integer_codes(x, s, bits, signed)        uint8, one for each quantizer
    s, w, sw = quantizer.scale, weight.codes, weight.scale

The sum of products of levels is s * sw times the sum of products of codes, which is exact. Codes are stored as they
were, and packed by the op when it first runs.
"""

from typing import Any

import torch
from torch import fx

from octav_fx.ir.edits import Edit, copy_meta, skip
from octav_fx.ir.ops import CONTRACTIONS, module_of, op_of
from octav_fx.nn import IntegerWeight, StaticQuantizer
from octav_fx.nn.integer import integer_codes, integer_conv, integer_linear
from octav_fx.ops import onednn

_FUNCTIONS = {"linear": integer_linear, **dict.fromkeys(("conv1d", "conv2d", "conv3d"), integer_conv)}


def integer_layers(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring. One edit for each matmul and convolution, done or declined."""
    edits: list[Edit] = []
    codes: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    for node in list(gm.graph.nodes):
        op = op_of(node)
        if op is None or op not in CONTRACTIONS:
            continue
        if (reason := _refusal(node, op.name)) is not None:
            edits.append(skip(node, reason))
            continue
        edits.append(Edit(skip(node, "").node, "multiply", "integers"))
        _rewrite(gm.graph, node, codes, _FUNCTIONS[op.name])
    return edits


def _refusal(node: fx.Node, op: str) -> str | None:
    """Why a layer cannot multiply codes, or None."""
    if op not in _FUNCTIONS:
        return f"oneDNN has no {op} of two quantized operands"
    quantizer, weight = (_called(argument) for argument in node.args[:2])
    if not isinstance(quantizer, StaticQuantizer) or not isinstance(weight, IntegerWeight):
        return "an operand is float"
    if quantizer.dim is not None or weight.dim not in (None, 0):
        return "a scale along an axis that is summed over"
    if weight.dtype is not torch.float32:
        return f"computes in {weight.dtype}"
    if weight.codes.device.type != "cpu":
        return f"on {weight.codes.device}"
    if op != "linear" and isinstance(node.args[4], str):
        return f"padding {node.args[4]!r}"
    return onednn.refusal(quantizer.bits, onednn.largest_code(weight.integers()))


def _called(node: Any) -> Any:
    is_call = isinstance(node, fx.Node) and node.op == "call_module"
    return module_of(node) if is_call else None


def _rewrite(graph: fx.Graph, node: fx.Node, codes: dict[fx.Node, tuple[fx.Node, fx.Node]], function: Any) -> None:
    source, stored, bias, *window = node.args
    assert isinstance(source, fx.Node) and isinstance(stored, fx.Node)
    quantizer, weight = module_of(source), module_of(stored)
    assert isinstance(quantizer, StaticQuantizer) and isinstance(weight, IntegerWeight)
    if source not in codes:
        with graph.inserting_before(source):
            scale = graph.get_attr(f"{source.target}.scale")
            levels = (source.args[0], scale, quantizer.bits, quantizer.signed)
            codes[source] = graph.call_function(integer_codes, levels), scale
    x, scale = codes[source]
    with graph.inserting_before(node):
        w, w_scale = (graph.get_attr(f"{stored.target}.{kind}") for kind in ("codes", "scale"))
        operands = (x, scale, quantizer.bits, quantizer.signed, w, w_scale, weight.shape, bias, *window)
        new = graph.call_function(function, operands)
    node.replace_all_uses_with(copy_meta(node, new))
    graph.erase_node(node)
    for unused in (source, stored):
        if not unused.users:
            graph.erase_node(unused)
