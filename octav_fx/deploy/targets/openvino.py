"""The target "openvino": a graph in which its CPU plugin finds integer kernels, and rounds what they round.

    octav::Weight()                 int4 codes -> Cast, or int8 codes -> DequantizeLinear
    octav::Activation(x)            QuantizeLinear -> DequantizeLinear, zero points of zero; below 8 bits Clip before
    octav::Activation(Conv(...))    Div -> Round -> Clip -> Mul, where the kernel of the convolution computes on
    octav::Bias()                   float32, inside of the layer

OpenVINO (2026.4) does functions of each element and one sum in the kernel of the convolution before them, in float32,
and writes the codes of the next quantizer. Of a QuantizeLinear in between it writes the codes and makes them floats in
a node of its own where a function follows, which costs more than integers gain, and leaves the rounding out where a sum
follows. A zero point is a node of its own as well.
It moves a scale behind a layer norm, as if eps did not count. So a norm reads codes in place of levels, with eps over
scale**2, which is the same.
It scales sums of products in an order of its own, so a code at a tie may differ by one from that of the frozen model.
"""

from typing import Any, Final

import torch

from octav_fx.deploy.targets.graph import Graph, attribute
from octav_fx.deploy.targets.onnx import (
    Target,
    activation_in_bytes,
    bias_in_float,
    clipped_activation,
    dequantized,
    is_operand,
    weight_levels,
)
from octav_fx.formats.grid import Grid
from octav_fx.nn import IntegerWeight, StaticQuantizer

_BYTE: Final = 8
_NIBBLE: Final = 4
# Functions of each element, and products.
_POINTWISE: Final = frozenset(
    {"Relu", "Clip", "LeakyRelu", "PRelu", "Elu", "Celu", "Selu", "Sigmoid", "HardSigmoid", "HardSwish", "Gelu", "Mish"}
    | {"Tanh", "Softplus", "Softsign", "Erf", "Exp", "Sqrt", "Abs", "Neg", "Mul", "Div", "Sub"}
)
# What moves elements and computes nothing; norms over some of them, and their eps where none is given.
_MOVES: Final = frozenset({"Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze"})
_NORMS: Final = frozenset({"LayerNormalization", "InstanceNormalization", "GroupNormalization"})
_EPSILON: Final = 1e-5


def _weight(graph: Graph, key: str, weight: IntegerWeight, output: str) -> list[Any]:
    if weight.bits > _NIBBLE:
        return weight_levels(graph, key, weight, output)
    # A DequantizeLinear of int4 is computed in float; a cast of a constant is gone when the model is loaded.
    codes = graph.constant(f"{key}.codes", "INT4", weight.integers())
    cast = graph.node("Cast", [codes], f"{key}.codes.wide", to=graph.onnx.TensorProto.INT8)
    return [cast, dequantized(graph, key, cast.output[0], weight.scale, "INT8", weight.dim, output)]


def _activation(graph: Graph, key: str, quantizer: StaticQuantizer, source: str, output: str) -> list[Any]:
    if quantizer.dim is not None:
        return activation_in_bytes(graph, key, quantizer, source, output)
    if _is_between(graph, output):
        return _rounded(graph, key, quantizer, source, output)
    nodes = clipped_activation(graph, key, quantizer, source, output, Grid(_BYTE, quantizer.signed))
    return [*nodes, *_codes_for_norms(graph, key, nodes[-1], float(quantizer.scale))]


def _codes_for_norms(graph: Graph, key: str, levels: Any, scale: float) -> list[Any]:
    """Return a DequantizeLinear without a scale, where norms read levels: they read it then, with an eps to match."""
    output, codes, nodes = levels.output[0], f"{key}/{levels.output[0]}.unscaled", []
    for reader in graph.readers[output]:
        if (norm := _norm_behind(graph, reader)) is None:
            continue
        epsilon = attribute(norm, "epsilon", _EPSILON) / scale**2
        kept = [entry for entry in norm.attribute if entry.name != "epsilon"]
        del norm.attribute[:]
        norm.attribute.extend([*kept, graph.onnx.helper.make_attribute("epsilon", epsilon)])
        reader.input[0] = codes
        one = graph.constant(f"{key}.one", "FLOAT", torch.ones(()))
        nodes = [graph.node("DequantizeLinear", [levels.input[0], one, levels.input[2]], codes, codes)]
    return nodes


def _norm_behind(graph: Graph, node: Any) -> Any | None:
    """Return the norm that a node is, or that alone reads what the node moves."""
    while node.op_type in _MOVES and len(readers := graph.readers.get(node.output[0], [])) == 1:
        (node,) = readers
    return node if node.op_type in _NORMS else None


def _is_between(graph: Graph, output: str) -> bool:
    """Tell whether a convolution's kernel makes what an Activation quantizes, and it alone goes on with the levels."""
    if not is_operand(graph, output, "Activation") or not _is_in_kernel(graph, graph.makers[output].input[0]):
        return False
    for reader in graph.readers[output]:
        if reader.op_type in ("Add", "Sum"):
            # A sum is in one kernel: where two convolutions are added, the first one's.
            if reader.input[0] != output and _is_between(graph, reader.input[0]):
                return False
        elif reader.op_type not in _POINTWISE:
            return False
    return True


def _is_in_kernel(graph: Graph, name: str) -> bool:
    """Tell whether a convolution makes a value, or functions of what it returns alone do."""
    maker = graph.makers.get(name)
    if maker is None or maker.op_type == "Conv":
        return maker is not None
    is_function = maker.op_type in _POINTWISE or is_operand(graph, name, "Activation")
    varying = [given for given in maker.input if given not in graph.constants]
    return is_function and bool(varying) and all(_is_in_kernel(graph, given) for given in varying)


def _rounded(graph: Graph, key: str, quantizer: StaticQuantizer, source: str, output: str) -> list[Any]:
    """Return the levels that codes would stand for, computed in floats."""
    scale, call = graph.constant(f"{key}.scale", "FLOAT", quantizer.scale), f"{key}/{output}"
    ends = zip(("low", "high"), quantizer.range, strict=True)
    bounds = [graph.constant(f"{key}.{name}", "FLOAT", torch.tensor(float(code))) for name, code in ends]
    return [
        graph.node("Div", [source, scale], f"{call}.steps"),
        graph.node("Round", [f"{call}.steps"], f"{call}.rounded"),
        graph.node("Clip", [f"{call}.rounded", *bounds], f"{call}.codes"),
        graph.node("Mul", [f"{call}.codes", scale], output, f"{call}.levels"),
    ]


OPENVINO: Final = Target("openvino", _weight, _activation, bias_in_float)
