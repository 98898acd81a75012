"""descended: a module that keeps its Python and class, marked, over quantized children."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import octav_fx
from octav_fx.capture.inputs import Inputs
from octav_fx.capture.modules import quantized_modules
from octav_fx.capture.partial import (
    PartialInfo,
    PartialModule,
    example_of,
    float_records,
    mark_partial,
    outermost,
    partial_lines,
)
from octav_fx.errors import OctavError
from octav_fx.ir.records import Record


class User(nn.Module):
    """A class of the user's, with slots of Python's own kinds."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.fc, self.width = nn.Linear(width, width), width
        self.itself = [self]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)

    @property
    def doubled(self) -> int:
        return self.width * 2

    def __getattr__(self, name: str) -> Any:
        return "made up" if name == "imaginary" else super().__getattr__(name)


def record(site: str, macs: int = 0) -> Record:
    return Record(site, "User", None, (), macs, None, "as asked")


X = torch.randn(2, 4)


def test_the_class_is_the_users_and_marked() -> None:
    module = User()
    expected = module(X)
    assert mark_partial(module, PartialInfo("why", ())) is module
    assert isinstance(module, User) and isinstance(module, PartialModule)
    assert (type(module).__name__, type(module).__module__) == ("User", __name__)
    assert torch.equal(module(X), expected)
    assert module.doubled == 8 and module.imaginary == "made up"
    assert list(module.state_dict()) == ["fc.weight", "fc.bias"]
    assert type(User()) is User


def test_a_second_mark_replaces_the_first() -> None:
    module = mark_partial(User(), PartialInfo("first", ()))
    kind = type(module)
    mark_partial(module, PartialInfo("second", (record("a"),)))
    assert type(module) is kind and module.octav_partial == PartialInfo("second", (record("a"),))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_marked_and_apart(again: Any) -> None:
    module = mark_partial(User(), PartialInfo("why", (record("a", 3),), Inputs((X,))))
    copied = again(module)
    assert isinstance(copied, User) and isinstance(copied, PartialModule) and copied is not module
    assert (copied.octav_partial.reason, copied.octav_partial.records) == ("why", (record("a", 3),))
    assert torch.equal(copied(X), module(X)) and copied.itself[0] is copied
    copied.fc.weight.data.zero_()
    assert module.fc.weight.abs().sum() > 0
    copied.width = 5
    assert module.width == 4


def test_a_pickle_leaves_the_example_inputs_out_and_a_copy_does_not() -> None:
    module = mark_partial(User(), PartialInfo("why", (), Inputs((X,))))
    assert example_of(copy.deepcopy(module)) == Inputs((X,))
    assert example_of(pickle.loads(pickle.dumps(module))) is None
    assert example_of(module) == Inputs((X,)) and example_of(User()) is None


def test_what_is_inside_is_found_in_order_and_once() -> None:
    inner = mark_partial(User(), PartialInfo("the inner", (record("inner.fc", 1),)))
    root = nn.Sequential(inner, octav_fx.quantize(nn.Linear(4, 4), X), nn.ModuleList([inner]))
    mark_partial(root, PartialInfo("the outer", (record("1", 2), record("1", 2), record("inner.fc", 1))))
    assert outermost(nn.Sequential(root)) is root
    assert [graphs.owner for graphs in quantized_modules(root)] == [root[1]]
    assert float_records(root) == [record("1", 2), record("inner.fc", 1)]
    assert partial_lines(root) == ["the model: in parts, because the outer", "0: in parts, because the inner"]


def test_none_and_two_are_errors() -> None:
    with pytest.raises(OctavError, match=r"Linear holds no module that octav_fx\.quantize returned"):
        outermost(nn.Linear(2, 2))
    q = octav_fx.quantize(nn.Linear(4, 4), X)
    two = nn.ModuleList([q, mark_partial(User(), PartialInfo("why", ())), q])
    with pytest.raises(OctavError, match=r"ModuleList holds 2 modules that octav_fx\.quantize returned"):
        outermost(two)


def test_a_class_with_pickling_of_its_own_keeps_what_it_keeps() -> None:
    module = mark_partial(Counted(), PartialInfo("why", ()))
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert isinstance(again, Counted) and torch.equal(again(X), module(X))


class Counted(User):
    """Leaves something out of its pickles."""

    def __init__(self) -> None:
        super().__init__()
        self.open = (value for value in range(3))

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "open"}


class CopiesALayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return copy.deepcopy(self.a)(x) + self.b(x)


@pytest.mark.compile
def test_compiled_code_around_copies_a_layer() -> None:
    x = torch.randn(2, 4)
    q = octav_fx.quantize(CopiesALayer(), x)
    assert isinstance(q, PartialModule)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(q, backend="eager")(x), q(x))
