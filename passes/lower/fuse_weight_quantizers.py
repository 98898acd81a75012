"""Quantize all weights of a model at once, before its first layer, on a GPU: a launch instead of two for each weight.

On the joint graph of forward and backward, as the passes before leave it (there is no such graph for inference):

    c1 = optimal_clip(w1, h1)                    (ys, cs) = fake_quantize_weights([w1, w2, ..], [h1, h2, ..])
    y1 = fake_quantize(w1, c1)              ->   y1, c1   = ys[0], cs[:C1]             for forward
    ...                                          y1       = fake_quantize(w1, c1)      for backward, recomputed there
    c2 = optimal_clip(w2, h2)                    ...

Backward rounds each weight when it needs it, as before: it keeps the clips and no levels. Forward holds the levels of a
weight from the start to its layer, at a time when the activations are not there yet.
"""

import itertools
import operator
from typing import Any

import torch
from torch import fx

from octav_fx.ir.edits import Edit, insert_aten
from octav_fx.passes.lower.save_codes import VIEWS, backward_of

octav, aten = torch.ops.octav, torch.ops.aten


def fuse_weight_quantizers(gm: fx.GraphModule, device: str = "cuda") -> list[Edit]:
    """See the module's docstring. Weights on other devices are not looked at."""
    graph = gm.graph
    backward = backward_of(graph)
    by_method: dict[Any, list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=octav.fake_quantize.default):
        if _is_weight(node, device) and _is_read(node, backward):
            by_method.setdefault(node.args[1].args[5], []).append(node)
    return [edit for nodes in by_method.values() if len(nodes) > 1 for edit in _gather(graph, nodes, backward)]


def _is_weight(node: fx.Node, device: str) -> bool:
    """Whether it is solved and rounded by channel on a signed grid, and all it takes are inputs of the graph."""
    w, clip, _, signed, dim, _ = node.args
    solved = isinstance(clip, fx.Node) and clip.target is octav.optimal_clip.default and clip.args[0] is w
    if not solved or dim is None or not signed:
        return False
    inputs: list[Any] = [w, clip.args[1]]  # type: ignore[union-attr]
    fixed = all(isinstance(size, int) for size in inputs[0].meta["val"].shape)
    return fixed and all(i.op == "placeholder" for i in inputs) and inputs[0].meta["val"].device.type == device


def _is_read(node: fx.Node, backward: set[fx.Node]) -> bool:
    """Whether forward reads it, or a view of it."""
    forward = [user for user in node.users if user not in backward]
    return any(user.target not in VIEWS or _is_read(user, backward) for user in forward)


def _gather(graph: fx.Graph, nodes: list[fx.Node], backward: set[fx.Node]) -> list[Edit]:
    clips: list[Any] = [node.args[1] for node in nodes]
    weights, hints = [node.args[0] for node in nodes], [clip.args[1] for clip in clips]
    bits, dims = [node.args[2] for node in nodes], [node.args[4] for node in nodes]
    ends = list(itertools.accumulate(clip.meta["val"].shape[0] for clip in clips))
    with graph.inserting_before(next(node for node in graph.nodes if node in clips)):
        method = clips[0].args[5]
        both = insert_aten(graph, octav.fake_quantize_weights.default, weights, hints, bits, dims, method)
        levels, parts = (insert_aten(graph, operator.getitem, both, i) for i in range(2))
        ys = [insert_aten(graph, operator.getitem, levels, i) for i in range(len(nodes))]
        own = [insert_aten(graph, aten.slice.Tensor, parts, 0, *bounds) for bounds in itertools.pairwise([0, *ends])]
    edits = [Edit(str(w), "gather", f"{b} bits") for w, b in zip(weights, bits, strict=True)]
    for node, y in zip(nodes, ys, strict=True):
        _take_forward(graph, node, y, backward)
    for clip, part in zip(clips, own, strict=True):
        clip.replace_all_uses_with(part)
    for clip in dict.fromkeys(clips):
        graph.erase_node(clip)
    return edits


def _take_forward(graph: fx.Graph, node: fx.Node, y: fx.Node, backward: set[fx.Node]) -> None:
    """Let forward read y, and backward what it read: the node, which is erased if nobody is left."""
    for user in list(node.users):
        if user in backward:
            continue
        if user.target in VIEWS:
            with graph.inserting_before(user):
                view = graph.node_copy(user, {node: y}.__getitem__)
            # Forward's needs not be recomputed.
            view.meta = {key: value for key, value in user.meta.items() if key not in ("recompute", "ac_graph_id")}
            _take_forward(graph, user, view, backward)
            if not view.users:
                graph.erase_node(view)
        else:
            user.replace_input_with(node, y)
    if not node.users:
        graph.erase_node(node)
