"""Fake-quantize convolution weights straight into the layout that compiled convolutions on a CPU read.

    y  = fake_quantize(w, clip)                   ->  rows = w as [C, I, K]
    convolution(x, y)                                 y    = fake_quantize_filters(rows, clip)  as [C, I, *spatial]
    dw = fake_quantize_backward(g, w, clip)           convolution(x, y)
                                                      dw   = fake_quantize_filters_backward(g, rows, clip)  as w

on the joint graph of forward and backward, C output channels, I input channels, K = kernel positions. Values and codes
are the same; y lies in memory as [C, *spatial, I] and g may. Otherwise Inductor converts w before each quantizer,
forward and backward, and dw is converted back twice: four passes over all weights in each step.

Kernels of one position and depthwise kernels lie the same way in both layouts and stay as they are.
"""

import torch
from torch import Tensor, fx

from octav_fx.formats.spec import spec_of
from octav_fx.ir.calls import Arguments, arguments_of, insert_call, update_arguments
from octav_fx.ir.edits import Edit, insert_aten
from octav_fx.ir.joint import gradients_of, recompute_as, replace
from octav_fx.ir.meta import fake

octav, aten = torch.ops.octav, torch.ops.aten

_CONVOLUTIONS = frozenset({aten.convolution.default, aten.convolution_backward.default})


def filters_channels_last(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    # Where oneDNN does not run the convolutions, Inductor leaves their layout alone.
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return []
    graph = gm.graph
    edits = []
    for node in graph.find_nodes(op="call_function", target=octav.fake_quantize.default):
        call = arguments_of(node)
        is_filter = _is_by_filter(call) and all(user.target in _CONVOLUTIONS for user in node.users)
        if is_filter and call.x.op == "placeholder" and _applies(fake(call.x)):
            _rewrite(node, call)
            edits.append(Edit(str(call.x), "channels last", str(node)))
    return edits


def _is_by_filter(call: Arguments) -> bool:
    plain = spec_of(call.spec).plain
    return plain is not None and plain[1] == 0


def _applies(w: Tensor) -> bool:
    # as_strided below is for the strides of w as they are.
    return (
        w.device.type == "cpu" and w.dim() == 4 and w.is_contiguous() and w.shape[1] > 1 and w.shape[2] * w.shape[3] > 1
    )


def _rewrite(node: fx.Node, call: Arguments) -> None:
    graph, w, clip = node.graph, call.x, call.clip
    channels, inputs, *spatial = fake(w).shape
    positions = fake(w)[0, 0].numel()
    gradients = gradients_of(node)
    # The clip of a frozen quantizer is an input of the graph.
    solved = clip.target is octav.optimal_clip.default
    with graph.inserting_before(clip if solved else node):
        # Not view: Inductor wants whatever a convolution is computed from channels last, but leaves inputs of
        # as_strided as they are.
        shape, strides = [channels, inputs, positions], [inputs * positions, positions, 1]
        rows = insert_aten(graph, aten.as_strided.default, w, shape, strides)
    if solved:
        update_arguments(clip, x=rows)
    with graph.inserting_before(node):
        quantized = insert_call(graph, octav.fake_quantize_filters.default, call, filters=rows)
        shaped = insert_aten(graph, aten.view.default, quantized, [channels, *spatial, inputs])
        y = insert_aten(graph, aten.permute.default, shaped, [0, 3, 1, 2])
    for new in (quantized, shaped, y):
        recompute_as(node, new)
    replace(node, y)
    for gradient in gradients:
        with graph.inserting_before(gradient):
            asked = arguments_of(gradient)
            flat = insert_call(graph, octav.fake_quantize_filters_backward.default, asked, filters=rows)
            dw = insert_aten(graph, aten.view.default, flat, list(fake(w).shape))
        replace(gradient, dw)
