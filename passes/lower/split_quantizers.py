"""Split quantizers into the solve of the clip and the rounding: what the other passes of this folder are about.

    y, clip = dynamic_fake_quantize(x, hint)  ->  clip = optimal_clip(x, hint)
                                                  y    = fake_quantize(x, clip)

on graphs for training and for inference: the left side is defined as the right one. Inductor has both ops write into
memory that it has planned. It has dynamic_fake_quantize, which returns two tensors, allocate them.

A frozen quantizer, or one whose clip all ranks share, is a fake_quantize already. The gradient asks for x and clip
under these names.
"""

import torch
from torch import fx

import octav_fx.ops  # noqa: F401  registers torch.ops.octav
from octav_fx.formats.spec import spec_of
from octav_fx.ir.calls import arguments_of, insert_call
from octav_fx.ir.edits import Edit
from octav_fx.ir.joint import replace, results_of

octav = torch.ops.octav


def split_quantizers(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    graph = gm.graph
    edits = []
    for node in graph.find_nodes(op="call_function", target=octav.dynamic_fake_quantize.default):
        call, results = arguments_of(node), results_of(node)
        with graph.inserting_before(node):
            clip = insert_call(graph, octav.optimal_clip.default, call)
            if 0 in results:
                replace(results[0], insert_call(graph, octav.fake_quantize.default, call, clip=clip))
        if 1 in results:
            replace(results[1], clip)
        graph.erase_node(node)
        edits.append(Edit(str(call.x), "split", spec_of(call.spec).format.label))
    return edits
