"""Ask a value itself whether it was clipped, where backward has what the value is computed from.

    u     = ...                                         u     = ...
    x     = gelu(u)                                     x     = gelu(u)               recomputed in backward
    codes = quantize(x, clip)                           codes = quantize(x, clip)
    dx    = fake_quantize_backward(g, x, clip)    ->    dx    = where(abs(x) <= clip, g, 0)
    du    = gelu_backward(dx, u)                        du    = gelu_backward(dx, u)

on the joint graph of forward and backward, as save_codes leaves it, on a GPU: the gradient of gelu reads u anyway, that
of a layer norm what it normalized, and computing x from it again takes no memory. Where levels are kept (keep_levels),
nobody else reads the codes in backward, and they are never written: 2 bytes less for each element, else up to 1.

The value is computed in another kernel than in forward. Should a compiler round its last bit otherwise there, what lies
within that bit of the clip passes in one and not in the other.

The mask of a grid without negative values stays with its codes, which answer for the relu before it as well.
"""

from typing import Final

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from octav_fx.compat.graphs import size_hint
from octav_fx.formats.spec import spec_of
from octav_fx.ir.calls import arguments_of
from octav_fx.ir.edits import Edit, insert_aten
from octav_fx.ir.joint import CONVERT, backward_of, gradients_of, is_pointwise, replace
from octav_fx.ir.meta import fake

octav, aten = torch.ops.octav, torch.ops.aten

# So many times smaller than x is small beside it: the mean of each row of a layer norm.
_SMALL: Final = 8


def mask_from_value(gm: fx.GraphModule, device: str = "cuda") -> list[Edit]:
    """See the module's docstring. Gradients on other devices are not looked at."""
    backward = backward_of(gm.graph)
    edits = []
    for codes in gm.graph.find_nodes(op="call_function", target=octav.quantize.default):
        call, spec = arguments_of(codes), spec_of(arguments_of(codes).spec)
        if fake(codes).device.type != device or spec.granularity.axis is not None or not spec.format.signed:
            continue
        gradients = [node for node in gradients_of(codes) if arguments_of(node).gradient == "pwl"]
        path = _path(call.x, _read_by(backward.difference(gradients_of(codes)), call.x))
        if not gradients or path is None:
            continue
        for gradient in gradients:
            _mask(gradient)
        for node in path:
            node.meta.setdefault("recompute", CheckpointPolicy.MUST_RECOMPUTE)
            node.meta.setdefault("ac_graph_id", 0)
        edits.append(Edit(str(call.x), "mask from value", f"{len(path)} recomputed"))
    return edits


def _read_by(backward: set[fx.Node], x: fx.Node) -> set[fx.Node]:
    """Return what backward reads, and what that is computed from, pointwise and not through x: some of it is kept."""
    asked = [source for node in backward for source in node.all_input_nodes]
    found = set(asked) - {x}
    while asked:
        node = asked.pop()
        if node not in found or not is_pointwise(node):
            continue
        sources = set(node.all_input_nodes) - found - {x}
        found |= sources
        asked += sources
    return found


def _path(x: fx.Node, at_hand: set[fx.Node]) -> list[fx.Node] | None:
    """Return what computes x from values at hand, pointwise; None where that takes more."""
    path, asked = [x], [x]
    while asked:
        node = asked.pop()
        if not is_pointwise(node):
            return None
        for source in node.all_input_nodes:
            if source not in path and source not in at_hand and not _is_small(source, x):
                path.append(source)
                asked.append(source)
    return path


def _is_small(node: fx.Node, x: fx.Node) -> bool:
    """Tell whether keeping a node costs little beside x, or nothing as it is an input."""
    return node.op == "placeholder" or _SMALL * size_hint(fake(node).numel()) <= size_hint(fake(x).numel())


def _mask(gradient: fx.Node) -> None:
    """Replace the gradient of a fake-quantizer by its definition, which Inductor fuses with what computes x."""
    graph, call = gradient.graph, arguments_of(gradient)
    grad = fake(call.grad)
    with graph.inserting_before(gradient):
        value = insert_aten(graph, CONVERT, call.x, torch.float32)
        inside = insert_aten(graph, aten.le.Tensor, insert_aten(graph, aten.abs.default, value), call.clip)
        zero = insert_aten(graph, aten.full.default, [], 0.0, dtype=grad.dtype, device=grad.device)
        masked = insert_aten(graph, aten.where.self, inside, call.grad, zero)
    replace(gradient, masked)
