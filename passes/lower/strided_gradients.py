"""Compute gradients of strided depthwise convolutions in float32 where they are bfloat16, on a CPU.

    dx, dw, db = convolution_backward(g, x, w, .., stride, .., groups)
        ->  dx        = bfloat16(conv_transpose(float32(g), float32(w), .., stride, .., groups))
            _, dw, db = convolution_backward(g, x, w, .., stride, .., groups)       without dx

on the half of the graph that it is in, for as many groups as w has output channels and a stride above 1. The gradient
of a convolution with respect to its input is the transposed convolution with the same kernel. Values differ by their
rounding: they are rounded to bfloat16 once, here as there. oneDNN has no fast bfloat16 kernel for this one gradient:
the four of MobileNetV2 took 67 ms of a step of 140 with 16 images of 96 pixels, and take 2 here. What they are written
out as is float's own, so float is as slow there. Other devices and free sizes are not looked at.
"""

from typing import Any

import torch
from torch import fx

from octav_fx.ir.calls import Arguments, arguments_of, update_arguments
from octav_fx.ir.edits import Edit, insert_aten
from octav_fx.ir.joint import CONVERT, replace, results_of
from octav_fx.ir.meta import fake

aten = torch.ops.aten


def strided_gradients(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits = []
    for node in gm.graph.find_nodes(op="call_function", target=aten.convolution_backward.default):
        call, dx = arguments_of(node), results_of(node).get(0)
        if dx is None or not _applies(call):
            continue
        with gm.graph.inserting_before(node):
            wide = [insert_aten(gm.graph, CONVERT, part, torch.float32) for part in (call.grad_output, call.weight)]
            geometry = (call.stride, call.padding, call.dilation, True, _beyond(call), call.groups)
            gradient = insert_aten(gm.graph, aten.convolution.default, *wide, None, *geometry)
            new = insert_aten(gm.graph, CONVERT, gradient, torch.bfloat16)
        replace(dx, new)
        update_arguments(node, output_mask=[False, *call.output_mask[1:]])
        if not node.users:
            gm.graph.erase_node(node)
        edits.append(Edit(node.name, "strided gradient", f"{list(fake(call.input).shape)}"))
    return edits


def _applies(call: Arguments) -> bool:
    x, w = fake(call.input), fake(call.weight)
    is_depthwise = not call.transposed and call.groups == w.shape[0] == x.shape[1] > 1
    is_known = all(isinstance(size, int) for size in x.shape)
    return x.device.type == "cpu" and x.dtype is torch.bfloat16 and is_depthwise and max(call.stride) > 1 and is_known


def _beyond(call: Arguments) -> list[int]:
    """Return the rows and columns at the end of the input that no window reaches."""
    sizes: Any = (fake(value).shape[2:] for value in (call.input, call.grad_output, call.weight))
    windows = zip(*sizes, call.stride, call.padding, call.dilation, strict=True)
    return [n - ((m - 1) * s - 2 * p + d * (k - 1) + 1) for n, m, k, s, p, d in windows]
