"""Quantize all weights of a model at once, before its first layer, on a GPU: a launch instead of two for each weight.

On a graph for training or for inference, as the passes before leave it:

    c1 = optimal_clip(w1, h1)                    (ys, cs) = fake_quantize_weights([w1, w2, ..], [h1, h2, ..])
    y1 = fake_quantize(w1, c1)              ->   y1, c1   = ys[0], cs[:C1]             for forward
    ...                                          y1       = fake_quantize(w1, c1)      for backward, recomputed there
    c2 = optimal_clip(w2, h2)                    ...

Backward rounds each weight when it needs it, as before: it keeps the clips and no levels. Forward holds the levels of a
weight from the start to its layer, at a time when the activations are not there yet.
"""

import itertools
import operator

import torch
from torch import fx

from octav_fx.formats.spec import spec_of
from octav_fx.ir.calls import Arguments, arguments_of
from octav_fx.ir.edits import Edit, insert_aten
from octav_fx.ir.joint import VIEWS, backward_of
from octav_fx.ir.meta import fake

octav, aten = torch.ops.octav, torch.ops.aten

# Where the op has a kernel that takes all weights.
DEVICES = frozenset({"cuda"})


def fuse_weight_quantizers(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring. Weights on other devices are not looked at."""
    graph = gm.graph
    backward = backward_of(graph)
    alike: dict[tuple[str, torch.dtype | None], list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=octav.fake_quantize.default):
        if _is_weight(arguments_of(node)) and _is_read(node, backward):
            call = arguments_of(node)
            alike.setdefault((arguments_of(call.clip).method, call.dtype), []).append(node)
    return [
        edit
        for (method, dtype), nodes in alike.items()
        if len(nodes) > 1
        for edit in _gather(graph, nodes, method, dtype, backward)
    ]


def _is_weight(call: Arguments) -> bool:
    """Return whether it is solved and rounded by channel on a signed grid, from nothing but inputs of the graph."""
    w, clip = call.x, call.clip
    if clip.target is not octav.optimal_clip.default or not _is_by_channel(call):
        return False
    solve = arguments_of(clip)
    if solve.x is not w or any(source.op != "placeholder" for source in (w, solve.hint)):
        return False
    value = fake(w)
    return value.device.type in DEVICES and all(isinstance(size, int) for size in value.shape)


def _is_by_channel(call: Arguments) -> bool:
    plain = spec_of(call.spec).plain
    return plain is not None and plain[0].signed and plain[1] is not None


def _is_read(node: fx.Node, backward: set[fx.Node]) -> bool:
    """Return whether forward reads it, or a view of it."""
    forward = [user for user in node.users if user not in backward]
    return any(user.target not in VIEWS or _is_read(user, backward) for user in forward)


def _gather(
    graph: fx.Graph, nodes: list[fx.Node], method: str, dtype: torch.dtype | None, backward: set[fx.Node]
) -> list[Edit]:
    calls = [arguments_of(node) for node in nodes]
    clips = [call.clip for call in calls]
    weights, hints = [call.x for call in calls], [arguments_of(clip).hint for clip in clips]
    specs = [call.spec for call in calls]
    ends = list(itertools.accumulate(fake(clip).shape[0] for clip in clips))
    with graph.inserting_before(next(node for node in graph.nodes if node in clips)):
        both = insert_aten(graph, octav.fake_quantize_weights.default, weights, hints, specs, method, dtype)
        levels, parts = (insert_aten(graph, operator.getitem, both, i) for i in range(2))
        ys = [insert_aten(graph, operator.getitem, levels, i) for i in range(len(nodes))]
        own = [insert_aten(graph, aten.slice.Tensor, parts, 0, *bounds) for bounds in itertools.pairwise([0, *ends])]
    edits = [Edit(str(w), "gather", spec_of(spec).format.label) for w, spec in zip(weights, specs, strict=True)]
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
