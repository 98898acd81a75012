"""Write the gradient of one part of a tensor by a slice, on a GPU, so that no part is read for the others.

    zeros = full(shape, 0)                            zeros = full(shape, 0)
    dx    = select_scatter(zeros, g, dim, i)    ->    dx    = slice_scatter(zeros, unsqueeze(g, dim), dim, i, i + 1)

on the half of the graph that it is in. The left side is what AOTAutograd makes of the gradient of x[i], the right side
the same values. For select_scatter Inductor computes g for all elements of dx and then takes zero for most of them, for
slice_scatter it reads g only where it lies. nn.MultiheadAttention takes query, key and value out of one tensor, whose
gradient is the sum of three such dx: for each part the kernel read the gradients of all three, and the values that they
are masked by. In ViT-B/16 on an H200 it took 194 us of each layer. The slices read each for its own part.

Parts that chunk, split and unbind make have no such sum: their gradient is a cat. On a CPU the slices take 1.3 times
as long.
"""

import torch
from torch import fx

from octav_fx.ir.calls import arguments_of
from octav_fx.ir.edits import Edit, insert_aten
from octav_fx.ir.joint import replace
from octav_fx.ir.meta import fake

aten = torch.ops.aten


def select_gradients(gm: fx.GraphModule, device: str = "cuda") -> list[Edit]:
    """See the module's docstring. Gradients on other devices are not looked at."""
    edits = []
    for node in gm.graph.find_nodes(op="call_function", target=aten.select_scatter.default):
        call = arguments_of(node)
        # What forward writes into a value stays: Inductor writes it in place, and knows it by its select.
        is_gradient = call["self"].target is aten.full.default
        if not is_gradient or fake(node).device.type != device or not isinstance(call.index, int):
            continue
        with gm.graph.inserting_before(node):
            part = insert_aten(gm.graph, aten.unsqueeze.default, call.src, call.dim)
            # Behind the last part, -1, lies no 0.
            end = call.index + 1 or None
            new = insert_aten(gm.graph, aten.slice_scatter.default, call["self"], part, call.dim, call.index, end)
        edits.append(Edit(node.name, "select gradient", f"{list(fake(node).shape)}"))
        replace(node, new)
    return edits
