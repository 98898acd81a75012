"""Python in forward that a graph could freeze: results, gradients and state of q, its quantizers aside, are float's."""

import collections
import contextvars
import copy
import dataclasses
import enum
import functools
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import octav_fx
from octav_fx.capture.modules import quantized_modules
from tests.support.alike import assert_follows, quantized_alike, silent_quantizers
from tests.support.fuzz import Tripled

x, longer, one = (torch.randn(2, 5, 8), torch.randn(3, 7, 8), torch.randn(1, 1, 8))
Step = Any


class Net(nn.Module):
    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        for name, value in attributes.items():
            setattr(self, name, value)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Step, ...], bool]] = {}


def case(*steps: Step, training: bool = False, **attributes: Any) -> Callable[[Any], Any]:
    """A model with this forward, quantized for the first of the steps: arguments of calls, changes of the model."""

    def add(forward: Any) -> Any:
        kind = forward if isinstance(forward, type) else type("Model", (Net,), {"forward": forward})
        CASES[forward.__name__] = functools.partial(kind, **attributes), steps, training
        return forward

    return add


def put(**values: Any) -> Callable[[nn.Module], None]:
    return lambda model: [setattr(model, name, value) for name, value in values.items()] and None


class Kind(enum.Enum):
    SUM = "sum"
    MEAN = "mean"


class Pair(NamedTuple):
    first: Tensor
    second: Any = None


class Memory:
    def __init__(self) -> None:
        self.last: Any = None


@dataclasses.dataclass
class Result:
    y: Tensor
    extra: Any = None


@case((x,), (x, Kind.MEAN), (longer, Kind.SUM))
def takes_a_member_of_an_enum(self: Any, x: Tensor, kind: Kind = Kind.SUM) -> Tensor:
    y = self.b(self.a(x))
    return y.mean(1) if kind is Kind.MEAN else y.sum(1)


# What forward asks of gradients.


@case((x,), (longer,))
def asks_a_result_for_its_gradient(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    return self.b(y) * (3 if y.requires_grad else 1)


@case((x,), lambda model: model.a.weight.requires_grad_(False), (x,), (longer,))
def asks_a_parameter(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x)) * (3 if self.a.weight.requires_grad else 1)


@case((x,), (longer,))
def hooks_a_gradient(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    if y.requires_grad:
        y.register_hook(lambda g: g * 3)
    return self.b(y)


@case((x,), (longer,))
def packs_what_is_saved_for_backward(self: Any, x: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (t * 4).round(), lambda t: t / 4):
        y = self.a(x).sin()
    return self.b(y)


@case((x,), (longer,))
def copies_a_tensor_without_its_history(self: Any, x: Tensor) -> Tensor:
    return self.b(copy.copy(self.a(x))) + self.a(copy.copy(x)) * copy.copy(x.shape[1])


@case((x,), (longer,))
def turns_autocast_on_by_hand(self: Any, x: Tensor) -> Tensor:
    torch.set_autocast_enabled("cpu", True)
    y = self.a(x)
    torch.set_autocast_enabled("cpu", False)
    return self.b(y.float())


@case((x,), (longer,))
class HasHooksOnGradients(Net):
    def __init__(self) -> None:
        super().__init__(gain=3.0)
        self.a.weight.register_hook(self.scaled)
        self.a.bias.requires_grad_(False)
        self.b.weight.register_post_accumulate_grad_hook(self.tripled)

    def scaled(self, gradient: Tensor) -> Tensor:
        return gradient * self.gain

    def tripled(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad *= 3

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


@case((x,), (longer,))
class HasATagOnAParameter(Net):
    def __init__(self) -> None:
        super().__init__()
        self.a.weight.gain = 3.0  # type: ignore[assignment]
        self.b.weight._no_decay = True  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return (
            self.b(self.a(x)) * getattr(self.a.weight, "gain", 1.0) * (2 if hasattr(self.b.weight, "_no_decay") else 1)
        )


@case((x,), (longer,))
class HasAScriptedLayer(Net):
    def __init__(self) -> None:
        super().__init__(scripted=torch.jit.trace(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), x))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.scripted(self.a(x)))


