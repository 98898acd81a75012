"""Multiply in bfloat16 in backward where one factor is codes, which bfloat16 holds exactly. If asked for.

    dx = convolution_backward(g, x, w)[0]  ->  dx = float32(convolution_backward(bfloat16(g * step_w), .., codes_w)[0])
    dw = convolution_backward(g, x, w)[1]  ->  dw = float32(convolution_backward(bfloat16(g), codes_x, ..)[1]) * step_x

    dx = g @ w                             ->  dx = float32(bfloat16(g * step_w) @ codes_w)
    dw = g.T @ x                           ->  dw = float32(bfloat16(g.T) @ codes_x) * step_x

where w and x are levels in float32, codes times a step. A step for each channel goes to the gradient where channels are
summed over, and else to the product. Weights and activations enter as they are, then; the gradient is rounded to
bfloat16 before the product, and the product after it, as under bf16 autocast. Sums are float32.

What has no finite value is NaN among the codes, as among the levels. The gradient of a bias becomes a sum of its own.
Grids whose codes bfloat16 does not hold stay, products of attention, and whatever is no levels: a layer left float.
"""

import operator
from typing import Final, NamedTuple

import torch
from torch import fx

from octav_fx.formats.spec import spec_of
from octav_fx.ir.calls import arguments_of, insert_call, update_arguments
from octav_fx.ir.edits import Edit, insert_aten
from octav_fx.ir.joint import CONVERT, COPIES, backward_of, erase_unread, origin, recompute_as, replace, results_of
from octav_fx.ir.meta import fake
from octav_fx.ops.product_of_codes.reference import grid_of

octav, aten = torch.ops.octav, torch.ops.aten

_LEVELS: Final = frozenset({octav.dequantize.default, octav.fake_quantize.default, octav.fake_quantize_filters.default})
_SHAPES: Final = frozenset({aten.permute.default, aten.view.default, *COPIES})
# bfloat16 holds every whole number up to here.
_EXACT: Final = 2**8


class _Factor(NamedTuple):
    """Levels as a product reads them, the call that wrote them, and the axis along which steps differ."""

    read: fx.Node
    levels: fx.Node
    axis: int | None


