"""Multiply the codes that are there anyway in forward, on a CPU, where it takes less time than their levels.

On the joint graph of forward and backward as levels_as_read leaves it, and on a graph for inference:

    codes = quantize(x, clip)                    codes = quantize(x, clip)
    y     = dequantize(codes, clip)       ->     y     = dequantize(codes, clip)         for backward only
    v     = fake_quantize(w, clips)              v     = fake_quantize(w, clips)         for backward only
    z     = convolution(y, v, bias)              z     = product_of_codes(codes, clip, w, clips, bias)

and the same for z = y @ v.T + bias. Levels are codes times a step, so that z is the exact sum of products of codes,
times both steps, plus bias: it differs from before by the roundings of levels and of their sum, which it has not. A
sum of K products that magnitudes of x and w bound by S moves by K * 2**-24 * S at most.

Backward reads levels or codes as it did. A quantizer whose value is there anyway (save_codes) has no codes yet; it gets
them. Which layers gain: octav_fx/ops/product_of_codes/choice.py, from their sizes. Layers on other devices are not
looked at: integer_matmul is for GPUs.
"""

from typing import Any, Final

import torch
from torch import Tensor, fx

from octav_fx.compat.graphs import size_hint
from octav_fx.formats.grid import Grid
from octav_fx.formats.spec import spec_of
from octav_fx.ir.calls import arguments_of, insert_call
from octav_fx.ir.edits import Edit, insert_aten
from octav_fx.ir.joint import CONVERT, erase_unread, origin, replace
from octav_fx.ir.meta import fake
from octav_fx.ops.product_of_codes.choice import Layer, loss, refusal
from octav_fx.ops.product_of_codes.reference import grid_of

octav, aten = torch.ops.octav, torch.ops.aten

_CASTS: Final = frozenset({CONVERT, aten._to_copy.default, aten.alias.default, aten.detach.default})
_LEVELS: Final = frozenset({octav.dequantize.default, octav.fake_quantize.default})
_SHAPES: Final = frozenset({aten.view.default, aten.permute.default})
_LINEAR: Final[dict[str, Any]] = {"stride": [], "padding": [], "dilation": [], "groups": 1}


def codes_in_forward(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits = []
    for target, operands_of in _FORMS.items():
        for node in gm.graph.find_nodes(op="call_function", target=target):
            operands = operands_of(node) if fake(node).device.type == "cpu" else None
            if operands is None or not _are_levels(operands["x"], operands["w"]):
                continue
            reason = _obstacle(node, operands)
            if reason is None:
                edits.append(Edit(node.name, "codes in forward", f"{list(fake(operands['w']).shape)}"))
                _rewrite(node, operands)
            else:
                edits.append(Edit.info(node.name, reason))
    return edits


def _mm(node: fx.Node) -> dict[str, Any] | None:
    call = arguments_of(node)
    return _linear(call["self"], call.mat2, None)


def _addmm(node: fx.Node) -> dict[str, Any] | None:
    call = arguments_of(node)
    return _linear(call.mat1, call.mat2, call["self"]) if call.beta == 1 and call.alpha == 1 else None


def _linear(left: fx.Node, right: fx.Node, bias: fx.Node | None) -> dict[str, Any] | None:
    """Return the operands of a matmul with a transposed weight, bias and window by their names in product_of_codes."""
    transposed = origin(right, _CASTS)
    if transposed.target is not aten.permute.default or arguments_of(transposed).dims != [1, 0]:
        return None
    w, x = origin(arguments_of(transposed)["self"], _CASTS), origin(left, _CASTS | {aten.view.default})
    return {"x": x, "w": w, "read": (left, right), "bias": bias, **_LINEAR}


def _convolution(node: fx.Node) -> dict[str, Any] | None:
    call = arguments_of(node)
    if call.transposed or fake(call.input).dim() != 4:
        return None
    x, w = origin(call.input, _CASTS), origin(call.weight, _CASTS)
    window = {name: call[name] for name in _LINEAR}
    return {"x": x, "w": w, "read": (call.input, call.weight), "bias": call.bias, **window}


_FORMS: Final = {aten.mm.default: _mm, aten.addmm.default: _addmm, aten.convolution.default: _convolution}


def _are_levels(x: fx.Node, w: fx.Node) -> bool:
    """Return whether x has one clip, and w one or one for each output channel, both on integer grids."""
    if x.target not in _LEVELS or w.target is not octav.fake_quantize.default:
        return False
    of_x, of_w = (spec_of(arguments_of(levels).spec).plain for levels in (x, w))
    return of_x is not None and of_w is not None and of_x[1] is None and of_w[1] in (None, 0)


def _obstacle(node: fx.Node, operands: dict[str, Any]) -> str | None:
    """Return why its levels are multiplied."""
    x, w, z, bias = (fake(value) for value in (operands["x"], operands["w"], node, operands["bias"] or node))
    if operands["bias"] is not None and bias.dim() != 1:
        return "what is added is no bias"
    if z.dim() == 2 and x.shape[-1] != w.shape[1]:
        return "rows of the matmul are no rows of the quantized tensor"
    layer = _layer(z, w, operands)
    return refusal(layer, _grid(operands["x"]), _grid(operands["w"]), z.dtype) or loss(layer, z.dtype)


def _grid(levels: fx.Node) -> Grid:
    return grid_of(arguments_of(levels).spec)


def _layer(z: Tensor, w: Tensor, operands: dict[str, Any]) -> Layer:
    rows, _, *places = (size_hint(size) for size in z.shape)
    for size in places:
        rows *= size
    return Layer(rows, tuple(w.shape), tuple(operands["padding"]), tuple(operands["dilation"]), operands["groups"])


def _rewrite(node: fx.Node, operands: dict[str, Any]) -> None:
    graph, of_x, of_w = node.graph, arguments_of(operands["x"]), arguments_of(operands["w"])
    if operands["x"].target is octav.dequantize.default:
        codes: fx.Node = of_x.codes
    else:
        with graph.inserting_before(operands["x"]):
            codes = insert_call(graph, octav.quantize.default, of_x)
    with graph.inserting_before(node):
        if fake(node).dim() == 2:
            codes = insert_aten(graph, aten.view.default, codes, [-1, fake(operands["w"]).shape[1]])
        weight = {"w": of_w.x, "w_clip": of_w.clip, "w_spec": of_w.spec}
        given = {"codes": codes, "clip": of_x.clip, "spec": of_x.spec, "dtype": fake(node).dtype}
        z = insert_call(graph, octav.product_of_codes.default, operands, weight, given)
    replace(node, z)
    for read in operands["read"]:
        erase_unread(read, _CASTS | _LEVELS | _SHAPES)
