"""An ONNX file of a deployed model whose layers all read what they are given, or that returns the levels of all."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
from onnx import TensorProto, helper
from torch import Tensor

from octav_fx.deploy.runtimes import run_onnx

# What a target has behind the levels of a call.
MOVES = ("MaxPool", "Pad", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze")
# Of activations, by the path of their quantizer, in the order of its calls.
Levels = dict[str, list[Tensor]]
# A model as bytes and its inputs by name -> its outputs by name.
Run = Callable[[bytes, dict[str, Tensor]], dict[str, Tensor]]


def with_given_activations(path: Path, given: Levels) -> tuple[bytes, dict[str, Tensor]]:
    """The model with every activation read from an input, and its levels an output: call -> what is given to it.

    A call is named quantizers.<quantizer>/<value>; its input is <call>.given, its output <call>.levels. What is given
    is rounded again, to itself: the pattern that runtimes fuse stays whole. Moves and pools of a call, which a target
    has behind its levels, are left out of what is given, as that is of their shape.
    """
    model = onnx.load(path)
    graph = model.graph
    calls = calls_of(graph)
    assert Counter(call.partition("/")[0] for call in calls) == {name: len(levels) for name, levels in given.items()}
    order = {name: iter(levels) for name, levels in given.items()}
    values = {call: next(order[call.partition("/")[0]]) for call in calls}
    for call, chain in calls.items():
        previous = chain[0].input[0]
        for node in chain:
            copied = onnx.NodeProto()
            copied.CopyFrom(node)
            copied.name += ".seen"
            copied.input[0], copied.output[0] = previous, f"{node.output[0]}.seen"
            previous = copied.output[0]
            graph.node.append(copied)
        graph.node[-1].output[0] = f"{call}.levels"
        moves = [node for node in chain if node.op_type in MOVES]
        if moves:
            # The last levels take the name that is read behind the moves.
            output, levels = moves[-1].output[0], chain[-len(moves) - 1]
            for move in moves:
                graph.node.remove(move)
            levels.output[0] = output
        chain[0].input[0] = f"{call}.given"
        graph.input.append(helper.make_tensor_value_info(f"{call}.given", TensorProto.FLOAT, values[call].shape))
        graph.output.append(helper.make_tensor_value_info(f"{call}.levels", TensorProto.FLOAT, None))
    return model.SerializeToString(), values


def with_levels(path: Path) -> tuple[bytes, dict[str, list[str]]]:
    """The model with the levels of every activation an output; their names by quantizer, in the order of calls."""
    model, names = onnx.load(path), dict[str, list[str]]()
    for call, chain in calls_of(model.graph).items():
        names.setdefault(call.partition("/")[0], []).append(chain[-1].output[0])
        model.graph.output.append(helper.make_tensor_value_info(chain[-1].output[0], TensorProto.FLOAT, None))
    return model.SerializeToString(), names


def calls_of(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """The nodes of each call of a quantizer, the last of which returns its levels: quantizers.<call>.<step>."""
    calls: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        # Codes without a scale are for norms, beside the levels.
        if node.name.startswith("quantizers.") and "/" in node.name and not node.name.endswith(".unscaled"):
            calls.setdefault(node.name.rpartition(".")[0], []).append(node)
    return calls


def computed(
    path: Path,
    inputs: tuple[Tensor, ...],
    given: Levels,
    run: Run = run_onnx,
) -> tuple[Tensor, Levels]:
    """The output of an ONNX file and what its quantizers return, where every layer reads the levels given."""
    model, values = with_given_activations(path, given)
    names = [value.name for value in onnx.load(path).graph.input]
    feed = dict(zip(names, inputs, strict=True)) | {f"{call}.given": levels for call, levels in values.items()}
    outputs = run(model, feed)
    found: Levels = {}
    for call in values:
        found.setdefault(call.partition("/")[0], []).append(outputs[f"{call}.levels"])
    return next(iter(outputs.values())), found
