"""What PyTorch's exporter writes of an attention in many nodes, as few that runtimes have kernels for.

    Gather(Squeeze(Transpose(Unsqueeze(Reshape(layer(x))))), i)       ->  layer[i](x)
    Split(layer(x), axis=-1)                                          ->  layer[0](x), layer[1](x), ...
    MatMul(Mul(q, c), Mul(Reshape(Transpose(Reshape(k))), c))         ->  Mul(MatMul(q, Transpose(k)), c * c)

The first is how nn.MultiheadAttention takes queries, keys and values from one wide layer, the second how others do: its
channels are theirs one after the other. Each part has codes of its own, which the kernel of a layer can write. The last
is how F.scaled_dot_product_attention is written; its product of codes is exact, and its scale is a number behind it.
"""

import copy
from collections.abc import Sequence
from typing import Any, Final

from torch import Tensor

from octav_fx.deploy.targets.graph import Graph, attribute
from octav_fx.deploy.targets.onnx import is_operand, product_and_bias
from octav_fx.deploy.translate import DOMAIN
from octav_fx.nn import IntegerBias, IntegerWeight

# What brings the parts of a layer's channels to the front, the last one first, and the order of axes in it:
# [A, B, parts * E] -> [A, B, parts, E] -> [1, A, B, parts, E] -> [parts, A, B, 1, E] -> [parts, A, B, E].
_TO_THE_FRONT: Final = ("Squeeze", "Transpose", "Unsqueeze", "Reshape")
_PARTS_FIRST: Final = [3, 1, 2, 0, 4]


def part_of_projection(graph: Graph, node: Any) -> list[Any] | None:
    """Return a linear layer of its own for the part that a Gather takes of a wider one."""
    part, found = graph.value(node.input[1]), _makers(graph, node.input[0], _TO_THE_FRONT)
    if part is None or part.dim() or attribute(node, "axis", 0) or found is None:
        return None
    (squeeze, transpose, unsqueeze, view), name = found
    layer, sizes = _layer(graph, name), graph.shape(view.output[0])
    is_front = (_axis(graph, unsqueeze), attribute(transpose, "perm"), _axis(graph, squeeze)) == (0, _PARTS_FIRST, 3)
    if layer is None or not is_front or sizes is None:
        return None
    *outer, count, width = sizes
    if count is None or width is None or graph.shape(name) != [*outer, count * width]:
        return None
    start = int(part) % count * width
    return _narrower(graph, layer, slice(start, start + width), node.output[0])


def parts_of_projection(graph: Graph, node: Any) -> list[Any] | None:
    """Return a linear layer of its own for each part of even sizes that a Split takes of a wider one's channels."""
    layer, sizes, count = _layer(graph, node.input[0]), graph.shape(node.input[0]), len(node.output)
    if layer is None or sizes is None or sizes[-1] is None or attribute(node, "num_outputs") != count:
        return None
    if attribute(node, "axis", 0) % len(sizes) != len(sizes) - 1 or sizes[-1] % count:
        return None
    width = sizes[-1] // count
    parts = [slice(i * width, (i + 1) * width) for i in range(count)]
    return [made for name, part in zip(node.output, parts, strict=True) for made in _narrower(graph, layer, part, name)]


def _narrower(graph: Graph, layer: tuple[str, str, str], channels: slice, output: str) -> list[Any]:
    """Return the nodes of a linear layer with some channels of another one."""
    x, *operands = layer
    weight, bias = (_channels(graph, key, channels) for key in operands)
    return [
        graph.node("Weight", [], f"{output}.weight", domain=DOMAIN, key=weight),
        graph.node("Bias", [], f"{output}.bias", domain=DOMAIN, key=bias),
        graph.node("Transpose", [f"{output}.weight"], f"{output}.weight.turned", perm=[1, 0]),
        graph.node("MatMul", [x, f"{output}.weight.turned"], f"{output}.product"),
        graph.node("Add", [f"{output}.product", f"{output}.bias"], output),
    ]