@case((x,), (longer,))
def turns_gradients_off_by_size(self: Any, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(x.shape[1] > 6):
        y = self.a(x)
    with torch.autocast("cpu", torch.bfloat16, enabled=x.shape[1] > 6):
        return self.b(x) + y


@case((x,), (longer,))
def asks_whether_a_result_is_a_leaf(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    return self.b(y) * (3 if y.is_leaf else 1) * (5 if x.is_leaf else 1)


@case((x,), (longer,), functions=[Tripled.apply, F.relu])
def takes_functions_from_a_list(self: Any, x: Tensor) -> Tensor:
    for function in self.functions:
        x = function(self.a(x))
    return self.b(x)


# State that is no parameter and no buffer.


@case((x,), (longer,), (x,), training=True)
class Teacher(Net):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for own, its in zip(self.a.parameters(), self.teacher.parameters(), strict=True):
            its.data.mul_(0.9).add_(own.data, alpha=0.1)
        return self.b(self.a(x)) - self.teacher(x)


@case((x,), (longer,))
def sums_all_parameters(self: Any, x: Tensor) -> Any:
    return self.b(self.a(x)), sum(p.square().sum() for p in self.parameters())


@case((x,), put(table=torch.full((8,), 9.0)), (x,), put(table=torch.ones(5, 8)), (x,), table=torch.arange(8.0))
def computes_from_a_plain_tensor(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x)) * (self.table + 1) + self.table.sum()


@case((x,), lambda model: model.tables.__setitem__(0, torch.zeros(8)), (x,), tables=[torch.arange(8.0), torch.ones(8)])
def computes_from_tensors_in_a_list(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x)) + self.tables[0] * self.tables[1]


@case((x,), (longer,), (x,), steps=torch.zeros(()))
def counts_in_a_plain_tensor(self: Any, x: Tensor) -> Tensor:
    self.steps += 1
    return self.b(self.a(x)) * self.steps


@case((x,), (longer,), (x,), steps=torch.zeros(()))
def counts_by_a_new_tensor(self: Any, x: Tensor) -> Tensor:
    self.steps = self.steps + 1
    return self.b(self.a(x)) * self.steps


@case((x,), (longer,), (x,))
class RemembersInAQueue(Net):
    def __init__(self) -> None:
        super().__init__(queue=collections.deque(maxlen=2), memory=Memory())

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x)) + (sum(self.queue) if self.queue else 0)
        if self.memory.last is not None:
            y = y * self.memory.last
        self.queue.append(y.detach().mean((0, 1)))
        self.memory.last = y.detach().mean()
        return y


@case((x,), (x,), (longer,), (x,), n=0)
def counts_in_python(self: Any, x: Tensor) -> Tensor:
    self.n += 1
    return self.b(self.a(x)) * min(1.0, self.n / 3)


@case((x,), (x,), (longer,))
def remembers_in_a_default(self: Any, x: Tensor, memory: Any = {}) -> Tensor:  # noqa: B006
    size = x.shape[1]
    if size not in memory:
        memory[size] = torch.arange(float(size))
    return self.b(self.a(x)) + memory[size][:, None]


# What users change later.


@case((x,), put(gain=7.0), (x,), (longer,))
class AttributeOfItsClass(Net):
    gain: ClassVar[float] = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * self.gain)


@case((x,), put(gain=7.0), (x,), (longer,))
class ClosureOverItself(Net):
    def __init__(self) -> None:
        super().__init__(gain=1.0, function=lambda x: self.a(x) * self.gain, functions=[lambda x: self.b(x)])

    def forward(self, x: Tensor) -> Any:
        return self.functions[0](self.function(x))


class Slotted:
    __slots__ = ("gain",)

    def __init__(self) -> None:
        self.gain = 2.0


@case((x,), lambda model: setattr(model.settings, "gain", -1.0), (x,), (longer,))
class AnObjectWithSlots(Net):
    def __init__(self) -> None:
        super().__init__(settings=Slotted())

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) * self.settings.gain


@case((x,), put(scale=None), (x,), (longer,), put(scale=nn.Parameter(torch.full((8,), 3.0))), (x,))
class HasAParameterTakenOut(Net):
    def __init__(self) -> None:
        super().__init__(scale=nn.Parameter(torch.ones(8)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x))
        return y if self.scale is None else y * self.scale + 1


@case((x,), lambda model: setattr(model, "b", nn.Identity()), (x,), (longer,))
def has_a_layer_taken_out(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x))


@case((x,), lambda model: model.layers.append(nn.LayerNorm(8)), (x,), lambda model: model.layers.pop(0), (longer,))
class GetsALayerMore(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Any:
        return self.layers(x)


@case((x.mT,), lambda model: setattr(model.conv, "stride", (2,)), (x.mT,))
class GetsAnotherStride(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        return self.conv(x)


@case((x,), lambda model: parametrizations.weight_norm(model.a) and None, (x,), (longer,))
def has_a_layer_parametrized_later(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x))


@case((x,), lambda model: model.scaled.keywords.update(other=7.0), (x,), put(scaled=torch.neg), (longer,))
class APartialOfAFunction(Net):
    def __init__(self) -> None:
        super().__init__(scaled=functools.partial(torch.mul, other=2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.scaled(self.a(x)))


@case((x,), put(gain=numpy.float32(7)), (x,), (longer,), gain=numpy.float32(2))
def is_scaled_by_a_number_of_numpy(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x)) * float(self.gain)


@case((x,), lambda model: model.settings.update(gain=7.0), (x,), (longer,), settings={"gain": 1.0})
class FindsItsAttributesItself(Net):
    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in self.__dict__.get("settings", ()):
                raise
            return self.__dict__["settings"][name]

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) * self.gain


