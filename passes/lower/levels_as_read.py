"""Write levels in the dtype that their readers convert them to, as autocast has it, and read gradients as they come.

    y  = fake_quantize(w, clip)                     y  = fake_quantize(w, clip, bfloat16)
    z  = conv(x, y.to(bfloat16))              ->    z  = conv(x, y)
    dw = fake_quantize_backward(                    dw = fake_quantize_backward(
             g.to(float32), w, clip)                         g, w, clip)

    y  = dequantize(codes, clip, float32)     ->    y  = dequantize(codes, clip, bfloat16)
    z  = y.to(bfloat16) @ v                         z  = y @ v

on the graphs that save_codes leaves, where w or what the codes are of is float32; on a GPU the first form alone, as
Inductor makes one kernel of the others and the conversion there (write_out). No value changes: a level
is a product in float32 either way, and rounded once; float32 holds every number of half precision. What is saved is a
float32 copy of each weight, forward and backward, and of its gradient, written and read again: Inductor fuses no
conversion with an op of ours, which it does not look into.
"""

from typing import Final

import torch
from torch import fx

from octav_fx.ir.calls import arguments_of, insert_call, update_arguments
from octav_fx.ir.edits import Edit
from octav_fx.ir.joint import CONVERT, erase_unread, recompute_as, replace
from octav_fx.ir.meta import fake

octav = torch.ops.octav

_HALF = (torch.bfloat16, torch.float16)


# Where Inductor fuses no conversion with what computes the levels, or the gradient.
_CPU: Final = ("cpu",)


def levels_as_read(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring. Levels on other devices are not looked at."""
    graph = gm.graph
    edits = []
    for target, devices in ((octav.fake_quantize.default, ("cpu", "cuda")), (octav.dequantize.default, _CPU)):
        for levels in graph.find_nodes(op="call_function", target=target):
            dtype = _asked(levels)
            if dtype is not None and fake(levels).device.type in devices:
                edits.append(Edit(levels.name, "levels as read", str(dtype)))
                _write(levels, dtype)
    for gradient in graph.find_nodes(op="call_function", target=octav.fake_quantize_backward.default):
        converted = arguments_of(gradient).grad
        if _is_from_half(converted) and fake(converted).device.type in _CPU:
            source = arguments_of(converted).a
            edits.append(Edit(gradient.name, "gradient as it comes", str(source)))
            update_arguments(gradient, grad=source)
            erase_unread(converted, frozenset({CONVERT}))
    return edits


def _asked(levels: fx.Node) -> torch.dtype | None:
    """Return the one dtype of half precision that all readers of float32 levels convert them to, if there is one."""
    value = fake(levels)
    dtypes = {arguments_of(user).dtype if user.target is CONVERT else None for user in levels.users}
    fits = value.dtype is torch.float32 and len(dtypes) == 1
    (dtype,) = dtypes if fits else (None,)
    return dtype if dtype in _HALF else None


def _write(levels: fx.Node, dtype: torch.dtype) -> None:
    call = arguments_of(levels)
    with levels.graph.inserting_before(levels):
        new = insert_call(levels.graph, levels.target, call, dtype=dtype)  # type: ignore[arg-type]
    recompute_as(levels, new)
    for conversion in list(levels.users):
        replace(conversion, new)
    levels.graph.erase_node(levels)


def _is_from_half(node: fx.Node) -> bool:
    """Tell whether the node is float32 made of half precision."""
    if node.target is not CONVERT:
        return False
    source: fx.Node = arguments_of(node).a
    return fake(node).dtype is torch.float32 and fake(source).dtype in _HALF
