"""Joint graphs of forward and backward as Inductor gets them: made, lowered, run and partitioned."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._inductor.decomposition import select_decomp_table
from torch.nn import functional as F

from octav_fx.formats.spec import integers
from octav_fx.ir.edits import Edit
from octav_fx.ir.pipeline import run
from octav_fx.ops.dynamic_fake_quantize.op import dynamic_fake_quantize

aten = torch.ops.aten


def joint(function: Callable[..., Any], *inputs: Tensor, trace_joint: bool = True) -> fx.GraphModule:
    """The graph of forward and backward that AOTAutograd hands to Inductor; it takes the inputs, then gradients."""
    gm: fx.GraphModule = aot_export_joint_simple(
        function, inputs, trace_joint=trace_joint, decompositions=select_decomp_table()
    )
    gm.graph.set_codegen(fx.graph.CodeGen())
    gm.recompile()
    return gm


def lower(gm: fx.GraphModule, *passes: Any) -> list[Edit]:
    """Run passes as Inductor does, while it knows by which mode the values of the graph are fake."""
    mode = detect_fake_mode([node.meta.get("val") for node in gm.graph.nodes if node.op == "placeholder"])
    with tracing(TracingContext(mode)):
        return run(gm, passes)


def results(gm: fx.GraphModule, inputs: tuple[Tensor, ...]) -> list[Tensor | None]:
    """Outputs and gradients on these inputs, and gradients of the outputs as they come."""
    tangents = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder") if "tangents" in str(node.target)]
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(value.shape, generator=generator).to(value.dtype) for value in tangents]
    with torch.no_grad():
        return list(gm(*inputs, *gradients))


def unchanged(gm: fx.GraphModule, inputs: tuple[Tensor, ...], *passes: Any) -> list[Edit]:
    """Run the passes, which must change no output and no gradient."""
    before = results(gm, inputs)
    edits = lower(gm, *passes)
    for found, expected in zip(results(gm, inputs), before, strict=True):
        assert (found is None and expected is None) or torch.equal(found, expected)
    return edits


def kept(gm: fx.GraphModule, outputs: int = 1) -> dict[str, torch.dtype]:
    """What the partitioner keeps for backward, besides the inputs, and its dtype."""
    forward, _ = min_cut_rematerialization_partition(gm, None, num_fwd_outputs=outputs)
    (output,) = forward.graph.find_nodes(op="output")
    saved = [without_views(node) for node in output.args[0][outputs:]]
    return {node.name: node.meta["val"].dtype for node in saved if node.op != "placeholder"}


def without_views(node: fx.Node) -> fx.Node:
    while node.target in (aten.permute.default, aten.alias.default):
        node = node.args[0]
    return node


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def quantized(x: Tensor, hint: Tensor, bits: int = 4, signed: bool = True, gradient: str = "pwl") -> Tensor:
    return dynamic_fake_quantize(x, hint, integers(bits, signed, None), "octav", gradient)[0]


def weight(w: Tensor, hint: Tensor, bits: int = 4) -> Tensor:
    return dynamic_fake_quantize(w, hint, integers(bits, True, 0), "octav", "mad")[0]


def linear(**spec: Any) -> Callable[..., Any]:
    """A linear layer of a quantized activation that is computed and may be negative, and a float weight."""
    return lambda x, u, w, hint: (F.linear(quantized(x @ u, hint, **spec), w),)


def after_relu(x: Tensor, u: Tensor, w: Tensor, hint: Tensor) -> tuple[Tensor]:
    """One of an activation that is unsigned, as it comes from a relu."""
    return (F.linear(quantized((x @ u).relu(), hint, signed=False), w),)


def layer_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, a float layer that makes values on both sides of zero and beyond the clip, w, and a hint."""
    return leaf(7, 30), leaf(30, 30), leaf(4, 30), torch.ones(())


def codes_of(gm: fx.GraphModule) -> list[fx.Node]:
    return gm.graph.find_nodes(op="call_function", target=torch.ops.octav.quantize.default)


def targets(gm: fx.GraphModule) -> set[Any]:
    return {node.target for node in gm.graph.nodes}


def tagged(gm: fx.GraphModule) -> dict[str, Any]:
    return {node.name: node.meta["recompute"] for node in gm.graph.nodes if "recompute" in node.meta}
