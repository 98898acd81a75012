"""Classes of quantized modules: what code asks of them and does to them, it asks of and does to the user's."""

import abc
import copy
import inspect
import pickle
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import octav_fx
from octav_fx.capture.classes import stand_in
from octav_fx.capture.modules import graphs_of
from octav_fx.capture.partial import PartialModule
from octav_fx.capture.whole import WholeModule
from tests.support.alike import assert_close, silent_quantizers

x = torch.randn(2, 5, 8)


class Scaled(nn.Module):
    gain: ClassVar[float] = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * type(self).gain


class ScaledInParts(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return y * type(self).gain if y.sum() < 1e9 else y


class Counts(nn.Module):
    calls: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return self.a(x) * type(self).calls


class Twice(nn.Module):
    """Two modules of one class, which holds what both have counted."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Counts(), Counts()

    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x))


class Abstract(nn.Module, abc.ABC):
    gain: ClassVar[float] = 2.0

    @abc.abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...


class Concrete(Abstract):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * type(self).gain


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    Scaled.gain = Abstract.gain = 2.0
    Counts.calls = 0
    for kind in (Concrete, ScaledInParts):
        if "gain" in vars(kind):
            del kind.gain


@pytest.mark.parametrize("kind", [Scaled, ScaledInParts, Concrete])
def test_what_is_set_on_a_class_is_set_on_the_users(kind: Any) -> None:
    model = kind().eval()
    q = octav_fx.quantize(model, x)
    type(q).gain = 5.0
    assert kind.gain == type(model).gain == 5.0 and "gain" not in vars(type(q))
    with torch.no_grad(), silent_quantizers():
        assert torch.equal(q(x), model(x))
    kind.gain = 7.0
    with torch.no_grad(), silent_quantizers():
        assert torch.equal(q(x), model(x))
    del type(q).gain
    assert "gain" not in vars(kind)


@pytest.mark.parametrize("kind", [Scaled, ScaledInParts, Concrete])
def test_a_class_is_equal_to_the_users(kind: Any) -> None:
    q = octav_fx.quantize(kind(), x)
    assert isinstance(q, PartialModule if kind is ScaledInParts else WholeModule)
    its: Any = type(q)
    assert its == kind and kind == its and its != nn.Module and its != "a name"
    assert {kind: 1}[its] == 1 and its in {kind} and {its: 1}[kind] == 1
    assert type(pickle.loads(pickle.dumps(q))) is type(q)
    assert isinstance(kind(), its) and isinstance(q, its) and isinstance(q, kind) and not isinstance(q.a, its)
    assert issubclass(kind, its) and issubclass(its, kind) and not issubclass(nn.Module, its)
    assert inspect.signature(its) == inspect.signature(kind)


def test_a_class_below_a_stand_in_is_one_of_its_own() -> None:
    q: Any = octav_fx.quantize(Scaled(), x)
    below: Any = type("Below", (type(q),), {})
    assert not isinstance(Scaled(), below) and not isinstance(q, below) and issubclass(below, Scaled)
    assert inspect.signature(below)


@pytest.mark.parametrize("kind", [Scaled, ScaledInParts, Concrete])
@pytest.mark.parametrize("is_first", [False, True])
def test_a_class_below_that_others_keep_is_for_float_modules_and_for_quantized_ones(kind: Any, is_first: bool) -> None:
    # As fully_shard does, for a student and its teacher.
    kept: dict[type, type] = {}

    def wrap(module: nn.Module) -> None:
        own = module.__class__
        if own not in kept:
            kept[own] = type(f"Wrapped{own.__name__}", (own,), {"is_wrapped": True})
        module.__class__ = kept[own]

    model: Any = kind()
    q: Any = octav_fx.quantize(model, x)
    expected, expected_float = q(x), model(x)
    for module in (q, model) if is_first else (model, q):
        wrap(module)
    assert q.is_wrapped and model.is_wrapped and isinstance(q, kept[kind])
    assert torch.equal(q(x), expected) and torch.equal(model(x), expected_float)
    with octav_fx.float_mode(q):
        assert torch.equal(q(x), expected_float)


def test_a_class_below_calls_the_graph_as_what_is_above_it() -> None:
    q: Any = octav_fx.quantize(Scaled(), x)
    expected = q(x)

    class Negative(type(q)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return -super().forward(x)

    q.__class__ = Negative
    assert torch.equal(q(x), -expected)


class Doubled(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class DoubledInParts(ScaledInParts):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("kind", [Doubled, DoubledInParts])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))])
def test_a_copy_is_of_the_class_below(kind: Any, duplicate: Any) -> None:
    q: Any = octav_fx.quantize(kind.__mro__[1](), x)
    expected = q(x)
    q.__class__ = kind
    for copied in (duplicate(q), duplicate(duplicate(q))):
        assert isinstance(copied, kind)
        assert torch.equal(copied(x), 2 * expected)
        assert torch.equal(copied(x[:1]), q(x[:1]))


@pytest.mark.parametrize("kind", [Doubled, DoubledInParts])
def test_a_module_whose_parts_are_replaced_stays_of_the_class_below(kind: Any) -> None:
    q: Any = octav_fx.quantize(kind.__mro__[1](), x)
    q.__class__ = kind
    q.a = nn.Linear(8, 3)
    expected = q(x)
    assert isinstance(q, kind)
    assert torch.equal(q(x), expected)
    assert torch.equal(super(kind, q).forward(x), expected / 2)


def test_a_class_whose_subclasses_say_something_is_not_told_of_those_that_stand_for_them() -> None:
    known = []

    class Registered(nn.Module):
        def __init_subclass__(cls, *, tag: str) -> None:
            known.append((cls.__name__, tag))

    class Layer(Registered, tag="layer"):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x)

    assert octav_fx.quantize(Layer(), x)(x).shape == (2, 5, 4)
    assert known == [("Layer", "layer")]


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_a_count_in_a_class_is_one_of_all_its_modules(training: bool) -> None:
    model = Twice().train(training)
    expected = [model(x) for _ in range(3)]
    assert Counts.calls == 6
    Counts.calls = 0
    q = octav_fx.quantize(model, x)
    assert Counts.calls == 0
    with silent_quantizers():
        for result in expected:
            assert_close("a call", q(x), result)
    assert Counts.calls == 6


def test_what_a_stand_in_has_itself_stays_its_own() -> None:
    kind = stand_in(Scaled, PartialModule, lambda self: self, {"own": 1})
    kind.own = 2  # type: ignore[attr-defined]
    assert vars(kind)["own"] == 2 and not hasattr(Scaled, "own")
    del kind.own  # type: ignore[attr-defined]
    assert not hasattr(kind, "own") and kind.__module__ == Scaled.__module__


class AsksForClasses(nn.Module):
    """By `is`, in its forward and in a method, in one graph or by its own Python."""

    def __init__(self, in_parts: bool) -> None:
        super().__init__()
        self.in_parts, self.a, self.scaled = in_parts, nn.Linear(8, 8), Scaled()

    def is_one(self, module: nn.Module, kind: type, *, sign: bool = True) -> bool:
        return (type(module) is kind) is sign

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.in_parts and y.sum() > 1e9:
            return y
        y = self.scaled(y) if type(self.scaled) is Scaled and isinstance(Scaled, type) else -y
        return 3 * y if type(self) is AsksForClasses and self.is_one(self, AsksForClasses) else y


@pytest.mark.slow
@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_class_is_the_users_where_a_method_asks_for_it(in_parts: bool, is_compiled: bool) -> None:
    model = AsksForClasses(in_parts).eval()
    q = octav_fx.quantize(model, x)
    assert isinstance(q, PartialModule) is in_parts
    assert not in_parts or isinstance(q.scaled, WholeModule)
    torch.compiler.reset()
    call = torch.compile(q, backend="eager") if is_compiled else q
    with silent_quantizers():
        for _ in range(2):
            assert_close("a call", call(x), model(x))
    with octav_fx.float_mode(q):
        assert torch.equal(q(x), model(x))


class LooksUpClasses(nn.Module):
    """In a dict, a set, or by ==, once something was computed: a compiler leaves to Python what computes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Scaled(), Counts()

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        for layer in (self.a, self.b):
            x = 2 * x + {Scaled: 1, Counts: 2}.get(type(layer), 100)
            x = x if type(layer) in {Scaled, Counts} else x + 100
            x = x if type(layer) == Scaled or {type(layer): 1}.get(Counts) else x + 100  # noqa: E721
        return self.a(x)


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("is_converted", [False, True])
def test_a_class_is_found_where_code_around_looks_it_up(is_compiled: bool, is_converted: bool) -> None:
    model = LooksUpClasses().eval()
    expected = octav_fx.freeze(octav_fx.calibrate(octav_fx.quantize(model, x), [x]))
    assert isinstance(expected, PartialModule) and isinstance(expected.a, WholeModule)
    q = octav_fx.convert(expected) if is_converted else expected
    torch.compiler.reset()
    call = torch.compile(q, backend="eager") if is_compiled else q
    torch.testing.assert_close(call(x), expected(x), rtol=0, atol=4 * 2**-24 * float(expected(x).abs().max()))


@pytest.mark.slow
def test_a_forward_that_is_set_on_the_class_is_followed_by_its_own_python(monkeypatch: pytest.MonkeyPatch) -> None:
    before = octav_fx.quantize(AsksForClasses(in_parts=True).eval(), x)
    monkeypatch.setattr(AsksForClasses, "forward", lambda self, x: -self.scaled(self.a(x)) if x.sum() < 1e9 else x)
    after = octav_fx.quantize(AsksForClasses(in_parts=True).eval(), x)
    for q in (before, after):
        assert isinstance(q, PartialModule) and torch.equal(q(x), -q.scaled(q.a(x)))


def test_compiled_in_float_mode_it_is_one_graph() -> None:
    model = nn.Sequential(Scaled(), Scaled()).eval()
    q = octav_fx.quantize(model, x)
    torch.compiler.reset()
    # Dynamo of torch 2.11 breaks the graph where a name is taken out of the dict of a module.
    fullgraph = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
    with octav_fx.float_mode(q):
        assert_close("a call", torch.compile(q, backend="eager", fullgraph=fullgraph)(x), model(x))


def is_exactly(module: nn.Module, kind: type) -> bool:
    return type(module) is kind


class AsksByFunction(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return y if y.sum() > 1e9 or is_exactly(self, AsksByFunction) else -y


def test_a_class_that_a_function_asks_for_is_refused_where_it_would_be_another() -> None:
    with pytest.raises(octav_fx.OctavError, match="with its children quantized it does not run as before"):
        octav_fx.quantize(AsksByFunction(), x)
    # Below another module that one stays float.
    q = octav_fx.quantize(nn.Sequential(nn.Linear(8, 8), AsksByFunction()), x)
    assert "does not run as before" in octav_fx.table(q) and type(q[1]) is AsksByFunction


class Frozen(nn.Module):
    """Keeps its batch norm in eval mode; asks for classes in __eq__ and in train(), which quantized modules have."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(5)

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        for module in self.modules():
            if type(module) is nn.BatchNorm1d:
                module.eval()
        return self

    def __eq__(self, other: object) -> bool:
        return self is other or (type(other) is Frozen and isinstance(other, Frozen) and other.a is self.a)

    __hash__ = nn.Module.__hash__

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.a(x))


def test_methods_that_ask_for_classes_leave_those_of_quantized_modules_in_place() -> None:
    q: Any = octav_fx.quantize(Frozen(), x)
    assert "train" not in vars(type(q)) and hash(q) == nn.Module.__hash__(q)
    other = octav_fx.quantize(Frozen(), x)
    assert q == q and q != other
    other.a = q.a
    assert q == other
    graphs = graphs_of(q)
    assert graphs is not None
    for mode in (False, True):
        q.train(mode)
        assert graphs.training is mode and not q.norm.training


class AsksAbove(ScaledInParts):
    """Calls what is above its class, which a compiler looks for by that class, to which its stand-in is equal."""

    def __call__(self, x: Tensor) -> Any:
        return super().__call__(x)

    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


@pytest.mark.slow
@pytest.mark.parametrize("is_compiled", [False, True])
def test_what_is_above_the_users_class_is_found(is_compiled: bool) -> None:
    model = AsksAbove().eval()
    q = octav_fx.quantize(model, x)
    torch.compiler.reset()
    call = torch.compile(q, backend="eager") if is_compiled else q
    with silent_quantizers():
        assert_close("a call", call(x), model(x))
    above = type(q).__mro__
    assert above[above.index(AsksAbove)] is AsksAbove


@pytest.mark.parametrize("kind", [Scaled, ScaledInParts])
def test_what_is_made_of_the_class_is_the_users_own(kind: type[nn.Module]) -> None:
    q: Any = octav_fx.quantize(kind(), x)
    made = type(q)()
    assert type(made).__mro__ == kind.__mro__ and torch.equal(made(x), made.a(x) * 2)


def test_a_slice_of_a_sequential_is_a_sequential_of_what_the_graph_holds() -> None:
    q = octav_fx.quantize(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), x)
    some = q[:2]
    assert type(some).__mro__ == nn.Sequential.__mro__ and list(some) == [q[0], q[1]]
    with pytest.raises(octav_fx.OctavError, match=r"0 of Sequential would compute in float here"):
        some(x)
    with octav_fx.float_mode(q):
        assert torch.equal(some(x), q[0](x).relu())
    parts = octav_fx.quantize(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), x, blocks=["0", "2"])
    assert torch.equal(parts[2](parts[:2](x)), parts(x))
