"""rebuild: objects that forward builds around tensors come out of the graph as themselves, anew in each call."""

import copy
import dataclasses
import pickle
from collections import OrderedDict, UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import octav_fx
from octav_fx.capture.symbolic.objects import ObjectTemplate, is_built_around_proxies, rebuild, template_of
from octav_fx.capture.whole import WholeModule
from octav_fx.ir.printer import graph_text
from tests.support.graphs import captured, model


@dataclasses.dataclass
class Output:
    logits: Any
    hidden: Any = None
    name: str = "output"


@dataclasses.dataclass(frozen=True)
class Frozen:
    logits: Any


class Record(dict):
    """A dict whose keys are attributes too, as outputs of libraries are."""

    def __getattr__(self, name: str) -> Any:
        return self[name] if name in self else super().__getattribute__(name)


class Cache:
    def __init__(self) -> None:
        self.layers: list[tuple[Any, Any]] = []
        self.seen = 0

    def update(self, key: Any, value: Any) -> tuple[Any, Any]:
        self.layers.append((key, value))
        self.seen += 1
        return key, value


class Slotted:
    __slots__ = ("empty", "first", "second")

    def __init__(self, first: Any, second: Any) -> None:
        self.first, self.second = first, second


class Once:
    """Has one slot, written as a string."""

    __slots__ = "value"

    def __init__(self, value: Any) -> None:
        self.value = value


def cached(s: nn.Module, x: Tensor) -> Any:
    cache = Cache()
    for _ in range(2):
        x, _ = cache.update(s.fc(x), x)
    return Output(x, cache)


def cyclic(s: nn.Module, x: Tensor) -> Any:
    cache = Cache()
    cache.update(s.fc(x), x)
    cache.itself = cache
    return cache


OBJECTS: dict[str, tuple[Callable[..., Any], type, Callable[[Any], list[Any]]]] = {
    "a dataclass": (lambda s, x: Output(s.fc(x), [x, x]), Output, lambda o: [o.logits, *o.hidden, o.name]),
    "a frozen dataclass": (lambda s, x: Frozen(s.fc(x)), Frozen, lambda o: [o.logits]),
    "a dict of a class of its own": (
        lambda s, x: Record(logits=s.fc(x), x=x, n=3),
        Record,
        lambda o: [o.logits, o["x"], o.n, list(o)],
    ),
    "a dict around a dict": (lambda s, x: UserDict(logits=s.fc(x)), UserDict, lambda o: [o["logits"]]),
    "slots": (lambda s, x: Slotted(s.fc(x), x), Slotted, lambda o: [o.first, o.second, hasattr(o, "empty")]),
    "one slot": (lambda s, x: Once(s.fc(x)), Once, lambda o: [o.value]),
    "a cache in a dataclass": (
        cached,
        Output,
        lambda o: [o.logits, o.hidden.seen, *(t for layer in o.hidden.layers for t in layer)],
    ),
    "an object that holds itself": (cyclic, Cache, lambda o: [o.layers[0][0], o.itself is o]),
    "objects in a tuple": (
        lambda s, x: (Frozen(s.fc(x)), {"a": Frozen(x)}),
        tuple,
        lambda o: [o[0].logits, o[1]["a"].logits, type(o[0])],
    ),
    "nothing but numbers in it": (lambda s, x: (s.fc(x), 3), tuple, list),
}


def same(one: list[Any], other: list[Any]) -> bool:
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_comes_out_with_the_tensors_of_the_call(name: str) -> None:
    forward, kind, contents = OBJECTS[name]
    float_module = model(forward, fc=nn.Linear(4, 4))
    q = octav_fx.quantize(float_module, torch.randn(2, 4))
    assert isinstance(q, WholeModule)
    kept = []
    with octav_fx.float_mode(q), torch.no_grad():
        for x in (torch.randn(2, 4), torch.randn(3, 4)):
            expected, found = float_module(x), q(x)
            assert type(found) is kind and same(contents(found), contents(expected))
    with torch.no_grad():
        for x in (torch.randn(2, 4), torch.randn(3, 4)):
            kept.append((q(x), contents(q(x))))
    # The later call left the earlier one's object alone.
    for found, remembered in kept:
        assert type(found) is kind and same(contents(found), remembered)


