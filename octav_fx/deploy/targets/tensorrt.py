"""The target "tensorrt": explicit quantization as TensorRT 10 reads it, signed and symmetric only.

    octav::Activation(x)   QuantizeLinear -> DequantizeLinear, int8; before them Relu or Clip, below 8 bits
    octav::Weight()        int8 codes -> DequantizeLinear; int4 codes where the other operand is float
    octav::Bias()          float32, inside of the convolution

What it takes (NVIDIA's "Working with Quantized Types"): zero points of zero, positive scales, int8 activations with one
scale for the tensor, weights with one for each output channel, int4 for weights alone. A residual sum runs on integers
where both of its inputs pass a quantizer, as Config(residual_bits=8) places them. The saturation of codes of fewer bits
is a clip in front, exact as rounding is monotone.
"""

from typing import Any, Final

import torch

from octav_fx.deploy.targets.attention import scores
from octav_fx.deploy.targets.graph import Graph
from octav_fx.deploy.targets.onnx import Target, bias_in_float, clipped_activation, dequantized, is_operand
from octav_fx.errors import OctavError
from octav_fx.formats.grid import Grid
from octav_fx.nn import IntegerWeight, StaticQuantizer

_BYTE: Final = Grid(8, signed=True)
_NIBBLE: Final = 4


def _weight(graph: Graph, key: str, weight: IntegerWeight, output: str) -> list[Any]:
    negative = weight.scale < 0
    axis = 0 if weight.dim is None else weight.dim
    turned = negative.reshape([-1 if i == axis and weight.dim is not None else 1 for i in range(len(weight.shape))])
    codes = weight.integers().to(torch.int16)
    codes = torch.where(turned, -codes, codes)
    if codes.numel() and int(codes.max()) > _BYTE.high:
        raise OctavError(
            f"{key}: the factor of its batch norm is negative, and -({_BYTE.low}) is no code of 8 bits, where TensorRT "
            "wants positive scales: quantize with Config(narrow_weights=True), whose codes are -127..127"
        )
    # The opposite of the lowest code of a nibble is none.
    fits = weight.bits <= _NIBBLE and bool((codes <= Grid(_NIBBLE, signed=True).high).all())
    kind = "INT4" if fits and _is_alone(graph, output) else "INT8"
    name = graph.constant(f"{key}.codes", kind, codes.to(torch.int8))
    return [dequantized(graph, key, name, weight.scale.abs(), kind, weight.dim, output)]


def _is_alone(graph: Graph, weight: str) -> bool:
    """Tell whether a weight is multiplied with floats by all of its readers."""
    readers = graph.readers.get(weight, [])
    if any(reader.op_type == "Transpose" for reader in readers):
        return all(_is_alone(graph, reader.output[0]) for reader in readers)
    return not any(is_operand(graph, name, "Activation") for reader in readers for name in reader.input)


def _activation(graph: Graph, key: str, quantizer: StaticQuantizer, source: str, output: str) -> list[Any]:
    if quantizer.dim is not None:
        raise OctavError(
            f"{key}: TensorRT takes one scale for an activation: quantize with Config(activation_granularity='tensor')"
        )
    if (high := quantizer.range[1]) > _BYTE.high:
        raise OctavError(
            f"{key}: codes up to {high} are no signed bytes, the only ones that TensorRT takes: quantize with "
            "Config(signed_activations=True), or with 7 bits"
        )
    return clipped_activation(graph, key, quantizer, source, output, _BYTE)


TENSORRT: Final = Target("tensorrt", _weight, _activation, bias_in_float, ({"MatMul": scores},))
