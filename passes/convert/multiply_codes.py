"""Compute layers on codes: sums that are exact, one float32 multiplier for each channel (nn/integer_rule.py).

    conv2d(quantizer(x), weight(), bias(), ...)  ->  bias(conv2d(codes_of(quantizer(x), scale), weight(), None, ...))
    linear(quantizer(x), weight(), bias())       ->  bias(linear(codes_of(quantizer(x), scale), weight()))
    quantizer3(quantizer1(x) + quantizer2(y))    ->  quantizer3(sums.quantizer3(quantizer1(x), quantizer2(y)))
    quantizer2(adaptive_avg_pool2d(quantizer1(x), 1))  ->  quantizer2(means.quantizer2(quantizer1(x)))

weight() returns codes, and bias, a Rescale, adds the bias and multiplies. Where a quantizer is the only reader of a
result, seen through ops that select, the result is in units of its step, and it divides no more: one rounding instead
of three. It is what convert() adds to the graph that files are written from; sums, means and layers with another kind
of operand stay as they are, on levels.
"""

from typing import Any, Final

import torch
from torch import Tensor, fx

from octav_fx.ir.arguments import argument, called_module, set_argument
from octav_fx.ir.dataflow import readers, writes_for_others
from octav_fx.ir.edits import Edit
from octav_fx.ir.movement import selects
from octav_fx.ir.ops import is_op, op_of
from octav_fx.ir.pools import axes_of_mean, keeps_axes
from octav_fx.nn import IntegerBias, IntegerWeight, StaticQuantizer, StoredWeight
from octav_fx.nn.integer_rule import EXACT, PRODUCTS, CodeMean, CodeSum, Rescale, codes_of

_SUMS: Final = "sums"
_MEANS: Final = "means"


def multiply_codes(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits: list[Edit] = []
    is_float32 = _is_float32(gm)
    for node in list(gm.graph.nodes):
        if isinstance(called_module(node), IntegerBias):
            (layer,) = node.users
            edits.append(_layer(gm, layer, node))
        elif not is_float32:
            continue
        elif len(sources := _sources(node)) == 2 and is_plain_sum(node):
            edits += _combined(gm, node, sources, _SUMS)
        elif len(sources) == 1 and axes_of_mean(node) is not None:
            edits += _combined(gm, node, sources, _MEANS)
    return edits


def _is_float32(gm: fx.GraphModule) -> bool:
    """Tell whether all that is stored of a model is in float32."""
    weights = {stored.dtype for stored in gm.modules() if isinstance(stored, (IntegerWeight, StoredWeight))}
    return weights | {p.dtype for p in gm.parameters() if p.is_floating_point()} <= {torch.float32}


def quantizer_of(node: Any) -> StaticQuantizer | None:
    """Return the quantizer with one scale that a node calls, or None."""
    module = called_module(node)
    return module if isinstance(module, StaticQuantizer) and module.dim is None else None


def _sources(node: fx.Node) -> list[fx.Node]:
    return [source for source in node.all_input_nodes if quantizer_of(source) is not None]


def is_plain_sum(node: fx.Node) -> bool:
    """Tell whether a node adds two values of the model and does nothing else."""
    is_sum = is_op(node, "add") and len(node.args) == 2 and not node.kwargs
    return is_sum and all(isinstance(a, fx.Node) for a in node.args) and not writes_for_others(node)


def result_of(node: fx.Node) -> tuple[fx.Node, StaticQuantizer] | None:
    """Return the quantizer that is the only reader of a node, seen through ops that select."""
    while len(found := readers(node)) == 1:
        (reader,) = found
        if (quantizer := quantizer_of(reader)) is not None:
            called = node.graph.find_nodes(op="call_module", target=reader.target)
            return (reader, quantizer) if len(called) == 1 else None
        if not selects(reader):
            return None
        node = reader
    return None


def _layer(gm: fx.GraphModule, layer: fx.Node, bias: fx.Node) -> Edit:
    op, source, weight = op_of(layer), argument(layer, "input"), argument(layer, "weight")
    assert op is not None and isinstance(source, fx.Node) and isinstance(weight, fx.Node)
    quantizer, stored, known = quantizer_of(source), called_module(weight), called_module(bias)
    assert quantizer is not None and isinstance(stored, IntegerWeight) and isinstance(known, IntegerBias)
    dim = -1 - op.spatial
    reader = result_of(layer)
    gm.set_submodule(str(bias.target), Rescale(known, dim, None if reader is None else reader[1]), strict=True)
    if reader is not None:
        reader[1].in_steps = True
    stored.codes_as = torch.float32 if _fits(stored.integers(), known, quantizer) else torch.float64
    with gm.graph.inserting_before(layer):
        scale = gm.graph.get_attr(f"{source.target}.scale")
        codes = gm.graph.call_function(codes_of, (source, scale, stored.codes_as))
    set_argument(layer, "input", codes)
    set_argument(layer, "bias", None)
    layer.target = PRODUCTS[op.name]
    with gm.graph.inserting_after(layer):
        rescaled = gm.graph.call_module(str(bias.target), (layer,))
    layer.replace_all_uses_with(rescaled, delete_user_cb=lambda user: user is not rescaled)
    gm.graph.erase_node(bias)
    return Edit(str(bias.target), "multiply", f"codes in {stored.codes_as}".replace("torch.", ""))


def _fits(codes: Tensor, bias: IntegerBias, source: StaticQuantizer) -> bool:
    """Tell whether float32 holds every sum of products, in any order, and every bias."""
    low, high = source.range
    greatest = codes.flatten(1).abs().sum(1, dtype=torch.int64).max() * max(high, -low)
    return bool(greatest < EXACT) and bool(bias.codes.abs().max() < EXACT)


def _combined(gm: fx.GraphModule, node: fx.Node, sources: list[fx.Node], kind: str) -> list[Edit]:
    """Replace a sum or mean of levels by one of codes, where a quantizer reads it."""
    if (found := result_of(node)) is None:
        return []
    reader, result = found
    quantizers = [quantizer_of(source) for source in sources]
    name = f"{kind}.{str(reader.target).rpartition('.')[2]}"
    if kind == _SUMS:
        # The two may be one: x + x.
        first, second = (quantizer_of(argument) for argument in node.args)
        assert first is not None and second is not None
        gm.add_submodule(name, CodeSum(first, second, result))
    else:
        axes = axes_of_mean(node)
        assert quantizers[0] is not None and axes is not None
        gm.add_submodule(name, CodeMean(quantizers[0], result, keeps_axes(node), axes))
    with gm.graph.inserting_before(node):
        operands = node.args if kind == _SUMS else (sources[0],)
        new = gm.graph.call_module(name, operands)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
    result.in_steps = True
    return [Edit(str(reader.target), "combine", kind)]
