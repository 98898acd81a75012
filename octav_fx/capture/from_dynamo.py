"""Graphs that torch.compile hands to its backends, made to look like captured ones, and back.

In a Dynamo graph every parameter and buffer is a placeholder, values are in meta["example_value"], and a module's own
state cannot be added: state comes in as one more placeholder.
"""

import contextlib
import operator
import re
import sys
from types import FrameType
from typing import Any, Final

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from octav_fx.capture.integer_module import IntegerModule
from octav_fx.capture.modules import QuantizedModule
from octav_fx.capture.partial import PartialModule
from octav_fx.capture.whole import WholeModule
from octav_fx.compat.graphs import (
    FUSED_ENCODER_LAYER,
    copy_dynamo_names,
    copy_dynamo_source,
    dynamo_source,
    locals_of_traced_frame,
    root_of,
    without_dynamo_source,
)
from octav_fx.compat.modules import CALL_CODE
from octav_fx.compat.tensors import FakeTensor, is_higher_order, pytree
from octav_fx.ir.arguments import module_input
from octav_fx.ir.dataflow import state_only, tensor_flow
from octav_fx.ir.edits import Edit
from octav_fx.ir.macs import MacCounter
from octav_fx.ir.meta import State, fake, update
from octav_fx.ir.ops import module_of, op_of
from octav_fx.ir.table.contractions import CONTRACTIONS
from octav_fx.nn import FakeQuantizer, as_autocast
from octav_fx.nn.fake_quantizer import QUANTIZERS

# Python functions of torch that Dynamo leaves in the graph as one call, with matrix multiplications inside.
_COMPOSITES: Final = (F.multi_head_attention_forward,)

# As Dynamo writes the call, and as it is written where overloads are resolved.
_QUANTIZERS: Final = frozenset(
    spelling
    for packet in (
        torch.ops.octav.dynamic_fake_quantize,
        torch.ops.octav.fake_quantize,
        torch.ops.octav.learned_fake_quantize,
    )
    for spelling in (packet, packet.default)
)

# L['self']._modules['layer1']._modules['0']._parameters['weight']
_STATE_SOURCE = re.compile(r"\._(?:parameters|buffers)\['[^']*'\]$")
_PATH = re.compile(r"\._(?:modules|parameters|buffers)\['([^']*)'\]")


def has_quantizers(gm: fx.GraphModule) -> bool:
    """Tell whether the user quantized the model, or a part of it, before compiling it."""
    return any(node.target in _QUANTIZERS for node in gm.graph.nodes)


def is_within_quantized() -> bool:
    """Tell whether Dynamo compiles code of a quantized or converted module: what is float there is so on purpose.

    Where the user's Python breaks the graph, pieces of it have no quantizer in them, and functions that it calls are
    compiled without the module among their variables: it is that of a call further up.
    """
    local = locals_of_traced_frame()
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is CALL_CODE:
            local.append(frame.f_locals["self"])
        frame = frame.f_back
    modules = [module for value in local if isinstance(value, nn.Module) for module in value.modules()]
    return any(isinstance(module, (QuantizedModule, WholeModule, PartialModule, IntegerModule)) for module in modules)


