"""Let the gradients that no pointwise kernel makes or reads be masked where they lie, on a GPU.

    codes = quantize(x, clip)                           codes = quantize(x, clip)
    g     = q @ w                                       g     = q @ w
    dx    = fake_quantize_backward(g, x, clip)    ->    zero_clipped_(g, codes)
    dw    = u.T @ dx                                    dw    = u.T @ g

on the joint graph of forward and backward, as save_codes leaves it, before mask_from_codes; for g and dx that matmuls
or attention write and read. No value changes. Inductor fuses a mask with what is pointwise around it, where it costs
the byte of the code; but between two kernels that are not Inductor's it would be one of its own, which reads the
gradient and writes it. Here that kernel writes the few elements that were clipped, and nothing else.

In the graph the call is a function, auto_functionalized: Inductor calls the op in place where nobody else reads g, and
copies g where somebody does. A CPU keeps the mask: its copies are in its caches.
"""

import operator
from typing import Any, Final

import torch
from torch import fx

from octav_fx.compat.graphs import auto_functionalized
from octav_fx.formats.spec import spec_of
from octav_fx.ir.calls import arguments_of
from octav_fx.ir.edits import Edit, insert_aten
from octav_fx.ir.joint import VIEWS, closure, gradients_of, origin, replace
from octav_fx.ir.meta import fake

octav, aten = torch.ops.octav, torch.ops.aten

# What shows a gradient in another shape, and copies nothing.
_SHAPES: Final = VIEWS - {aten.clone.default, aten._to_copy.default, torch.ops.prims.convert_element_type.default}
_MATMULS: Final = frozenset({aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default})
_SUMS: Final = frozenset({aten.sum.dim_IntList})


def mask_in_place(gm: fx.GraphModule, device: str = "cuda") -> list[Edit]:
    """See the module's docstring. Gradients on other devices are not looked at."""
    edits = []
    for codes in gm.graph.find_nodes(op="call_function", target=octav.quantize.default):
        call, form = arguments_of(codes), spec_of(arguments_of(codes).spec).format
        # A code that says that a ceiling was reached too is none from low to high.
        if fake(codes).device.type != device or call.ceiling is not None:
            continue
        for gradient in gradients_of(codes):
            if arguments_of(gradient).gradient == "pwl" and _stands_alone(gradient):
                edits.append(Edit(str(call.x), "mask in place", str(arguments_of(gradient).grad)))
                _mask(gradient, codes, form.low if form.signed else form.low - 1, form.high)
    return edits


def _stands_alone(gradient: fx.Node) -> bool:
    """Tell whether it would be a kernel of its own: nothing pointwise makes what is masked, or reads the result."""
    made, shown = origin(arguments_of(gradient).grad, _SHAPES), closure(gradient, _SHAPES)
    readers = [user for view in shown for user in view.users if user not in shown]
    # A gradient that is summed is read again for it, masked or not.
    return _is_a_call(made) and all(_is_a_call(reader) or reader.target in _SUMS for reader in readers)


def _is_a_call(node: fx.Node) -> bool:
    """Tell whether a node is a matmul, or attention's gradient or one of its results."""
    target: Any = node.all_input_nodes[0].target if node.target is operator.getitem else node.target
    name = str(target)
    return target in _MATMULS or ("attention" in name and "backward" in name)


def _mask(gradient: fx.Node, codes: fx.Node, low: int, high: int) -> None:
    graph, grad = gradient.graph, arguments_of(gradient).grad
    given = {"grad": grad, "codes": codes, "low": low, "high": high}
    with graph.inserting_before(gradient):
        called = insert_aten(graph, auto_functionalized, octav.zero_clipped_.default, **given)
        masked = insert_aten(graph, operator.getitem, called, 1)
    replace(gradient, masked)
