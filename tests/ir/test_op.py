"""op: a row says where its operands are and along which axes they are quantized and summed, or it is refused."""

from typing import Any

import pytest
import torch
from torch import nn

from octav_fx.errors import OctavError
from octav_fx.ir.op import Op, Role, activation, either, parameters, weight
from octav_fx.ir.ops import OPS
from octav_fx.ir.table.contractions import CONTRACTIONS
from tests.passes.prepare.test_canonicalize import MODULES
from tests.passes.prepare.test_quantize_operands import CASES, Case


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


@pytest.mark.parametrize(
    ("name", "case"),
    [pytest.param(name, c, id=name) for name, cases in CASES.items() for c in cases if name != "einsum"],
)
def test_operands_are_equally_long_along_their_reduction_axes(name: str, case: Case) -> None:
    shapes = {**case.shapes, "r": case.shapes["x"]}
    found = [(operand, shapes[case.arguments[operand.index]]) for operand in OPS[name].operands]
    axes = [(shape, operand.reduction_axis(len(shape))) for operand, shape in found]
    if name == "attention":
        # Two products: queries with keys, and what becomes of that with the values, as many as keys.
        (query, q_axis), (key, k_axis), (value, v_axis) = axes
        assert query[q_axis] == key[k_axis] and value[v_axis] == key[-2]
    else:
        assert len({shape[axis] for shape, axis in axes}) == 1


@pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)
def test_call_of_gives_the_arguments_with_which_a_module_calls_the_function(kind: type[nn.Module]) -> None:
    arguments, shape, _ = MODULES[kind]
    module, x = kind(*arguments), torch.randn(shape)
    (op,) = (op for op in CONTRACTIONS if kind in op.modules)
    with torch.no_grad():
        assert torch.equal(op.target(*op.call_of(module, None, x)), module(x))


@pytest.mark.parametrize("op", CONTRACTIONS, ids=lambda op: op.name)
def test_a_row_with_modules_says_how_they_call_the_function(op: Op) -> None:
    assert bool(op.modules) is (op.call_of is not None)
