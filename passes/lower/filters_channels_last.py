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

from typing import Any

import torch
from torch import Tensor, fx

from octav_fx.ir.edits import Edit, insert_aten

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
        w, per_output_channel = node.args[0], node.args[4] == 0
        assert isinstance(w, fx.Node)
        is_filter = per_output_channel and all(user.target in _CONVOLUTIONS for user in node.users)
        if is_filter and w.op == "placeholder" and _applies(w.meta["val"]):
            _rewrite(graph, node, w)
            edits.append(Edit(str(w), "channels last", str(node)))
    return edits


def _applies(w: Tensor) -> bool:
    # as_strided below is for the strides of w as they are.
    return (
        w.device.type == "cpu" and w.dim() == 4 and w.is_contiguous() and w.shape[1] > 1 and w.shape[2] * w.shape[3] > 1
    )


def _rewrite(graph: fx.Graph, node: fx.Node, w: fx.Node) -> None:
    _, clip, bits, signed, *_ = node.args
    assert isinstance(clip, fx.Node)
    channels, inputs, *spatial = w.meta["val"].shape
    positions = w.meta["val"][0, 0].numel()
    # The clip of a frozen quantizer is an input of the graph.
    solved = clip.target is octav.optimal_clip.default
    with graph.inserting_before(clip if solved else node):
        # Not view: Inductor wants whatever a convolution is computed from channels last, but leaves inputs of
        # as_strided as they are.
        rows = insert_aten(
            graph,
            aten.as_strided.default,
            w,
            [channels, inputs, positions],
            [inputs * positions, positions, 1],
        )
    if solved:
        clip.update_arg(0, rows)
    with graph.inserting_before(node):
        quantized = insert_aten(graph, octav.fake_quantize_filters.default, rows, clip, bits, signed)
        shaped = insert_aten(graph, aten.view.default, quantized, [channels, *spatial, inputs])
        y = insert_aten(graph, aten.permute.default, shaped, [0, 3, 1, 2])
    _keep_tags(node, (quantized, shaped, y))
    node.replace_all_uses_with(y)
    graph.erase_node(node)
    for gradient in [u for u in clip.users if u.target is octav.fake_quantize_backward.default]:
        g, _, _, _, _, kind = gradient.args
        with graph.inserting_before(gradient):
            flat = insert_aten(graph, octav.fake_quantize_filters_backward.default, g, rows, clip, signed, kind)
            dw = insert_aten(graph, aten.view.default, flat, list(w.meta["val"].shape))
        gradient.replace_all_uses_with(dw)
        graph.erase_node(gradient)


def _keep_tags(source: fx.Node, targets: tuple[fx.Node, ...]) -> None:
    """What save_codes said about recomputing holds for what the node became."""
    tags: dict[str, Any] = {k: source.meta[k] for k in ("recompute", "ac_graph_id") if k in source.meta}
    for target in targets:
        target.meta.update(tags)
