"""Write out the elementwise ops as what they are defined as, on a GPU, where Inductor fuses them with all around them.

    codes = quantize(x, clip)            step     = clip / steps
    y     = dequantize(codes, clip)  ->  quotient = divide(x, step)
                                         ...
                                         y        = where(.., nan, code * step).to(bfloat16)

on what the partitioner made of the joint graph: what is kept between forward and backward is decided by then. The right
side is the reference of the op (octav_fx/ops/*/reference.py), traced, with its divisions as calls of
octav_fx/ops/divide, and by one step as calls of octav_fx/ops/ratio; so no value changes, but for the sign of zeros:
levels of codes that are written here are computed from x. What is saved are launches and passes over memory: x is read
once, where it is computed, its conversion by autocast and those of codes and levels cost nothing.

A CPU keeps the ops: its passes are faster than what Inductor makes of them. So does a GPU that is not NVIDIA's, for
which divide has no code, a graph whose sizes the reference asks for, and, as ops, formats that are no grid, groups, and
scales that are rounded.
"""

import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, fx

from octav_fx.formats.grid import Grid
from octav_fx.formats.spec import Spec, spec_of
from octav_fx.ir import trace
from octav_fx.ir.calls import arguments_of, insert_call
from octav_fx.ir.edits import Edit
from octav_fx.ir.joint import replace
from octav_fx.ir.meta import fake
from octav_fx.ops.dequantize.reference import dequantize, levels_of
from octav_fx.ops.fake_quantize.reference import fake_quantize, fake_quantize_backward
from octav_fx.ops.learned_fake_quantize.reference import (
    learned_fake_quantize,
    learned_fake_quantize_backward,
    learned_parameter_backward,
)
from octav_fx.ops.quantize.reference import quantize

octav, aten = torch.ops.octav, torch.ops.aten

REFERENCES: Final[dict[Any, Callable[..., Tensor]]] = {
    octav.quantize.default: quantize,
    octav.dequantize.default: dequantize,
    octav.fake_quantize.default: fake_quantize,
    octav.fake_quantize_backward.default: fake_quantize_backward,
    octav.learned_fake_quantize.default: learned_fake_quantize,
    octav.learned_fake_quantize_backward.default: learned_fake_quantize_backward,
    octav.learned_parameter_backward.default: learned_parameter_backward,
}


def write_out(gm: fx.GraphModule, device: str = "cuda") -> list[Edit]:
    """See the module's docstring. Calls on other devices are not looked at."""
    if device == "cuda" and torch.version.hip is not None:
        return []
    edits = []
    # Levels before the codes that they are of.
    for node in reversed(list(gm.graph.nodes)):
        reference = REFERENCES.get(node.target)
        if reference is not None and fake(node).device.type == device:
            edits.append(_write_out(node, reference))
    return edits


def _write_out(node: fx.Node, reference: Callable[..., Tensor]) -> Edit:
    call = dict(arguments_of(node))
    if not _is_written(spec_of(call["spec"])):
        return Edit.info(str(node), f"{call['spec']} is rounded by its reference")
    tensors = [fake(value) for value in call.values() if isinstance(value, fx.Node)]
    if any(not isinstance(size, int) for value in tensors for size in value.shape) and _asks_for_sizes(node):
        return Edit.info(str(node), "its reference asks for sizes that are free")
    edit = Edit(node.name, "write out", str(node.target))
    if (of_codes := _of_codes(node)) is not None:
        reference, call = levels_of, of_codes
    trace.write_out(node, reference, call, _divide_exactly)
    return edit


def _is_written(spec: Spec) -> bool:
    """Tell whether a spec's rounding is arithmetic on each element and its clip, which Inductor generates well."""
    return isinstance(spec.format, Grid) and spec.scale == "float32" and spec.granularity.size is None


def _of_codes(node: fx.Node) -> dict[str, Any] | None:
    """Return the arguments of levels_of for levels of codes that the graph writes."""
    call = arguments_of(node)
    if node.target is not octav.dequantize.default or call.codes.target is not octav.quantize.default:
        return None
    written = arguments_of(call.codes)
    if (written.clip, written.spec) != (call.clip, call.spec):
        return None
    return {"x": written.x, "clip": call.clip, "spec": call.spec, "dtype": call.dtype}


def _asks_for_sizes(node: fx.Node) -> bool:
    return node.target is octav.learned_parameter_backward.default


def _divide_exactly(graph: fx.Graph) -> None:
    """Make divisions, by tensors or by powers of two, such that every device rounds to the nearest."""
    for division in graph.find_nodes(op="call_function", target=aten.div.Tensor):
        call = arguments_of(division)
        x, y = call["self"], call.other
        with graph.inserting_before(division):
            if isinstance(y, fx.Node) and fake(y).numel() == 1 and fake(y).dtype is torch.float32:
                exact = insert_call(graph, octav.ratio.default, x=x, step=y)
            elif isinstance(y, fx.Node):
                exact = insert_call(graph, octav.divide.default, x=x, y=y)
            else:
                assert isinstance(y, (int, float)) and math.frexp(y)[0] == 0.5
                exact = insert_call(graph, aten.mul.Tensor, {"self": x, "other": 1 / y})
        replace(division, exact)