@case((x,), put(gain=7.0), (x,), (longer,), gain=2.0)
def looks_into_its_dict(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x)) * self.__dict__["gain"] + vars(self).get("gain", 1.0)


@case((x,), lambda model: delattr(model, "gain"), (x,), (longer,), gain=2.0)
def asks_for_what_is_deleted(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x)) * (self.gain if hasattr(self, "gain") else 3.0)


@case((x,), lambda model: model.last.append(5.0), (x,), (longer,), last=collections.deque([1.0, 2.0], maxlen=2))
def sums_a_queue(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x)) * sum(self.last)


@case((x,), lambda model: setattr(model.memory, "last", torch.zeros(8)), (x,), (longer,))
class HoldsATensorInAnObject(Net):
    def __init__(self) -> None:
        super().__init__(memory=Memory())
        self.memory.last = torch.ones(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) * self.memory.last


@case((x,), put(is_on=True), (x,), (longer,))
class IsCalledUnderAutocast(Net):
    is_on: bool = False

    def __call__(self, *args: Any) -> Any:
        with torch.autocast("cpu", enabled=self.is_on):
            return super().__call__(*args)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) * (3 if torch.is_autocast_enabled("cpu") else 1)


@case((x,), (x,), (longer,))
def seeds_torch(self: Any, x: Tensor) -> Tensor:
    torch.manual_seed(3)
    return self.b(self.a(x)) + torch.rand(8)


# What Python and torch hold for all models.


VARIABLE: contextvars.ContextVar[float] = contextvars.ContextVar("gain", default=1.0)
OF_THREAD = threading.local()
OF_THREAD.gain = 1.0


@functools.cache
def ramp(size: int) -> Tensor:
    return torch.arange(float(size))[:, None]


def reset(gain: float) -> Callable[[nn.Module], None]:
    def set_(model: nn.Module) -> None:
        OF_THREAD.gain = gain
        VARIABLE.set(gain)

    return set_


@case((x,), reset(3.0), (x,), (longer,), reset(1.0), (x,))
def asks_the_context_and_the_thread(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x) * VARIABLE.get()) * OF_THREAD.gain


@case((x,), (longer,), (x,))
class RemembersWhatItReturned(Net):
    @functools.lru_cache  # noqa: B019
    def ramp(self, size: int) -> Tensor:
        return torch.arange(float(size))[:, None] * 2

    def forward(self, x: Tensor) -> Tensor:
        size = int(x.shape[1])
        return self.b(self.a(x)) + ramp(size) + self.ramp(size)


def test_what_a_function_remembers_is_nothing_of_a_trace() -> None:
    ramp.cache_clear()
    octav_fx.quantize(RemembersWhatItReturned().eval(), x)
    assert type(ramp(5)) is Tensor


def exact(flag: bool) -> Callable[[nn.Module], None]:
    return lambda model: torch.use_deterministic_algorithms(flag)


@case((x,), exact(True), (x,), (longer,), exact(False), (x,))
def asks_torch_for_exactness(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x)) * (3 if torch.are_deterministic_algorithms_enabled() else 1)


def rank(count: int) -> Callable[[nn.Module], None]:
    def start(model: nn.Module) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        if count:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=count)

    return start


@case((x,), rank(1), (x,), (longer,), rank(0), (x,))
def asks_for_other_processes(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x)) * (3 * dist.get_world_size() if dist.is_initialized() else 1)


@case((x,), (longer,))
def asks_for_files(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x)) * (1 if os.path.exists(__file__) and Path(__file__).exists() else 3)


def test_what_asks_for_files_is_in_no_graph() -> None:
    made, (example, _), _ = CASES["asks_for_files"]
    q = octav_fx.quantize(made().eval(), example)
    assert "asks for a file" in str(octav_fx.table(q))


# Arguments and results.


def tagged(tensor: Tensor, gain: float) -> Tensor:
    tensor = tensor.clone()
    tensor.gain = gain  # type: ignore[attr-defined]
    return tensor


