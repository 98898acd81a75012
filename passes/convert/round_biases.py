"""Put the bias of a layer that multiplies codes on the grid of its sums.

    conv2d(quantizer(x), weight(), b)  ->  conv2d(quantizer(x), weight(), bias())       an IntegerBias
    linear(quantizer(x), weight())     ->  linear(quantizer(x), weight(), bias())

    step = scale of the input * scale of the weight               [C]
    bias = round(b * 2**fraction / step) * step / 2**fraction     [C]

Without a fraction a bias would be off by up to half a product of two codes, which is much of a step of the result where
both have few bits. The fraction costs nothing: a runtime multiplies the codes of a narrow weight by 2**fraction, which
fills the rest of their byte. It is the largest with which two products stay below 2**15, since CPUs without VNNI add
them up in 16 bits.

In a channel whose scale is zero, or next to it, the bias may be beyond 2**30 in that unit. Such a channel gets a larger
scale, in which the bias is 2**30, and its codes shrink in proportion, mostly to zero.
"""

import math
from typing import Any, Final

import torch
from torch import Tensor, fx

from octav_fx.formats.grid import Grid
from octav_fx.ir.arguments import argument, called_module, set_argument
from octav_fx.ir.dataflow import constants, value_of
from octav_fx.ir.edits import Edit, erase_unused
from octav_fx.ir.ops import op_of
from octav_fx.nn import IntegerBias, IntegerWeight, StaticQuantizer

_LAYERS: Final = ("conv1d", "conv2d", "conv3d", "linear")
_LARGEST: Final = 2.0**30
_SHORT: Final = 2**15 - 1


def round_biases(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits: list[Edit] = []
    known = constants(gm.graph)
    for node in list(gm.graph.nodes):
        op = op_of(node)
        if op is None or op.name not in _LAYERS or node.op != "call_function":
            continue
        bias = argument(node, "bias")
        if isinstance(called_module(bias), IntegerBias):
            continue
        if reason := _refusal(node, bias, known):
            edits.append(Edit.unsupported(node, reason))
            continue
        target = _round(gm, node, None if bias is None else value_of(gm, bias))
        erase_unused(bias)
        edits.append(Edit(target, "round", f"{gm.get_submodule(target).fraction} bits below one"))
    return edits


def _refusal(node: fx.Node, bias: Any, known: set[fx.Node]) -> str | None:
    source, weight = (called_module(argument(node, name)) for name in ("input", "weight"))
    if not isinstance(source, StaticQuantizer) or source.dim is not None:
        return "not in integers: its input has no static scale of the tensor"
    if not isinstance(weight, IntegerWeight) or weight.dim != 0 or weight.dtype is not torch.float32:
        return "not in integers: its weight is not stored as float32 scales of output channels and integers"
    called: Any = argument(node, "weight")
    if len(called.users) > 1 or len(node.graph.find_nodes(op="call_module", target=called.target)) > 1:
        return "not in integers: its weight has other readers"
    if source.range == (0, 0):
        return "not in integers: its input is zero whatever the data is"
    if isinstance(bias, fx.Node) and bias not in known:
        return "not in integers: its bias is computed from data"
    return None


def _round(gm: fx.GraphModule, node: fx.Node, bias: Tensor | None) -> str:
    source, weight = (called_module(argument(node, name)) for name in ("input", "weight"))
    assert isinstance(source, StaticQuantizer) and isinstance(weight, IntegerWeight)
    bias = weight.scale.new_zeros(weight.shape[0]) if bias is None else bias.detach()
    fraction = fraction_of(weight.integers(), weight.bits, source)
    least = bias.double().abs() * 2**fraction / (_LARGEST * source.scale.double())
    scale = weight.scale.double()
    # Without bias and scale any scale will do.
    wider = torch.where(scale.abs() < least, least, torch.where(scale == 0, 1.0, scale)).float()
    share = (weight.scale / wider).reshape(-1, *[1] * (len(weight.shape) - 1))
    weight.store((weight.integers() * share).round().to(torch.int8))
    weight.scale, weight.fraction = wider, fraction
    base = str(argument(node, "weight").target).removesuffix("_weight") + "_bias"
    holder, _, name = base.rpartition(".")
    while hasattr(gm.get_submodule(holder), name):
        name += "_"
    target = f"{holder}.{name}"
    gm.add_submodule(target, IntegerBias(bias, source.scale * weight.scale, fraction))
    with gm.graph.inserting_before(node):
        call = gm.graph.call_module(target)
    set_argument(node, "bias", call)
    return target


def fraction_of(codes: Tensor, bits: int, source: StaticQuantizer) -> int:
    """Return how many bits a bias may have below one: see the module's docstring."""
    low, high = source.range
    greatest = max(high, -low)
    # A signed code goes in as an unsigned byte with a zero point.
    byte = high - Grid(source.bits, source.signed).low
    total = float(codes.flatten(1).abs().sum(1, dtype=torch.int64).max()) * greatest
    room = (_SHORT / (2 * byte * 2 ** (bits - 1)), 2 ** (8 - bits), _LARGEST / max(total, 1.0))
    return max(0, math.floor(math.log2(min(room))))
