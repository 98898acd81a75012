"""Bound: a layer on codes as compiled code calls it returns what its op does, whatever becomes of its constants."""

from typing import Any

import pytest
import torch
from torch import Tensor

from octav_fx.ops import bound
from octav_fx.ops.bound import Bound
from tests.support.integers import needs_vnni

ONE = [1, 1]
CODES = torch.randint(0, 256, (2, 8, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
# The arguments of each op, by name, from those that may be codes of a weight.
LAYERS: dict[str, tuple[Any, ...]] = {
    "integer_conv": ([4, 8, 3, 3], (ONE, ONE, ONE, 1, 0.0, None)),
    "integer_linear": ([4, 5], (0.0, None)),
}


def layer(op: str) -> tuple[Bound, list[Any]]:
    """A layer of an op, and all arguments of the op."""
    shape, rest = LAYERS[op]
    w = torch.randint(-128, 128, shape, dtype=torch.int8)
    args = [CODES, torch.tensor(0.1), 8, False, w, torch.rand(4), shape, torch.randn(4), *rest, torch.tensor(3.0)]
    return Bound(op, *(... if isinstance(value, Tensor) else value for value in args)), args


def assert_same(op: str, made: Bound, args: list[Any]) -> None:
    expected = getattr(torch.ops.octav, op).default(*args)
    found = made(*(value for value in args if isinstance(value, Tensor)))
    assert found.stride() == expected.stride() and torch.equal(found, expected)


@pytest.mark.parametrize("op", LAYERS)
def test_it_is_the_op(op: str) -> None:
    made, args = layer(op)
    for _ in range(2):
        assert_same(op, made, args)
    assert_same(op, made, [args[0][:0], *args[1:]])


@pytest.mark.parametrize("op", LAYERS)
def test_what_was_prepared_is_kept(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, args = layer(op)
    assert_same(op, made, args)
    monkeypatch.setattr(bound, "_PREPARED", {})
    assert_same(op, made, args)


@pytest.mark.parametrize("op", LAYERS)
@pytest.mark.parametrize("place", [1, 4, 5, 7, -1])
def test_other_constants_are_seen(op: str, place: int) -> None:
    made, args = layer(op)
    assert_same(op, made, args)
    args[place].copy_(args[place] // 2 + 1)
    assert_same(op, made, args)
    args[place] = args[place].clone() // 2 + 1
    assert_same(op, made, args)


@needs_vnni
def test_what_was_prepared_goes_with_its_constants() -> None:
    made, args = layer("integer_linear")
    assert_same("integer_linear", made, args)
    assert made._prepared[1] is not None
    del args[4]
    assert made._prepared == ((), None, [])


def test_layers_of_one_code_take_turns() -> None:
    made, args = layer("integer_conv")
    others = [*args[:4], -args[4], *args[5:]]
    for given in (args, others, args):
        assert_same("integer_conv", made, given)


def test_where_only_the_reference_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    made, args = layer("integer_conv")
    monkeypatch.setattr("octav_fx.ops.onednn.refusal", lambda x_bits, largest: "no VNNI")
    assert_same("integer_conv", made, args)