@pytest.mark.parametrize("first", [0, 1])
def test_what_is_set_on_an_argument_is_seen(first: int) -> None:
    class Asks(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) * getattr(x, "gain", 1.0)

    inputs = [tagged(x, 3.0), x, tagged(longer, 5.0)]
    model = Asks().eval()
    q = octav_fx.quantize(model, inputs[first])
    for given in inputs:
        with silent_quantizers(), torch.no_grad():
            assert torch.equal(q(given), model(given))


@case((x,), (x.to_sparse(),), (x,))
def asks_how_an_argument_is_held(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x.to_dense())) * 3 if x.is_sparse else self.b(self.a(x))


@case((x, "sum"), (longer, "mean"), (x, Kind.SUM), (x, ("cat", 2)), (one, 3))
def matches_an_argument(self: Any, x: Tensor, kind: Any) -> Any:
    match kind:
        case "sum":
            return self.a(x).sum(1)
        case "mean":
            return self.a(x).mean(1)
        case Kind.SUM:
            return self.b(self.a(x))
        case ("cat", n):
            return torch.cat([self.b(x)] * n, -1)
        case int(n):
            return self.b(x) * n


@case((x, x), (longer, x), (x, longer))
def asks_whether_arguments_are_one(self: Any, x: Tensor, y: Tensor) -> Tensor:
    return self.a(x) if x is y else self.b(x) + self.a(y).mean()


@case((x, x), (x, longer), (longer, longer))
def asks_whether_arguments_are_one_as_they_were(self: Any, x: Tensor, y: Tensor) -> Tensor:
    return self.a(x) if x is y else self.b(x) + self.a(y).mean()


@case(([x, x],), ([x, longer],), ([longer, longer],), ([longer, x],))
def asks_whether_those_in_a_list_are_one(self: Any, pair: list[Tensor]) -> Tensor:
    return self.a(pair[0]) if pair[0] is pair[1] else self.b(pair[0]) + self.a(pair[1]).mean()


@case((x, x), (x, longer[:2, :5]), (longer, longer))
def writes_into_one_of_its_arguments(self: Any, x: Tensor, y: Tensor) -> Tensor:
    x.mul_(2)
    return self.b(self.a(x) + y)


@case((x,), (longer,))
def returns_a_dataclass(self: Any, x: Tensor) -> Result:
    result = Result(self.a(x))
    result.extra = {"loss": self.b(result.y).mean(), "length": x.shape[1]}
    return result


@case((x, None), (x, (longer[:2], longer[:2])), (one, (one, one)))
def keeps_a_cache(self: Any, x: Tensor, past: Any) -> Any:
    k, v = self.a(x), self.b(x)
    if past is not None:
        k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
    return F.scaled_dot_product_attention(x, k, v, is_causal=past is None and x.shape[1] > 1), (k, v)


@case((x,), (longer,), (x,))
class TiesItsWeightsLate(Net):
    def forward(self, x: Tensor) -> Tensor:
        if self.b.weight is not self.a.weight:
            self.b.weight = self.a.weight
        return self.b(self.a(x).tanh())


@case((x,), (longer,), (x,))
def remembers_its_last_result(self: Any, x: Tensor) -> Tensor:
    last = getattr(self, "last", None)
    y = self.b(self.a(x))
    self.last = y.detach().mean()
    return y if last is None else y + last


@case((x,), (x,), (longer,), (x,))
class KeepsATableInABuffer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.table.shape[0] != x.shape[1]:
            self.table = torch.arange(float(x.shape[1]))[:, None]
        return self.b(self.a(x)) + self.table


@case((x,), (x,), training=True)
class HasAGeneratorOfPython(Net):
    def __init__(self) -> None:
        super().__init__(chance=random.Random(1), numpys=[numpy.random.default_rng(1)])

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) * self.chance.random() + self.numpys[0].random()


@case((x,), (x,), (longer,))
def seeds_the_generator_of_torch(self: Any, x: Tensor) -> Tensor:
    torch.default_generator.manual_seed(3)
    return self.b(self.a(x)) + torch.rand(8)


@case((x,), (x,), (longer,))
def seeds_torch_by_its_module(self: Any, x: Tensor) -> Tensor:
    torch.random.manual_seed(3)
    return self.b(self.a(x)) + torch.rand(8)


@case((x,), (x,), training=True)
def draws_from_a_generator_of_torch(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x)) + torch.rand(8, generator=torch.Generator().manual_seed(3))


@case((Pair(x),), (Pair(longer, longer),), (Pair(x, 3.0),))
def takes_a_named_tuple(self: Any, pair: Pair) -> Pair:
    y = self.a(pair.first)
    if pair.second is not None:
        y = y * pair.second if isinstance(pair.second, float) else y + self.b(pair.second)
    return pair._replace(first=y)


