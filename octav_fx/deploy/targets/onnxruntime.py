"""The target "onnxruntime": a graph that its optimizer turns into integer kernels, of which it knows the arithmetic.

    octav::Weight()                    int4 codes -> Cast, or int8 codes -> DequantizeLinear
    octav::Bias()                      int32 codes -> DequantizeLinear
    Conv(x, w, b)                      as it is                                      QLinearConv
    Add(MatMul(x, Transpose(w)), b)    Reshape(Gemm(Reshape(x), w, b))               QGemm
    LayerNormalization(Add(x, y))      LayerNormalization(Sum(x, y))
    ReduceMean(x, spatial axes)        GlobalAveragePool(x)                          QLinearGlobalAveragePool
    octav::Activation(Pad(x))          Pad(octav::Activation(x))                     padding of QLinearConv
    octav::Activation(Resize(x))       octav::Activation(Resize(octav::Activation(x)))    Resize of codes
    MaxPool(Pad(x))                    MaxPool(Pad(x, axes))
    Mul(x, Sigmoid(x))                 QuickGelu(x)
    Gemm(x, w of int4 in groups, b)    Add(MatMulNBits(x, codes, scales), b)         MatMulNBits

What is in the right column, nn/integer_rule.py defines: the result is that of convert(q), to the bit. In float stay
(onnxruntime 1.31) a convolution that anything else than one QuantizeLinear reads, a sum one of whose operands is float,
and everything that is no contraction, sum, pool or move. MatMulNBits makes levels of a weight in groups as it goes, so
that codes are all that is read; other weights in groups are blocks of DequantizeLinear.
The codes of narrow weights are multiplied by 2**fraction when the file is loaded: see passes/convert/round_biases.py.
"""

from typing import Any, Final

import torch

from octav_fx.deploy.targets.graph import Graph, attribute
from octav_fx.deploy.targets.onnx import (
    NOTHING,
    Target,
    activation_in_bytes,
    before_repeats,
    before_zeros,
    bias_apart,
    bias_of_rank_three,
    dequantized,
    grouped_weight,
    is_operand,
    product_and_bias,
    zeros_of_pools,
)
from octav_fx.formats.packing import pack
from octav_fx.nn import IntegerBias, IntegerWeight

_NIBBLE: Final = 4
# Of MatMulNBits: the smallest block, and to compute with the floats of the input as they are.
_LEAST_BLOCK: Final = 16
_FLOAT32: Final = 1


def _weight(graph: Graph, key: str, weight: IntegerWeight, output: str) -> list[Any]:
    codes, scale = weight.integers(), weight.scale / 2**weight.fraction
    if weight.bits > _NIBBLE:
        name = graph.constant(f"{key}.codes", "INT8", codes * 2**weight.fraction)
        return [dequantized(graph, key, name, scale, "INT8", weight.dim, output)]
    # A DequantizeLinear of int4 is computed in float; a cast of a constant is gone when the model is loaded.
    name, nodes = graph.constant(f"{key}.codes", "INT4", codes), []
    steps: list[tuple[str, list[str], dict[str, Any]]] = [("Cast", [], {"to": graph.onnx.TensorProto.INT8})]
    if weight.fraction:
        factor = graph.constant(f"{key}.factor", "INT32", torch.tensor(2**weight.fraction))
        steps = [("Cast", [], {"to": graph.onnx.TensorProto.INT32}), ("Mul", [factor], {}), *steps]
    for i, (kind, more, attributes) in enumerate(steps):
        nodes.append(graph.node(kind, [name, *more], f"{key}.codes.{i}", **attributes))
        name = f"{key}.codes.{i}"
    return [*nodes, dequantized(graph, key, name, scale, "INT8", weight.dim, output)]


def _bias(graph: Graph, key: str, bias: IntegerBias, output: str) -> list[Any]:
    codes = graph.constant(f"{key}.codes", "INT32", bias.codes)
    return [dequantized(graph, key, codes, bias.step / 2**bias.fraction, "INT32", 0, output)]


def _convolution(graph: Graph, node: Any) -> list[Any] | None:
    has_codes = len(node.input) > 2 and is_operand(graph, node.input[2], "Bias")
    return None if has_codes else bias_apart(graph, node)


def _add(graph: Graph, node: Any) -> list[Any] | None:
    """Return a linear layer's bias, or a sum before a layer norm as Sum, which is the same.

    Of Add and LayerNormalization onnxruntime makes one node, SkipLayerNormalization, five times as slow as the two.
    """
    if product_and_bias(graph, node) is not None:
        return _linear(graph, node)
    if any(reader.op_type == "LayerNormalization" for reader in graph.readers.get(node.output[0], [])):
        return [graph.node("Sum", list(node.input), node.output[0], node.name)]
    return None


