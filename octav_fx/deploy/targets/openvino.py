"""The target "openvino": a graph in which its CPU plugin finds integer kernels, and rounds what they round.

    octav::Weight()                 int4 codes -> Cast, or int8 codes -> DequantizeLinear
    octav::Activation(x)            QuantizeLinear -> DequantizeLinear, zero points of zero; below 8 bits Clip before
    octav::Activation(Conv(...))    Div -> Round -> Clip -> Mul, where the kernel of the convolution computes on
    octav::Activation(MaxPool(x))   MaxPool(octav::Activation(x)), and so with what only moves, before a product
    ReduceMax(x), without its axes  Squeeze(ReduceMax(x)), and so the smallest
    octav::Bias()                   float32, inside of the layer

OpenVINO (2026.4) does functions of each element and one sum in the kernel of the convolution before them, in float32,
and writes the codes of the next quantizer. Of a QuantizeLinear in between it writes the codes and makes them floats in
a node of its own where a function follows, which costs more than integers gain, and leaves the rounding out where a sum
follows. A zero point is a node of its own as well.
The kernel of a layer writes codes where the quantizer follows at once, and a pool or a transpose behind it is one of
bytes then. That is the same, as codes rise with their levels. Where a sum or a float product reads the levels, moving
codes costs more than it gains; and of what a norm returns, or functions of it, its kernel would write other codes. Of
signed bytes behind a concatenation the plugin leaves the scale out, so they are levels, computed in floats. Attentions
are written as OpenVINO fuses them (targets/attention.py).
It moves a scale behind a layer norm, as if eps did not count. So a norm reads codes in place of levels, with eps over
scale**2, which is the same.
Where it writes codes of the largest of some axes in the node that takes it, they are others unless the axes are kept.
It scales sums of products in an order of its own, so a code at a tie may differ by one from that of the frozen model.
"""

from collections.abc import Set
from typing import Any, Final

import torch

from octav_fx.deploy.targets.attention import part_of_projection, parts_of_projection, scores
from octav_fx.deploy.targets.graph import Graph, attribute
from octav_fx.deploy.targets.onnx import (
    MOVES,
    Target,
    activation_in_bytes,
    bias_in_float,
    clipped_activation,
    dequantized,
    is_operand,
    rounded_levels,
    weight_levels,
)
from octav_fx.deploy.translate import DOMAIN
from octav_fx.formats.grid import Grid
from octav_fx.nn import IntegerWeight, StaticQuantizer

_BYTE: Final = 8
_NIBBLE: Final = 4
# Functions of each element, and products.
_POINTWISE: Final = frozenset(
    {"Relu", "Clip", "LeakyRelu", "PRelu", "Elu", "Celu", "Selu", "Sigmoid", "HardSigmoid", "HardSwish", "Gelu", "Mish"}
    | {"Tanh", "Softplus", "Softsign", "Erf", "Exp", "Sqrt", "Abs", "Neg", "Mul", "Div", "Sub"}
)
_SUMS: Final = frozenset({"Add", "Sum"})
_PRODUCTS: Final = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# What takes the largest; norms, and their eps where none is given.
_SELECTS: Final = frozenset({"MaxPool"})
_NORMS: Final = frozenset({"LayerNormalization", "InstanceNormalization", "GroupNormalization"})
_EPSILON: Final = 1e-5


