"""Multiply codes: convolutions and linear layers whose operands are both on grids.

    conv2d(quantizer(x), weight(), bias(), ...)  ->  integer_conv(codes, s, bits, signed, w, sw, shape, b, ...)
    linear(quantizer(x), weight(), bias())       ->  integer_linear(codes, s, bits, signed, w, sw, shape, b)

    codes = integer_codes(x, s, bits, signed)        uint8, one for each quantizer: on_codes.py
    s, w, sw, b = quantizer.scale, weight.codes, weight.scale, bias.codes

The sum of products of levels is s * sw times the sum of products of codes, which is exact. Codes are stored as they
were, and packed by the op when it first runs. What no kernel adds up exactly is computed by the op's definition, in
float64: an edit says so.
"""

from typing import Any

import torch
from torch import fx

from octav_fx.compat.tensors import pytree
from octav_fx.ir.arguments import argument, called_module
from octav_fx.ir.edits import Edit, erase_unused, site_of
from octav_fx.ir.meta import copy_meta
from octav_fx.ir.op import Op
from octav_fx.ir.ops import module_of, op_of
from octav_fx.ir.table.contractions import CONTRACTIONS
from octav_fx.nn import IntegerBias, IntegerWeight, StaticQuantizer
from octav_fx.nn.integer import integer_conv, integer_linear
from octav_fx.ops import onednn
from octav_fx.passes.convert.on_codes import grid_of, on_codes

_FUNCTIONS = {"linear": integer_linear, **dict.fromkeys(("conv1d", "conv2d", "conv3d"), integer_conv)}
# How the filters move.
_WINDOW = ("stride", "padding", "dilation")


def integer_layers(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring. One edit for each matmul and convolution, done or declined."""
    edits: list[Edit] = []
    for node in list(gm.graph.nodes):
        op = op_of(node)
        if op is None or op not in CONTRACTIONS:
            continue
        if (reason := _refusal(node, op)) is not None:
            edits.append(Edit.unsupported(node, reason))
            continue
        if (reason := _by_definition(node, op)) is not None:
            edits.append(Edit.unsupported(node, reason))
        else:
            edits.append(Edit(site_of(node), "multiply", "integers"))
        _rewrite(gm.graph, node, op)
    return edits


def _refusal(node: fx.Node, op: Op) -> str | None:
    """Return why a layer cannot multiply codes, or None."""
    if op.name not in _FUNCTIONS:
        return f"oneDNN has no {op.name} of two quantized operands"
    quantizer, weight = called_module(argument(node, "input")), called_module(argument(node, "weight"))
    if isinstance(quantizer, StaticQuantizer) and quantizer.dim is not None:
        return "a scale along an axis that is summed over"
    grid = grid_of(argument(node, "input"))
    if grid is None or not isinstance(weight, IntegerWeight):
        return "an operand is float"
    if weight.dim not in (None, 0):
        return "a scale along an axis that is summed over"
    if weight.dtype is not torch.float32:
        return f"computes in {weight.dtype}"
    if weight.codes.device.type != "cpu":
        return f"on {weight.codes.device}"
    for name in _WINDOW if op.spatial else ():
        size = _size(node, name, weight)
        if isinstance(size, str):
            return f"{name} {size!r}, more at one end than at the other"
        if any(isinstance(value, fx.Node) for value in pytree.tree_leaves(size)):
            return f"a {name} that the graph computes"
    return onednn.refusal(grid[0], onednn.largest_code(weight.integers()))


def _by_definition(node: fx.Node, op: Op) -> str | None:
    """Return why the op of a layer has no kernel for it, or None."""
    grid, weight = grid_of(argument(node, "input")), called_module(argument(node, "weight"))
    bias = called_module(argument(node, "bias"))
    assert grid is not None and isinstance(weight, IntegerWeight)
    known = (bias.codes, bias.fraction) if isinstance(bias, IntegerBias) else (None, 0)
    if not onednn.fits_sums(weight.integers(), *grid, *known):
        return "sums beyond 32 bits, exact in float64"
    if op.spatial:
        _, padding, dilation, _ = _window(node, op)
        if onednn.fits_into_padding(weight.shape[2:], padding, dilation):
            return "filters that fit into the padding, exact in float64"
    return None


def _rewrite(graph: fx.Graph, node: fx.Node, op: Op) -> None:
    stored, bias = argument(node, "weight"), argument(node, "bias")
    weight = module_of(stored)
    assert isinstance(weight, IntegerWeight)
    x = on_codes(argument(node, "input"))
    codes, fraction = _bias(graph, bias)
    with graph.inserting_before(node):
        w, w_scale = (graph.get_attr(f"{stored.target}.{kind}") for kind in ("codes", "scale"))
        operands = (x.codes, x.scale, x.bits, x.signed, w, w_scale, weight.shape, codes)
        new = graph.call_function(_FUNCTIONS[op.name], (*operands, *_window(node, op)), fraction)
    source = argument(node, "input")
    node.replace_all_uses_with(copy_meta(node, new))
    graph.erase_node(node)
    erase_unused(source, stored, bias)


def _bias(graph: fx.Graph, bias: Any) -> tuple[Any, dict[str, Any]]:
    """Return the node of a bias, of an integer one the codes, and what says where their point is."""
    module = called_module(bias)
    if not isinstance(module, IntegerBias):
        return bias, {}
    with graph.inserting_before(bias):
        return graph.get_attr(f"{bias.target}.codes"), {"fraction": module.fraction}


def _window(node: fx.Node, op: Op) -> tuple[Any, ...]:
    """Return stride, padding and dilation for each axis, and the groups of a convolution; nothing for another layer."""
    if not op.spatial:
        return ()
    weight = called_module(argument(node, "weight"))
    assert isinstance(weight, IntegerWeight)
    sizes = (_size(node, name, weight) for name in _WINDOW)
    spread = ([size] * op.spatial if isinstance(size, int) else list(size) for size in sizes)
    return (*spread, argument(node, "groups"))


def _size(node: fx.Node, name: str, weight: IntegerWeight) -> Any:
    """Return what an argument of the window says, a padding by its name in numbers where both ends have the same."""
    size = argument(node, name)
    if size == "valid":
        return 0
    dilation = argument(node, "dilation")
    if size != "same" or not isinstance(dilation, (int, tuple, list)):
        return size
    kernel = weight.shape[2:]
    each = [dilation] * len(kernel) if isinstance(dilation, int) else dilation
    if any(not isinstance(d, int) or d * (k - 1) % 2 for d, k in zip(each, kernel, strict=True)):
        return size
    return [d * (k - 1) // 2 for d, k in zip(each, kernel, strict=True)]