def _linear(graph: Graph, node: Any) -> list[Any] | None:
    """Return a linear layer of any rank as Gemm, which has an int32 bias inside; MatMul has none."""
    if (found := product_and_bias(graph, node)) is None:
        return None
    product, bias = found
    transpose = graph.makers.get(product.input[1])
    shape, output = graph.shape(node.output[0]), node.output[0]
    given = graph.shape(product.input[0])
    is_layer = transpose is not None and transpose.op_type == "Transpose" and is_operand(graph, bias, "Bias")
    if transpose is None or not is_layer or given is None or shape is None or shape.count(None) > 1:
        return bias_of_rank_three(graph, node)
    rows = graph.constant(f"{output}.rows", "INT64", torch.tensor([-1, given[-1]]))
    sizes = graph.constant(f"{output}.shape", "INT64", torch.tensor([-1 if size is None else size for size in shape]))
    flat = graph.node("Reshape", [product.input[0], rows], f"{output}.flat")
    gemm = graph.node("Gemm", [flat.output[0], transpose.input[0], bias], f"{output}.gemm", transB=1)
    return [flat, gemm, graph.node("Reshape", [gemm.output[0], sizes], output)]


def _gemm(graph: Graph, node: Any) -> list[Any] | None:
    if not attribute(node, "transB", 0) or any(attribute(node, name, 1.0) != 1.0 for name in ("alpha", "beta")):
        return None
    blocks = _blocks(graph, node, node.input[1])
    if blocks is None or len(node.input) < 3 or not node.input[2]:
        return blocks
    output = blocks[0].output[0]
    blocks[0].output[0] = f"{output}.product"
    return [*blocks, graph.node("Add", [f"{output}.product", node.input[2]], output, f"{output}.add")]


def _matmul(graph: Graph, node: Any) -> list[Any] | None:
    transpose = graph.makers.get(node.input[1])
    if transpose is None or transpose.op_type != "Transpose" or attribute(transpose, "perm", [1, 0]) != [1, 0]:
        return None
    return _blocks(graph, node, transpose.input[0])


def _blocks(graph: Graph, node: Any, name: str) -> list[Any] | None:
    """Return the product of floats and a weight [N, K] in groups along K, where onnxruntime has a kernel for it."""
    if (found := grouped_weight(graph, name)) is None:
        return None
    key, weight = found
    (rows, columns), size = weight.shape, weight.spec.granularity.size
    is_power = size is not None and size >= _LEAST_BLOCK and size & (size - 1) == 0
    if weight.spec.format.bits > _NIBBLE or weight.spec.granularity.axis != 1 or size is None or not is_power:
        return None
    # Nibbles count from the lowest code: the sign bit is turned.
    codes = (pack(weight.integers()) ^ 0x88).reshape(rows, columns // size, size // 2)
    scale = weight.scale.reshape(-1)
    given = [
        graph.constant(f"{key}.nibbles", "UINT8", codes),
        graph.constant(f"{key}.scales", "FLOAT", torch.where(scale == 0, NOTHING, scale)),
    ]
    sizes = {"K": columns, "N": rows, "bits": _NIBBLE, "block_size": size, "accuracy_level": _FLOAT32}
    domain = graph.domain("com.microsoft")
    return [graph.node("MatMulNBits", [node.input[0], *given], node.output[0], node.name, domain=domain, **sizes)]


def _product(graph: Graph, node: Any) -> list[Any] | None:
    """Return x * sigmoid(x) of quantized x as one node: onnxruntime's own fusion does not see through two readers."""
    for x, gate in (tuple(node.input), tuple(node.input)[::-1]):
        maker = graph.makers.get(gate)
        if maker is None or maker.op_type != "Sigmoid" or maker.input[0] != x or len(graph.readers[gate]) > 1:
            continue
        if is_operand(graph, x, "Activation"):
            domain = graph.domain("com.microsoft")
            return [graph.node("QuickGelu", [x], node.output[0], node.name, domain=domain, alpha=1.0)]
    return None


def _mean(graph: Graph, node: Any) -> list[Any] | None:
    """Return the mean over the two spatial axes of quantized images as GlobalAveragePool."""
    axes = graph.value(node.input[1]) if len(node.input) > 1 else None
    shape = graph.shape(node.input[0])
    if axes is None or shape is None or len(shape) != 4 or sorted(axis % 4 for axis in axes.tolist()) != [2, 3]:
        return None
    if not is_operand(graph, node.input[0], "Activation"):
        return None
    output = node.output[0]
    if attribute(node, "keepdims", 1):
        return [graph.node("GlobalAveragePool", [node.input[0]], output)]
    pool = graph.node("GlobalAveragePool", [node.input[0]], f"{output}.pool")
    # Not Flatten: only past Reshape the quantizer behind it becomes the pool's.
    sizes = graph.constant(f"{output}.sizes", "INT64", torch.tensor([0, -1 if shape[1] is None else shape[1]]))
    return [pool, graph.node("Reshape", [pool.output[0], sizes], output)]


ONNXRUNTIME: Final = Target(
    "onnxruntime",
    _weight,
    activation_in_bytes,
    _bias,
    (
        {"Gemm": _gemm, "MatMul": _matmul},
        {"Conv": _convolution, "ConvTranspose": bias_apart, "Add": _add, "Mul": _product, "ReduceMean": _mean},
        {"Activation": before_zeros},
        {"Activation": before_repeats},
        # Last: it asks for the zeros that stay before a pool.
        {"Pad": zeros_of_pools},
    ),
)