def scores(graph: Graph, node: Any) -> list[Any] | None:
    """Return the product of queries and keys, and then its scale, which the exporter has the root of on both."""
    if (query := _scaled(graph, node.input[0])) is None or (key := _scaled(graph, node.input[1])) is None:
        return None
    if not is_operand(graph, query[0], "Activation") or (keys := _exchanged(graph, key[0])) is None:
        return None
    if not is_operand(graph, keys, "Activation"):
        return None
    output = node.output[0]
    scale = graph.constant(f"{output}.scale", "FLOAT", query[1] * key[1])
    return [
        graph.node("Transpose", [keys], f"{output}.keys", perm=[0, 1, 3, 2]),
        graph.node("MatMul", [query[0], f"{output}.keys"], f"{output}.product"),
        graph.node("Mul", [f"{output}.product", scale], output, node.name),
    ]


def _makers(graph: Graph, name: str, kinds: Sequence[str]) -> tuple[list[Any], str] | None:
    """Return the nodes of these kinds that make a value, the last one first, and the name of what the first reads."""
    found: list[Any] = []
    for kind in kinds:
        if (maker := graph.makers.get(name)) is None or maker.op_type != kind:
            return None
        found.append(maker)
        name = maker.input[0]
    return found, name


def _axis(graph: Graph, node: Any) -> int | None:
    """Return the axis of five that a Squeeze or an Unsqueeze is about; None where it is about several, or all."""
    axes = graph.value(node.input[1]) if len(node.input) > 1 else None
    return None if axes is None or axes.numel() != 1 else int(axes) % len(_PARTS_FIRST)


def _layer(graph: Graph, name: str) -> tuple[str, str, str] | None:
    """Return the input, and the keys of weight and bias, of a linear layer of integers that makes a value."""
    if (maker := graph.makers.get(name)) is None or maker.op_type != "Add":
        return None
    if (found := product_and_bias(graph, maker)) is None or not is_operand(graph, found[1], "Bias"):
        return None
    product, bias = found
    transpose = graph.makers.get(product.input[1])
    if transpose is None or transpose.op_type != "Transpose" or not is_operand(graph, transpose.input[0], "Weight"):
        return None
    weight, codes = (attribute(graph.makers[name], "key").decode() for name in (transpose.input[0], bias))
    stored = graph.parts[weight]
    return (product.input[0], weight, codes) if isinstance(stored, IntegerWeight) and stored.dim == 0 else None


def _channels(graph: Graph, key: str, channels: slice) -> str:
    """Add some channels of a weight or a bias to the parts of a graph, and return their key."""
    part = copy.deepcopy(graph.parts[key])
    if isinstance(part, IntegerBias):
        part.codes, part.step = part.codes[channels], part.step[channels]
    else:
        codes = part.integers()[channels]
        part.store(codes)
        part.scale, part.shape = part.scale[channels], tuple(codes.shape)
    name = f"{key}.{channels.start}-{channels.stop}"
    graph.parts[name] = part
    return name


def _scaled(graph: Graph, name: str) -> tuple[str, Tensor] | None:
    """Return what a Mul multiplies with a number, and the number."""
    if (maker := graph.makers.get(name)) is None or maker.op_type != "Mul":
        return None
    factor = graph.value(maker.input[1])
    return None if factor is None or factor.numel() != 1 else (maker.input[0], factor.reshape(()))


def _exchanged(graph: Graph, name: str) -> str | None:
    """Return the name of a value whose last two axes of four are exchanged in another, with the others made one."""
    if (found := _makers(graph, name, ("Reshape", "Transpose", "Reshape"))) is None:
        return None
    (back, transpose, flat), source = found
    sizes = graph.shape(source)
    if sizes is None or len(sizes) != 4 or attribute(transpose, "perm") != [0, 2, 1]:
        return None
    *outer, rows, columns = sizes
    is_flat = _numbers(graph, flat.input[1], source) == [-1, rows, columns]
    return source if is_flat and _numbers(graph, back.input[1], source) == [*outer, columns, rows] else None


def _numbers(graph: Graph, name: str, source: str) -> list[int | None] | None:
    """Return numbers that are constant or sizes of a value, None for a free one; None where they are anything else."""
    if (value := graph.value(name)) is not None:
        numbers: list[int | None] = value.reshape(-1).tolist()
        return numbers
    if (maker := graph.makers.get(name)) is None:
        return None
    match maker.op_type:
        case "Shape" if maker.input[0] == source:
            return graph.shape(source)
        case "Slice":
            sizes, start, end = (_numbers(graph, given, source) for given in maker.input[:3])
            return None if sizes is None or not start or not end else sizes[start[0] : end[0]]
        case "Concat":
            parts = [_numbers(graph, given, source) for given in maker.input]
            return None if None in parts else [size for part in parts for size in part or ()]
    return None