def _before_moves(graph: Graph, node: Any) -> list[Any] | None:
    """Return a quantizer before what moves its elements or takes the largest, which then do it to levels."""
    key, output = attribute(node, "key").decode(), node.output[0]
    if graph.parts[key].dim is not None:
        return None
    is_product = all(_multiplies_levels(graph, reader) for reader in _readers(graph, output))
    passed, moves, source = MOVES | _SELECTS if is_product else _SELECTS, list[Any](), node.input[0]
    while (maker := graph.makers.get(source)) is not None and maker.op_type in passed:
        if len(maker.output) > 1 or len(_readers(graph, source)) > 1:
            break
        moves.insert(0, maker)
        source = maker.input[0]
    # The kernel of a norm, and of functions and sums of it, writes wrong codes then.
    if not moves or _comes_from(graph, source, _NORMS, _POINTWISE | _SUMS):
        return None
    first, *names = [f"{output}.{i}" for i in range(len(moves))] + [output]
    nodes = [graph.node("Activation", [source], first, domain=DOMAIN, key=key)]
    for i, (move, name) in enumerate(zip(moves, names, strict=True)):
        copied = graph.onnx.NodeProto.FromString(move.SerializeToString())
        # Named as a node of the call of the quantizer, whose levels are what the last of them returns.
        copied.name, copied.input[0], copied.output[0] = f"{key}/{first}.{i}", nodes[-1].output[0], name
        nodes.append(copied)
    return nodes


def _comes_from(graph: Graph, name: str, ends: Set[str], passed: Set[str]) -> bool:
    """Tell whether one of the ops that end the search makes a value, or what ops that are passed make it of."""
    maker = graph.makers.get(name)
    if maker is None or maker.op_type in ends:
        return maker is not None
    return maker.op_type in passed and any(_comes_from(graph, given, ends, passed) for given in maker.input)


def _with_axes(graph: Graph, node: Any) -> list[Any] | None:
    """Return the largest or the smallest with the axes that it is taken of, of size one, which a Squeeze drops."""
    if attribute(node, "keepdims", 1) or len(node.input) < 2 or graph.value(node.input[1]) is None:
        return None
    output = node.output[0]
    kept = graph.node(node.op_type, list(node.input), f"{output}.kept", node.name)
    return [kept, graph.node("Squeeze", [f"{output}.kept", node.input[1]], output)]


def _readers(graph: Graph, name: str) -> list[Any]:
    """Return the nodes that read more of a value than its shape."""
    return [node for node in graph.readers.get(name, []) if node.op_type != "Shape"]


def _multiplies_levels(graph: Graph, node: Any) -> bool:
    """Tell whether a node, or what alone reads what it moves, is a product of two quantized operands."""
    while node.op_type in MOVES and len(readers := _readers(graph, node.output[0])) == 1:
        (node,) = readers
    return node.op_type in _PRODUCTS and all(_is_levels(graph, name) for name in node.input[:2])


def _is_levels(graph: Graph, name: str) -> bool:
    """Tell whether a value is what a quantizer or a weight returns, as it is or moved."""
    while (maker := graph.makers.get(name)) is not None and maker.op_type in MOVES:
        name = maker.input[0]
    return is_operand(graph, name, "Activation") or is_operand(graph, name, "Weight")


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
    is_joined = _comes_from(graph, source, {"Concat"}, MOVES | _SELECTS | _POINTWISE)
    if _is_between(graph, output) or (quantizer.signed and quantizer.bits == _BYTE and is_joined):
        return rounded_levels(graph, key, quantizer, source, output)
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
    while node.op_type in MOVES and len(readers := graph.readers.get(node.output[0], [])) == 1:
        (node,) = readers
    return node if node.op_type in _NORMS else None


def _is_between(graph: Graph, output: str) -> bool:
    """Tell whether a convolution's kernel makes what an Activation quantizes, and it alone goes on with the levels."""
    if not is_operand(graph, output, "Activation") or not _is_in_kernel(graph, graph.makers[output].input[0]):
        return False
    for reader in graph.readers[output]:
        if reader.op_type in _SUMS:
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


OPENVINO: Final = Target(
    "openvino",
    _weight,
    _activation,
    bias_in_float,
    (
        {"Gather": part_of_projection, "Split": parts_of_projection, "MatMul": scores},
        {"Activation": _before_moves, "ReduceMax": _with_axes, "ReduceMin": _with_axes},
    ),
)