def test_golden() -> None:
    gm = captured(model(lambda s, x: Output(s.fc(x), x), fc=nn.Linear(4, 4)), x=torch.randn(2, 4))
    assert graph_text(gm.graph) == (
        "fc = self.fc(x)\noutput = Output(logits=fc, hidden=x, name='output')\nreturn output"
    )
    gm = captured(model(lambda s, x: Once(s.fc(x)), fc=nn.Linear(4, 4)), x=torch.randn(2, 4))
    assert graph_text(gm.graph) == (
        "fc = self.fc(x)\noctav_object_0 = self.octav_object_0\nrebuild = rebuild(octav_object_0, [fc])\nreturn rebuild"
    )


def test_a_tensor_that_an_object_holds_twice_is_one_hole() -> None:
    gm = captured(model(lambda s, x: Slotted(x, x)), x=torch.randn(2, 4))
    assert "rebuild(octav_object_0, [x])" in graph_text(gm.graph)
    x = torch.randn(3, 4)
    out = gm(x)
    assert out.first is x and out.second is x


# Dynamo has its own way of copying each of them.
@pytest.mark.parametrize("name", [name for name in OBJECTS if name != "an object that holds itself"])
@pytest.mark.compile
def test_compiled_it_comes_out_the_same(name: str) -> None:
    forward, kind, contents = OBJECTS[name]
    q, x = octav_fx.quantize(model(forward, fc=nn.Linear(4, 4)), torch.randn(2, 4)), torch.randn(2, 4)
    torch.compiler.reset()
    with torch.no_grad():
        found = torch.compile(q, backend="eager")(x)
        assert type(found) is kind and same(contents(found), contents(q(x)))


def test_an_object_that_was_there_before_is_not_written_to() -> None:
    def forward(self, x):
        self.log.update(x, x)
        return self.log

    float_module = model(forward)
    float_module.log = Cache()
    captured(float_module, x=torch.randn(2, 4))
    assert all(isinstance(t, Tensor) for layer in float_module.log.layers for t in layer)


def test_a_skeleton_keeps_its_body_and_gives_copies() -> None:
    graph = torch.fx.Graph()
    proxies = [torch.fx.Proxy(graph.placeholder(name)) for name in "ab"]
    original = Output(proxies[0], {"again": proxies[0], "other": [proxies[1]]})
    skeleton, found = template_of(original)
    assert [proxy.node.name for proxy in found] == ["a", "b"] and len(skeleton.slots) == 2
    assert original.logits is proxies[0]
    for values in ([1, 2], [3, 4]):
        made = rebuild(skeleton, values)
        assert made == Output(values[0], {"again": values[0], "other": [values[1]]})
    assert isinstance(skeleton, ObjectTemplate) and skeleton.body.logits is skeleton.slots[0]


@pytest.mark.parametrize(
    ("a", "expected"),
    [
        (None, False),
        (3, False),
        ("text", False),
        (torch.ones(1), False),
        (nn.Linear(2, 2), False),
        (Output, False),
        (Output(1), False),
        (OrderedDict(a=1), False),
    ],
    ids=lambda a: type(a).__name__,
)
def test_what_holds_no_proxy_is_left_to_fx(a: Any, expected: bool) -> None:
    assert is_built_around_proxies(a) is expected


def test_containers_that_fx_knows_are_left_to_it_and_their_subclasses_are_not() -> None:
    proxy = torch.fx.Proxy(torch.fx.Graph().placeholder("a"))
    assert not any(map(is_built_around_proxies, (proxy, [proxy], (proxy,), {"a": proxy}, OrderedDict(a=proxy))))
    assert all(map(is_built_around_proxies, (Record(a=proxy), Output([{"a": proxy}]), Slotted(1, proxy))))


def test_objects_survive_a_pickle_of_the_module() -> None:
    x = torch.randn(2, 4)
    q = octav_fx.quantize(Picklable(), x)
    for again in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        out = again(x)
        assert type(out) is Output and torch.equal(out.logits, q(x).logits)


class Picklable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Output:
        return Output(self.fc(x))