def from_dynamo(gm: fx.GraphModule) -> fx.GraphModule:
    """Copy a graph of Dynamo, with names on parameters, the work of unknown calls, and a place for quantizers."""
    gm = _copy(gm)
    for node in gm.graph.nodes:
        if node.op == "placeholder" and (name := _state_name(node)) is not None:
            update(node, state=State(name, "._parameters[" in dynamo_source(node)))
        # L['self'].encoder.layers.0
        stack = node.meta.get("nn_module_stack") or {}
        node.meta["nn_module_stack"] = {k: (v[0].partition(".")[2], v[1]) for k, v in stack.items()}
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target in _COMPOSITES:
            _expand(gm.graph, node)
    for node in gm.graph.nodes:
        update(node, macs=_macs(node))
    gm.add_submodule(QUANTIZERS, nn.Module())
    return gm


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """Copy a graph of Dynamo, which reads its own again after the backend."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(gm.graph, copies))
    copied = fx.GraphModule(gm, graph)
    copied.meta = dict(gm.meta)
    copy_dynamo_names(gm, copied)
    for original, node in copies.items():
        copy_dynamo_source(original, node)
    return copied


def _expand(graph: fx.Graph, node: fx.Node) -> None:
    """Replace a call of a composite function by the aten ops that it makes."""
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    nodes = list(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, fx.Node)))
    target: Any = node.target

    def call(*values: Any) -> Any:
        by_node = dict(zip(nodes, values, strict=True))
        args, kwargs = pytree.tree_unflatten([by_node.get(leaf, leaf) for leaf in leaves], spec)
        return target(*args, **kwargs)

    # Before autograd and decompositions: linear layers and fused attention are still one op each.
    body = make_fx(call, pre_dispatch=True)(*map(fake, nodes)).graph
    copies = dict(zip(body.find_nodes(op="placeholder"), nodes, strict=True))
    with graph.inserting_before(node):
        result = graph.graph_copy(body, copies)
    for original, copied in copies.items():
        if original.op == "call_function":
            copied.meta = {"example_value": fake(original), "nn_module_stack": node.meta["nn_module_stack"]}
    for reader in list(node.users):
        # The result is a tuple of nodes, and no node itself.
        index: Any = reader.args[1]
        assert reader.target is operator.getitem and isinstance(result, (tuple, list))
        item = result[index]
        if isinstance(item, fx.Node):
            reader.replace_all_uses_with(item)
        graph.erase_node(reader)
    graph.erase_node(node)


def _state_name(node: fx.Node) -> str | None:
    """Return the name of the parameter or buffer that a placeholder stands for; None for an argument of forward."""
    source = dynamo_source(node)
    return ".".join(_PATH.findall(source)) if _STATE_SOURCE.search(source) else None


def find_opaque(gm: fx.GraphModule) -> list[Edit]:
    """Find the matrix multiplications that no pass sees, in calls that stay one node: each an edit with its reason."""
    edits = []
    for node in gm.graph.nodes:
        attributes = [getattr(gm, str(n.target), None) for n in node.all_input_nodes if n.op == "get_attr"]
        bodies = [value for value in attributes if isinstance(value, fx.GraphModule)]
        if node.target is FUSED_ENCODER_LAYER:
            reason = "torch's fused layer of inference; torch.backends.mha.set_fastpath_enabled(False) undoes that"
            edits.append(Edit.unsupported(node, reason))
        elif any(op_of(inner) in CONTRACTIONS for body in bodies for inner in body.graph.nodes):
            reason = "a region of its own, such as a checkpoint; call octav_fx.quantize before compiling"
            edits.append(Edit.unsupported(node, reason))
    return edits


def _macs(node: fx.Node) -> int:
    """Count the multiply-accumulates of a call that no row of the table of ops knows, so that it can be reported."""
    is_call = node.op in ("call_function", "call_method")
    if not is_call or op_of(node) is not None or is_higher_order(node.target):
        return 0
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), fake)
    # It is counted for a message only: what does not run on fake values is no reason to stop.
    with MacCounter() as counter, contextlib.suppress(Exception):
        run: Any = getattr(args[0], str(node.target)) if node.op == "call_method" else node.target
        run(*(args[1:] if node.op == "call_method" else args), **kwargs)
    return counter.macs


def lift_hints(gm: fx.GraphModule) -> dict[str, FakeQuantizer]:
    """Replace the quantizers by their op, with each hint a placeholder after all others; return them in that order.

    The compiled function takes the hints as its last arguments, and writes the new ones into them.
    """
    graph = gm.graph
    inputs = graph.find_nodes(op="placeholder")
    # A graph of constants has no inputs.
    last = inputs[-1] if inputs else root_of(graph)
    lifted: dict[str, FakeQuantizer] = {}
    weights = state_only(tensor_flow(graph))
    values = list(map(fake, graph.nodes))
    # That of the values: the one of the tracing context, which detect_fake_mode prefers, is another.
    mode = next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)
    for node in list(graph.nodes):
        if node.op != "call_module" or not isinstance(quantizer := module_of(node), FakeQuantizer):
            continue
        name, settings = str(node.target).removeprefix(QUANTIZERS + "."), quantizer.settings
        with graph.inserting_after(last):
            # An argument of the generated forward: names of modules may begin with digits or have dashes.
            hint = graph.placeholder(re.sub(r"\W", "_", f"hint_{name}"))
        hint.meta["example_value"] = quantizer.hint if mode is None else mode.from_tensor(quantizer.hint)
        # Its storage stays where it is: CUDA graphs need not copy it in.
        hint.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
        without_dynamo_source(hint)
        with graph.inserting_before(node):
            x = module_input(node)
            if x not in weights:
                x = graph.call_function(as_autocast, (x,))
            outputs = graph.call_function(
                torch.ops.octav.dynamic_fake_quantize.default,
                (x, hint, str(settings.spec), settings.method, settings.gradient),
            )
            y = graph.call_function(operator.getitem, (outputs, 0))
            if not quantizer.by_row:
                clip = graph.call_function(operator.getitem, (outputs, 1))
                graph.call_method("copy_", (hint, clip))
        node.replace_all_uses_with(y)
        graph.erase_node(node)
        lifted[name], last = quantizer, hint
    delattr(gm, QUANTIZERS)
    gm.recompile()
    return lifted
