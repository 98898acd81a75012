"""Keep integer codes for backward, or nothing: never the float copy that a fake-quantizer makes.

On the joint graph of forward and backward, as split_quantizers leaves it:

    y = fake_quantize(x, clip)  ->  codes = quantize(x, clip)
                                    y     = dequantize(codes, clip)     recomputed in backward

    y = fake_quantize(w, clip)  ->  y     = fake_quantize(w, clip)      recomputed in backward

The first form holds one byte for each element, and neither x nor y. It is for what backward asks about: y, or, for the
gradient of the quantizer, whether x lies beyond the clip (mask_from_codes). The second holds nothing: w is an input of
the graph (a weight) and there anyway, or its gradient needs its value (MAD of an activation). dequantize(quantize(x))
is fake_quantize(x), so no value changes.

AOTAutograd would otherwise keep y: it is cheaper to save than to recompute by its own measure. In a graph for inference
nothing is kept, and everything stays as it is.
"""

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from octav_fx.formats.spec import spec_of
from octav_fx.ir.calls import arguments_of, insert_call
from octav_fx.ir.edits import Edit
from octav_fx.ir.joint import COPIES, VIEWS, backward_of, closure, gradients_of, origin, replace
from octav_fx.ir.meta import fake

octav, aten = torch.ops.octav, torch.ops.aten


def save_codes(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    backward = backward_of(gm.graph)
    edits = []
    for levels in gm.graph.find_nodes(op="call_function", target=octav.fake_quantize.default):
        call = arguments_of(levels)
        is_read = any(backward.intersection(view.users) for view in closure(levels, VIEWS))
        gradients = gradients_of(levels)
        is_there = origin(call.x, VIEWS).op == "placeholder" or (call.gradient == "mad" and bool(gradients))
        if not is_there and (is_read or gradients):
            levels = _to_codes(levels)
            edits.append(Edit(str(call.x), "save codes", spec_of(call.spec).format.label))
        if is_read and tag_levels(levels) and is_there:
            edits.append(Edit(str(call.x), "recompute", spec_of(call.spec).format.label))
    return edits


def _to_codes(levels: fx.Node) -> fx.Node:
    """Put codes and their levels in place of fake_quantize, and return the levels."""
    graph, call = levels.graph, arguments_of(levels)
    with graph.inserting_before(levels):
        # Codes tell whether a ceiling was reached: that is what the gradient of a relu6 asks.
        ceiling = None if spec_of(call.spec).format.signed else _ceiling_of(call.x)
        codes = insert_call(graph, octav.quantize.default, call, ceiling=ceiling)
        dtype = fake(call.x).dtype
        new = insert_call(graph, octav.dequantize.default, call, codes=codes, dtype=dtype)
    replace(levels, new)
    return new


def tag_levels(levels: fx.Node) -> bool:
    """Have backward compute levels and views of them again; return whether that is new."""
    # The id says which checkpointed region of the user's a node belongs to; ours are no regions.
    tags = {"recompute": CheckpointPolicy.MUST_RECOMPUTE, "ac_graph_id": 0}
    untagged = [view for view in closure(levels, VIEWS) if not tags.items() <= view.meta.items()]
    for view in untagged:
        view.meta.update(tags)
    return bool(untagged)


def _ceiling_of(x: fx.Node) -> float | None:
    """Return the upper bound of the clamp from 0 (relu6, hardtanh) that x comes from, if it does."""
    top = origin(x, COPIES)
    if top.target is not aten.clamp_max.default:
        return None
    bound, bottom = arguments_of(top).max, arguments_of(top)["self"]
    is_clamp = bottom.target is aten.clamp_min.default and arguments_of(bottom).min == 0
    return float(bound) if is_clamp and isinstance(bound, (int, float)) and bound > 0 else None