@case((x, Kind.SUM), (longer, Kind.MEAN))
def chooses_by_an_enum_in_a_dict(self: Any, x: Tensor, kind: Kind) -> Tensor:
    return {Kind.SUM: self.a, Kind.MEAN: self.b}[kind](x)


@case((x,), (longer,), _loss=None, training=True)
def keeps_a_loss_under_a_private_name(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    self._loss = y.square().mean()
    return self.b(y) + self._loss


@case((x,), (longer,), (one,))
def multiplies_a_nested_tensor(self: Any, x: Tensor) -> Tensor:
    nested = torch.nested.nested_tensor(list(self.a(x).unbind()), layout=torch.jagged)
    return torch.nested.to_padded_tensor(self.b(nested), 0.0)


@case((x,), (x,), (longer,), (longer,), memory={})
def goes_on_from_what_a_dict_keeps(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    if "y" in self.memory and self.memory["y"].shape == y.shape:
        y = (y + self.memory["y"]) / 2
    self.memory["y"] = y.detach()
    return self.b(y)


@case((x,), (longer,), sizes={})
def keeps_a_size_in_a_dict(self: Any, x: Tensor) -> Tensor:
    for name in ("a", "b"):
        x = getattr(self, name)(x)
        self.sizes[name] = x.shape
    return x


@case((x, x), (x, longer), (longer, longer), (longer, one))
def catches_an_error_later(self: Any, x: Tensor, y: Tensor) -> Tensor:
    z = self.a(x)
    try:
        return z + self.b(y)
    except RuntimeError:
        return z - 1


@case((x, longer), (x, x), (longer, x))
def catches_an_error_at_capture(self: Any, x: Tensor, y: Tensor) -> Tensor:
    z = self.a(x)
    try:
        return z + self.b(y)
    except RuntimeError:
        return z - 1


@case((one,), (x,), (one,))
def catches_an_error_of_a_view(self: Any, x: Tensor) -> Tensor:
    z = self.a(x).transpose(1, 2)
    try:
        return z.view(len(x), -1)
    except RuntimeError:
        return z.reshape(len(x), -1) + 1


@case((x,), (longer,))
def chooses_by_size_in_a_cond(self: Any, x: Tensor) -> Tensor:
    return torch.cond(x.shape[1] > 6, lambda x: self.a(x), lambda x: self.b(x), (self.a(x),))


@pytest.mark.parametrize("name", CASES)
def test_q_computes_what_the_float_model_does(name: str) -> None:
    made, steps, training = CASES[name]
    assert_follows(made, steps, training)


def test_what_is_stored_under_a_private_name_takes_part_in_one_graph() -> None:
    made, steps, _ = CASES["keeps_a_loss_under_a_private_name"]
    q = octav_fx.quantize(made(), steps[0])
    q(longer)
    assert octav_fx.coverage(q).quantized_macs == octav_fx.coverage(q).total_macs
    assert len(quantized_modules(q)) == 1
    assert q._loss.requires_grad


@pytest.mark.slow
def test_a_table_in_a_buffer_is_made_before_the_graph() -> None:
    quantized_alike(KeepsATableInABuffer(), (x,), (longer[:, :5],))


def test_what_a_branch_of_cond_on_data_calls_stays_float() -> None:
    class Chooses(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.c(x)
            return torch.cond(y.sum() > 0, lambda y: self.a(y), lambda y: self.b(y), (y,))

    model = Chooses(c=nn.Linear(8, 8)).eval()
    q = octav_fx.quantize(model, x)
    skipped = {site: reason for site, reason, _ in octav_fx.coverage(q).skipped}
    assert "no call of it succeeds outside of torch.cond, while_loop or a transform of torch.func" in skipped.values()
    assert octav_fx.coverage(q).quantized_macs == 10 * 64
    with torch.no_grad(), silent_quantizers():
        for shift in (-10, 10):
            assert torch.equal(q(x + shift), model(x + shift))


def test_tensors_on_parameters_are_those_of_the_copy() -> None:
    net = nn.Sequential(nn.Linear(8, 8))
    net[0].weight.main_grad, net[0].weight.owner = torch.zeros(8, 8), net[0]
    net[0].bias.like = net[0].weight
    q = octav_fx.quantize(net, x)
    weight: Any = q.get_parameter("0.weight")
    weight.main_grad += 1
    assert not net[0].weight.main_grad.any()
    assert weight.owner is q[0]
    assert q.get_parameter("0.bias").like is weight
