"""ONNX as all targets write it, and the target "exact": float arithmetic on the levels that integers stand for.

    octav::Weight()       int4 or int8 codes -> DequantizeLinear, a scale for each channel
    octav::Activation(x)  QuantizeLinear -> Clip, below 8 bits -> DequantizeLinear, uint8
    octav::Bias()         float32

A target is a row: which node of PyTorch's exporter it writes how. A new one takes a file and a line in __init__.py.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from octav_fx.deploy.targets.graph import Graph, attribute
from octav_fx.deploy.translate import DOMAIN, Part
from octav_fx.formats.grid import Grid
from octav_fx.nn import IntegerBias, IntegerWeight, StaticQuantizer, StoredWeight

# In place of a scale of zero: far below every result, far above the subnormal numbers.
NOTHING: Final = 2.0**-100
# What moves elements and computes nothing.
MOVES: Final = frozenset({"Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze"})
_BYTE: Final = 8
_NIBBLE: Final = 4

# A graph and one of its nodes -> the nodes in its place; None: it stays.
Translation = Callable[[Graph, Any], list[Any] | None]


@dataclass(frozen=True)
class Target:
    """How the quantizers of a model are written for one runtime, and which other nodes are written anew."""

    name: str
    weight: Callable[[Graph, str, IntegerWeight, str], list[Any]]
    activation: Callable[[Graph, str, StaticQuantizer, str, str], list[Any]]
    bias: Callable[[Graph, str, IntegerBias, str], list[Any]]
    # By the op type; each set is one walk over the graph, in which quantizers are octav's nodes still in the first.
    translations: tuple[Mapping[str, Translation], ...] = ()


def write(target: Target, model: Any, parts: Mapping[str, Part]) -> Any:
    """Return a translated model with the nodes of octav replaced by those of the target."""
    graph = Graph(model, parts)
    for table in target.translations:
        graph.rewrite(functools.partial(_translation, graph, table))
    graph.rewrite(lambda node: _operand(target, graph, node) if node.domain == DOMAIN else None)
    kept = [entry for entry in model.opset_import if entry.domain != DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    return graph.finish()


def _translation(graph: Graph, table: Mapping[str, Translation], node: Any) -> list[Any] | None:
    return table[node.op_type](graph, node) if node.op_type in table else None


def _operand(target: Target, graph: Graph, node: Any) -> list[Any]:
    key, output = attribute(node, "key").decode(), node.output[0]
    part: Part = graph.parts[key]
    match part:
        case IntegerWeight() as weight:
            return target.weight(graph, key, weight, output)
        case StoredWeight() as stored:
            return [grouped_levels(graph, key, stored, output)]
        case IntegerBias() as bias:
            return target.bias(graph, key, bias, output)
        case StaticQuantizer() as quantizer:
            return target.activation(graph, key, quantizer, node.input[0], output)


def is_operand(graph: Graph, name: str, kind: str) -> bool:
    """Tell whether a value is what an octav node of a kind returns."""
    maker = graph.makers.get(name)
    return maker is not None and maker.domain == DOMAIN and maker.op_type == kind


def grouped_weight(graph: Graph, name: str) -> tuple[str, StoredWeight] | None:
    """Return the key and the module of a weight in groups, by the name of its levels; None for any other value."""
    if not is_operand(graph, name, "Weight"):
        return None
    key = attribute(graph.makers[name], "key").decode()
    part = graph.parts[key]
    return (key, part) if isinstance(part, StoredWeight) else None


def weight_levels(graph: Graph, key: str, weight: IntegerWeight, output: str) -> list[Any]:
    """Return DequantizeLinear of int4 codes, or int8 above 4 bits."""
    kind = "INT4" if weight.bits <= _NIBBLE else "INT8"
    codes = graph.constant(f"{key}.codes", kind, weight.integers())
    return [dequantized(graph, key, codes, weight.scale, kind, weight.dim, output)]


def grouped_levels(graph: Graph, key: str, weight: StoredWeight, output: str) -> Any:
    """Return DequantizeLinear of integer codes with a scale for each block along an axis, as opset 21 has it."""
    shared, kind = weight.spec.granularity, "INT4" if weight.spec.format.bits <= _NIBBLE else "INT8"
    codes = graph.constant(f"{key}.codes", kind, weight.integers())
    return dequantized(graph, key, codes, weight.scale, kind, shared.axis, output, shared.size)


def dequantized(
    graph: Graph, key: str, codes: str, scale: Tensor, kind: str, dim: int | None, output: str, block: int | None = None
) -> Any:
    """Return DequantizeLinear of constant codes, with a zero point of zero."""
    # Zero where a channel is all zeros; runtimes want a scale to be none.
    scales = graph.constant(f"{key}.scale", "FLOAT", torch.where(scale == 0, NOTHING, scale))
    # Optional in the standard; onnxruntime wants it.
    zeros = graph.constant(f"{key}.zero", kind, torch.zeros_like(scale, dtype=torch.int8))
    axis = {} if dim is None else {"axis": dim}
    axis |= {} if block is None else {"block_size": block}
    return graph.node("DequantizeLinear", [codes, scales, zeros], output, f"{key}.dequantize", **axis)


def activation_in_bytes(graph: Graph, key: str, quantizer: StaticQuantizer, source: str, output: str) -> list[Any]:
    """Return QuantizeLinear, Clip where not all codes of a byte are used, DequantizeLinear; the least code is 0.

    onnxruntime computes with uint8 on x64 whatever is written, and gets its own change from int8 wrong for some models.
    QuantizeLinear saturates at the ends of the type only; a Clip of the codes keeps the pattern that runtimes fuse. Of
    stacks of matrices with a scale for each column no runtime has a product of integers, and none says so in time.
    """
    if quantizer.dim is not None and _is_in_stacked_product(graph, output):
        return rounded_levels(graph, key, quantizer, source, output)
    zero_point = -Grid(quantizer.bits, quantizer.signed).low
    zeros = torch.full_like(quantizer.scale, zero_point)
    parameters = [
        graph.constant(f"{key}.scale", "FLOAT", quantizer.scale),
        graph.constant(f"{key}.zero", "UINT8", zeros),
    ]
    axis = {} if quantizer.dim is None else {"axis": quantizer.dim}
    # A quantizer may be called for several tensors; each call has its own names.
    call = f"{key}/{output}"
    codes = f"{call}.codes"
    nodes = [graph.node("QuantizeLinear", [source, *parameters], codes, f"{call}.quantize", **axis)]
    low, high = (code + zero_point for code in quantizer.range)
    if (low, high) != (0, 2**_BYTE - 1):
        ends = {"low": low, "high": high}
        bounds = [graph.constant(f"{key}.{name}", "UINT8", torch.tensor(code)) for name, code in ends.items()]
        nodes.append(graph.node("Clip", [codes, *bounds], f"{codes}.clipped", f"{call}.clip"))
        codes = f"{codes}.clipped"
    nodes.append(graph.node("DequantizeLinear", [codes, *parameters], output, f"{call}.dequantize", **axis))
    return nodes


def rounded_levels(graph: Graph, key: str, quantizer: StaticQuantizer, source: str, output: str) -> list[Any]:
    """Return the levels that codes would stand for, computed in floats."""
    scale, call = quantizer.scale, f"{key}/{output}"
    if quantizer.dim is not None:
        shape = graph.shape(output) or graph.shape(source)
        assert shape is not None
        scale = scale.reshape([-1 if axis == quantizer.dim % len(shape) else 1 for axis in range(len(shape))])
    steps = graph.constant(f"{key}.scale", "FLOAT", scale)
    ends = zip(("low", "high"), quantizer.range, strict=True)
    bounds = [graph.constant(f"{key}.{name}", "FLOAT", torch.tensor(float(code))) for name, code in ends]
    return [
        graph.node("Div", [source, steps], f"{call}.steps"),
        graph.node("Round", [f"{call}.steps"], f"{call}.rounded"),
        graph.node("Clip", [f"{call}.rounded", *bounds], f"{call}.codes"),
        graph.node("Mul", [f"{call}.codes", steps], output, f"{call}.levels"),
    ]


def _is_in_stacked_product(graph: Graph, name: str) -> bool:
    """Tell whether a value, moved or not, is an operand of a product of more than two axes."""
    for reader in graph.readers.get(name, []):
        if reader.op_type in MOVES and _is_in_stacked_product(graph, reader.output[0]):
            return True
        if reader.op_type == "MatMul" and len(graph.shape(name) or ()) > 2:
            return True
    return False


def clipped_activation(
    graph: Graph, key: str, quantizer: StaticQuantizer, source: str, output: str, byte: Grid
) -> list[Any]:
    """Return QuantizeLinear to the codes of a byte, DequantizeLinear, and zero points of zero; Clip before the two.

    A Clip where the quantizer saturates before the byte does, Relu where it does so at zero alone. It is exact, as
    rounding is monotone.
    """
    (low, high), call = quantizer.range, f"{key}/{output}"
    scale = graph.constant(f"{key}.scale", "FLOAT", quantizer.scale)
    zero = graph.constant(f"{key}.zero", "INT8" if byte.signed else "UINT8", torch.zeros_like(quantizer.scale))
    nodes = []
    if (low, high) == (0, byte.high) and byte.signed:
        nodes.append(graph.node("Relu", [source], f"{call}.positive"))
    elif (low, high) != (byte.low, byte.high):
        ends = {"low": low, "high": high}
        bounds = [graph.constant(f"{key}.{name}", "FLOAT", code * quantizer.scale) for name, code in ends.items()]
        nodes.append(graph.node("Clip", [source, *bounds], f"{call}.clipped"))
    source = nodes[-1].output[0] if nodes else source
    nodes.append(graph.node("QuantizeLinear", [source, scale, zero], f"{call}.codes", f"{call}.quantize"))
    nodes.append(graph.node("DequantizeLinear", [f"{call}.codes", scale, zero], output, f"{call}.dequantize"))
    return nodes


def bias_in_float(graph: Graph, key: str, bias: IntegerBias, output: str) -> list[Any]:
    """Return no node: a constant."""
    graph.constant(output, "FLOAT", bias())
    return []


def bias_apart(graph: Graph, node: Any) -> list[Any] | None:
    """Return a layer and its bias as two nodes, where the weight is stored as integers.

    A bias inside is rounded by onnxruntime to multiples of both scales, which at 4 bits moves results by percents.
    """
    if len(node.input) < 3 or not node.input[2] or not is_operand(graph, node.input[1], "Weight"):
        return None
    if attribute(node, "beta", 1.0) != 1.0:
        return None
    bias, output = node.input[2], node.output[0]
    # Behind the channels of a convolution, in front of the columns of a matrix.
    is_matrix = node.op_type == "Gemm"
    at = torch.arange(1) if is_matrix else torch.arange(1, len(attribute(node, "kernel_shape")) + 1)
    axes = graph.constant(f"{output}.axes", "INT64", at)
    shaped = graph.node("Unsqueeze", [bias, axes], f"{output}.bias")
    del node.input[2]
    node.output[0] = f"{output}.product"
    return [node, shaped, graph.node("Add", [node.output[0], shaped.output[0]], output, f"{output}.add")]


def bias_of_rank_three(graph: Graph, node: Any) -> list[Any] | None:
    """Return the sum of a product and a bias with two axes of one in front of the bias.

    With one axis alone onnxruntime makes a Gemm of the two nodes, and rounds the bias as it does that of a convolution.
    """
    if (found := product_and_bias(graph, node)) is None:
        return None
    _, bias = found
    axes = graph.constant(f"{node.output[0]}.axes", "INT64", torch.arange(2))
    shaped = graph.node("Unsqueeze", [bias, axes], f"{node.output[0]}.bias")
    node.input[list(node.input).index(bias)] = shaped.output[0]
    return [shaped, node]


def before_zeros(graph: Graph, node: Any) -> list[Any] | None:
    """Return a quantizer before the zeros that are put around its input, which runtimes make padding of a convolution.

    Zero is a level of every grid, but where a clamp between the two leaves it out. Behind them the quantizer keeps the
    layer before them from writing codes.
    """
    key, output = attribute(node, "key").decode(), node.output[0]
    quantizer, pad = graph.parts[key], graph.makers.get(node.input[0])
    assert isinstance(quantizer, StaticQuantizer)
    if pad is None or quantizer.dim is not None or not _puts_zeros(graph, pad):
        return None
    low, high = quantizer.range
    if not low <= 0 <= high:
        return None
    if len(graph.readers[pad.output[0]]) > 1:
        return None
    levels = f"{output}.0"
    copied = graph.onnx.NodeProto.FromString(pad.SerializeToString())
    # Named as a node of the call of the quantizer, whose levels are what the last of them returns.
    copied.name, copied.input[0], copied.output[0] = f"{key}/{levels}.pad", levels, output
    return [graph.node("Activation", [pad.input[0]], levels, domain=DOMAIN, key=key), copied]


def before_repeats(graph: Graph, node: Any) -> list[Any] | None:
    """Return a quantizer before its input is enlarged to the nearest elements as well.

    Rounding a level gives the level. The layer before them then writes codes, and codes are what is repeated.
    """
    key, output = attribute(node, "key").decode(), node.output[0]
    quantizer, resize = graph.parts[key], graph.makers.get(node.input[0])
    assert isinstance(quantizer, StaticQuantizer)
    is_nearest = resize is not None and resize.op_type == "Resize" and attribute(resize, "mode") == b"nearest"
    if resize is None or not is_nearest or quantizer.dim is not None or len(graph.readers[resize.output[0]]) > 1:
        return None
    levels, repeated = f"{output}.0", f"{output}.1"
    copied = graph.onnx.NodeProto.FromString(resize.SerializeToString())
    copied.name, copied.input[0], copied.output[0] = f"{key}/{levels}.resize", levels, repeated
    calls = [(resize.input[0], levels), (repeated, output)]
    first, last = (graph.node("Activation", [source], to, domain=DOMAIN, key=key) for source, to in calls)
    return [first, copied, last]


def _puts_zeros(graph: Graph, node: Any) -> bool:
    """Tell whether a node is a Pad of constant sizes with zeros."""
    if node.op_type != "Pad" or attribute(node, "mode", b"constant") != b"constant":
        return False
    value = graph.value(node.input[2]) if len(node.input) > 2 and node.input[2] else torch.zeros(())
    return node.input[1] in graph.constants and value is not None and not value.any()


def zeros_of_pools(graph: Graph, node: Any) -> list[Any] | None:
    """Return the zeros that a pool reads with their axes by name, which keeps onnxruntime from making them its padding.

    The padding of a max pool is below all numbers, and no pool may have more of it than its window is long. Where a
    quantizer takes what is below zero for zero, the two paddings of a max pool are the same.
    """
    readers = graph.readers.get(node.output[0], [])
    if len(readers) != 1 or readers[0].op_type not in ("MaxPool", "AveragePool"):
        return None
    if not _puts_zeros(graph, node) or len(node.input) > 3:
        return None
    (pool,) = readers
    sizes, window = graph.value(node.input[1]), attribute(pool, "kernel_shape")
    assert sizes is not None
    fits = bool((sizes.view(2, -1)[:, -len(window) :] < torch.tensor(window)).all())
    if fits and (pool.op_type == "AveragePool" or _are_quantized_from_zero(graph, pool.output[0])):
        return None
    axes = graph.constant(f"{node.output[0]}.axes", "INT64", torch.arange(len(sizes) // 2))
    node.input.extend([""] * (3 - len(node.input)) + [axes])
    return [node]


def _are_quantized_from_zero(graph: Graph, name: str) -> bool:
    readers = graph.readers.get(name, [])
    parts = [graph.parts[attribute(r, "key").decode()] for r in readers if r.domain == DOMAIN]
    return len(parts) == len(readers) and all(isinstance(p, StaticQuantizer) and p.range[0] >= 0 for p in parts)


def product_and_bias(graph: Graph, node: Any) -> tuple[Any, str] | None:
    """Return the MatMul that an Add reads and the name of what it adds, the bias of a linear layer; else None."""
    for product, bias in (tuple(node.input), tuple(node.input)[::-1]):
        maker, constant = graph.makers.get(product), graph.constants.get(bias)
        is_vector = constant is not None and len(constant.dims) == 1
        if maker is not None and maker.op_type == "MatMul" and (is_vector or is_operand(graph, bias, "Bias")):
            return maker, bias
    return None


EXACT: Final = Target(
    "exact",
    weight_levels,
    activation_in_bytes,
    bias_in_float,
    (
        {
            **dict.fromkeys(("Conv", "ConvTranspose", "Gemm"), bias_apart),
            "Add": bias_of_rank_three,
            "Pad": zeros_of_pools,
        },
    ),
)