def bfloat16_backward(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    backward = backward_of(gm.graph)
    edits = []
    for target, rewrite in ((aten.convolution_backward.default, _convolution), (aten.mm.default, _matmul)):
        for node in gm.graph.find_nodes(op="call_function", target=target):
            # Forward's products are not in backward.
            if node in backward and fake(node.all_input_nodes[0]).dtype is torch.float32:
                edits += rewrite(node)
    return edits


def _convolution(node: fx.Node) -> list[Edit]:
    """Rewrite the gradients of a convolution whose other factor is levels; the call keeps the rest."""
    graph, call, results = node.graph, arguments_of(node), results_of(node)
    x, w = _factor(call.input), _factor(call.weight)
    # Output channels are summed over in dx; in dw nothing is that x could have steps along.
    of_index = {0: w if w and w.axis in (None, 0) else None, 1: x if x and x.axis is None else None}
    factors = {index: factor for index, factor in of_index.items() if factor and index in results}
    if call.transposed or not factors:
        return []
    with graph.inserting_before(node):
        # A call reads no more than the shape of the operand whose gradient it returns.
        operands = {"input": _half(call.input, x), "weight": _half(call.weight, w)}
        for index, factor in factors.items():
            g = _narrow(_times_step(call.grad_output, factor, 1))
            mask = [index == 0, index == 1, False]
            halves = insert_call(graph, node.target, call, operands, grad_output=g, output_mask=mask)  # type: ignore[arg-type]
            half = insert_aten(graph, operator.getitem, halves, index)
            replace(results[index], _product(half, factor, None))
        if set(results) <= {*factors, 2} and 2 in results:
            # Of the bias: for it alone the call would read levels.
            summed = [axis for axis in range(fake(call.grad_output).dim()) if axis != 1]
            replace(results[2], insert_aten(graph, aten.sum.dim_IntList, call.grad_output, summed))
    update_arguments(node, output_mask=[old and index not in factors for index, old in enumerate(call.output_mask)])
    if not node.users:
        graph.erase_node(node)
    return _done(node, tuple(factors.values()))


def _matmul(node: fx.Node) -> list[Edit]:
    """Rewrite a product of a gradient and levels, on either side."""
    call = arguments_of(node)
    left, right = _factor(call["self"]), _factor(call.mat2)
    factor = left or right
    if factor is None:
        return []
    with node.graph.inserting_before(node):
        # Summed over are the last axis of the left factor and the first of the right one.
        summed, other = (1, call.mat2) if factor is left else (0, call["self"])
        g = _narrow(_times_step(other, factor, 1 - summed) if factor.axis == summed else other)
        codes = _half(factor.read, factor)
        half = insert_aten(node.graph, aten.mm.default, *((codes, g) if factor is left else (g, codes)))
        new = _product(half, factor, None if factor.axis == summed else factor.axis)
    replace(node, new)
    return _done(node, (factor,))


def _factor(read: fx.Node) -> _Factor | None:
    """Return the levels that a product reads; None for anything else, and where their steps or codes do not suit."""
    levels = origin(read, _SHAPES)
    plain = spec_of(arguments_of(levels).spec).plain if levels.target in _LEVELS else None
    if plain is None or max(-plain[0].low, plain[0].high) > _EXACT:
        return None
    axis, node, turns = plain[1], read, []
    while node is not levels:
        turns.append(node)
        (node, *_) = node.all_input_nodes
    for turn in reversed(turns):
        source = turn.all_input_nodes[0]
        if axis is not None and turn.target is aten.permute.default:
            axis = list(arguments_of(turn).dims).index(axis)
        elif axis is not None and fake(turn).shape[: axis + 1] != fake(source).shape[: axis + 1]:
            return None
    return _Factor(read, levels, axis)


def _half(read: fx.Node, factor: _Factor | None) -> fx.Node:
    """Return what a product reads as bfloat16: the codes of levels, in the same shape."""
    if factor is None:
        return _narrow(read)
    if factor.levels.target is octav.dequantize.default:
        return _codes(read, factor.levels)
    # A quotient of a level and its step is the code but for two roundings in float32, and the code itself in bfloat16.
    step = _step(factor, fake(read).dim(), factor.axis)
    is_step = insert_aten(read.graph, aten.gt.Scalar, step, 0)
    divisor = insert_aten(read.graph, aten.where.ScalarOther, is_step, step, 1.0)
    return _narrow(insert_aten(read.graph, aten.div.Tensor, read, divisor))


def _codes(read: fx.Node, levels: fx.Node) -> fx.Node:
    """Return the codes that dequantize reads as bfloat16, through what is between it and what is read."""
    graph, call = read.graph, arguments_of(levels)
    if read is levels:
        # Where the clip is as many steps, levels are codes.
        clip, steps = fake(call.clip), float(grid_of(call.spec).steps)
        ones = insert_aten(graph, aten.full.default, list(clip.shape), steps, dtype=torch.float32)
        new = insert_call(graph, octav.dequantize.default, call, {"clip": ones, "dtype": torch.bfloat16})
    else:
        view = arguments_of(read)
        new = insert_call(graph, read.target, view, {"self": _codes(view["self"], levels)})  # type: ignore[arg-type]
    return recompute_as(levels, new)


def _times_step(g: fx.Node, factor: _Factor, axis: int) -> fx.Node:
    """Return the gradient times the steps of channels, which are along an axis of it; itself if there is one step."""
    return g if factor.axis is None else _times(g, factor, axis)


def _product(half: fx.Node, factor: _Factor, axis: int | None) -> fx.Node:
    """Return a product as float32, times the steps that its factors do not have in them."""
    wide = insert_aten(half.graph, CONVERT, half, torch.float32)
    return wide if factor.axis is not None and axis is None else _times(wide, factor, axis)


def _times(node: fx.Node, factor: _Factor, axis: int | None) -> fx.Node:
    return insert_aten(node.graph, aten.mul.Tensor, node, _step(factor, fake(node).dim(), axis))


def _step(factor: _Factor, dimensions: int, axis: int | None) -> fx.Node:
    """Return the step, or the steps along an axis of a tensor of so many dimensions."""
    graph, call = factor.read.graph, arguments_of(factor.levels)
    step = insert_aten(graph, aten.div.Tensor, call.clip, float(grid_of(call.spec).steps))
    if axis is None:
        return step
    shape = [-1 if i == axis else 1 for i in range(dimensions)]
    return insert_aten(graph, aten.view.default, step, shape)


def _narrow(node: fx.Node) -> fx.Node:
    return insert_aten(node.graph, CONVERT, node, torch.bfloat16)


def _done(node: fx.Node, factors: tuple[_Factor, ...]) -> list[Edit]:
    for factor in factors:
        erase_unread(factor.read, _LEVELS | _SHAPES)
    return [Edit(node.name, "backward in bfloat16", ", ".join(factor.levels.name for factor in factors))]
