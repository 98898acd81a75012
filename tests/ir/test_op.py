"""op: a row says where its operands are and along which axes they are quantized and summed, or it is refused."""

from typing import Any

import pytest
import torch

from octav_fx.errors import OctavError
from octav_fx.ir.op import Op, Role, Trait, activation, either, parameters, weight
from octav_fx.ir.ops import OPS
from octav_fx.ir.table.contractions import CONTRACTIONS
from tests.support.layers import LAYERS, Layer


def test_operands_of_each_role() -> None:
    assert (activation(0, "x", "y").role, activation(0, "x", "y").aliases) == (Role.ACTIVATION, ("y",))
    assert (weight(1, "w", 0).role, weight(1, "w", 0).channel) == (Role.WEIGHT, 0)
    assert (either(1, "w", -1).role, either(1, "w", None).channel) == (Role.EITHER, None)


@pytest.mark.parametrize(
    ("operand", "dims", "axis"),
    [
        (activation(0, "x", reduction=-1), 3, 2),
        (activation(0, "x", reduction=1), 4, 1),
        # Of two axes the one beside the channel axis, of a vector the only one; else nothing says which.
        (weight(1, "w", channel=1), 2, 0),
        (either(1, "w", -2), 2, 1),
        (weight(1, "w", channel=0), 4, None),
        (weight(1, "w", channel=2, reduction=1), 3, 1),
        (activation(0, "x"), 2, None),
        (either(1, "w", -1, reduction=-2), 1, 0),
    ],
)
def test_the_reduction_axis_is_declared_or_follows_from_the_channel_axis(operand: Any, dims: int, axis: int) -> None:
    assert operand.reduction_axis(dims) == axis


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Op("own", (activation(0, "x"), activation(0, "y"))), "operand 'x' is not parameter 0 of it"),
        (lambda: Op("own", (activation(1, "x"),), parameters=parameters("x", "y")), "'x' is not parameter 1"),
        (lambda: Op("own", (activation(0, "x"),), parameters=parameters("y")), "'x' is not parameter 0"),
        (lambda: Op("own", (activation(0, "x"), weight(1, "x", 0))), "'x' is not parameter 1"),
        (lambda: Op("own", (activation(0, "x"), activation(1, "y", "x"))), "two operands have one name among x, y, x"),
    ],
)
def test_operands_that_contradict_each_other_are_an_error(make: Any, message: str) -> None:
    with pytest.raises(OctavError, match=f"op 'own': .*{message}"):
        make()


@pytest.mark.parametrize("op", CONTRACTIONS, ids=lambda op: op.name)
def test_activations_have_no_channel_axis(op: Op) -> None:
    assert all(operand.channel is None for operand in op.operands if operand.role is Role.ACTIVATION)


# Shapes of the operands of one call of each other contraction; einsum's equation says which axes are summed over.
PRODUCTS = {
    "matmul": [((2, 3, 4), (2, 4, 5)), ((3, 4), (4,)), ((4,), (4,))],
    "addmm": [((3, 4), (4, 5))],
    "addmv": [((3, 4), (4,))],
    "addbmm": [((2, 3, 4), (2, 4, 5))],
    "baddbmm": [((2, 3, 4), (2, 4, 5))],
    "grouped_mm": [((2, 3, 4), (2, 4, 8))],
    # Two products: queries with keys, and what becomes of that with the values, as many as keys.
    "attention": [((2, 5, 4), (2, 6, 4))],
}


def test_every_contraction_has_shapes() -> None:
    assert {op.name for op in CONTRACTIONS} == {*PRODUCTS, *(layer.op for layer in LAYERS), "einsum"}


@pytest.mark.parametrize(("name", "shapes"), [(name, shapes) for name, listed in PRODUCTS.items() for shapes in listed])
def test_operands_are_equally_long_along_their_reduction_axes(name: str, shapes: Any) -> None:
    first, second, *_ = OPS[name].operands
    (one, two) = shapes
    assert one[first.reduction_axis(len(one))] == two[second.reduction_axis(len(two))]


def test_the_values_of_an_attention_are_summed_over_the_keys() -> None:
    assert OPS["attention"].operands[2].reduction_axis(3) == 1


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.op)
def test_a_weight_is_as_long_as_its_inputs_along_the_reduction_axis(layer: Layer) -> None:
    *inputs, weight = OPS[layer.op].operands
    lengths = {layer.inputs[o.name][o.reduction_axis(len(layer.inputs[o.name]))] for o in inputs}
    shape = layer.state["weight"]
    groups = 1 if Trait.TRANSPOSED in OPS[layer.op].traits else layer.rest.get("groups", 1)
    assert lengths == {shape[weight.reduction_axis(len(shape))] * groups}


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer.module], ids=lambda layer: layer.op)
def test_call_of_gives_the_arguments_with_which_a_module_calls_the_function(layer: Layer) -> None:
    module, inputs = layer.module(*layer.arguments), list(map(torch.randn, layer.inputs.values()))
    op = OPS[layer.op]
    with torch.no_grad():
        assert torch.equal(op.target(*op.call_of(module, None, *inputs)), module(*inputs))


@pytest.mark.parametrize("op", CONTRACTIONS, ids=lambda op: op.name)
def test_a_row_with_modules_says_how_they_call_the_function(op: Op) -> None:
    assert bool(op.modules) is (op.call_of is not None)
