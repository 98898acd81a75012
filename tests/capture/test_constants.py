"""Constants: a plain value that users set anew, on a layer or in a file, makes a new graph."""

import contextlib
import copy
import functools
import itertools
import logging
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import octav_fx
from octav_fx.capture.find_constants import constants_of
from octav_fx.capture.partial import partial_lines
from tests.support import elsewhere
from tests.support.alike import assert_close, silent_quantizers

# Dynamo of torch 2.11 follows neither the names in an object, where it breaks the graph, nor a count that is kept
# outside of attributes: compiled, the float model has the first one in every call.
FOLLOWS_OBJECTS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12)

FACTOR = 2.0
SIGN = True
UNREAD = 1
TABLE = {"factor": 1.0, **dict.fromkeys(range(100), 0.0), "tensor": torch.zeros(1)}
SEEN = []


class Settings:
    """Plain values in a class, in an object below an object, and what a method makes of one."""

    depth = 1.0

    def __init__(self) -> None:
        self.gain, self.below = 1.0, types.SimpleNamespace(gain=1.0)

    def twice(self) -> float:
        return 2 * self.gain


SETTINGS = Settings()
DEEP = types.SimpleNamespace(a=types.SimpleNamespace(b=types.SimpleNamespace(c=types.SimpleNamespace(gain=1.0))))


def scaling(by: dict[str, float]) -> Callable[[Tensor], Tensor]:
    return lambda x: x * by["y"]


def defaulted(x: Tensor, by: dict[str, float] = {"y": 1.0}) -> Tensor:  # noqa: B006
    return x * by["y"]


BY = {"y": 1.0}
by_closure, by_partial = scaling(BY), functools.partial(torch.mul, other=1.0)
alias = torch.positive
ACT = nn.Identity()
ONES = torch.ones(8)
SIGNS = types.SimpleNamespace(ones=torch.ones(8))


class Negated(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -x


def scaled(x: Tensor) -> Tensor:
    return x * FACTOR


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Conv1d(8, 8, 3, padding=1)

    @property
    def signed(self) -> bool:
        return SIGN

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(scaled(self.first(x)).unsqueeze(2).expand(-1, -1, 6))
        return y if self.signed else -y


def test_globals_of_forward_and_of_what_it_calls_are_found() -> None:
    found = {held.where: dict(zip(held.names, held.values, strict=True)) for held in constants_of(Net()).attributes}
    assert found.keys() == {"a layer", __name__}
    assert found[__name__] == {"FACTOR": 2.0, "SIGN": True}


# Of the name of an attribute, which is no global: a script has its model under such a name, compiled or not.
second = nn.Linear(8, 8)


def test_a_global_of_the_name_of_an_attribute_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = constants_of(Net())
    assert constants.objects == ()
    monkeypatch.setitem(globals(), "second", None)
    assert constants.change() is None


@pytest.mark.parametrize(("name", "value"), [("FACTOR", -3.0), ("SIGN", False)])
def test_a_global_that_changes_is_followed(monkeypatch: pytest.MonkeyPatch, name: str, value: object) -> None:
    model, x = Net().eval(), torch.randn(4, 8)
    q = octav_fx.quantize(model, x)
    with octav_fx.float_mode(q):
        assert torch.equal(q(x), model(x))
    before = q(x)
    monkeypatch.setitem(globals(), name, value)
    with octav_fx.float_mode(q):
        assert torch.equal(q(x), model(x))
    assert not torch.equal(q(x), before)
    monkeypatch.undo()
    assert torch.equal(q(x), before)


def test_a_setting_of_a_layer_that_changes_is_followed() -> None:
    model, x = Net().eval(), torch.randn(4, 8)
    q = octav_fx.quantize(model, x)
    q.second.stride = model.second.stride = (2,)
    with octav_fx.float_mode(q):
        assert torch.equal(q(x), model(x))
    assert q(x).shape == (4, 8, 3)


class Configured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.held, self.function = copy.deepcopy(DEEP), scaling({"y": 1.0})

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) * SETTINGS.twice() * SETTINGS.below.gain * Settings.depth * TABLE["factor"] * elsewhere.FACTOR
        y = alias(by_partial(by_closure(defaulted(y)))) * DEEP.a.b.c.gain * self.held.a.b.c.gain * self.function(1.0)
        y = ACT(y) * ONES * SIGNS.ones
        return -y if os.environ.get("OCTAV_FX_TEST_SIGN", "0") == "1" else y


@pytest.mark.slow
@pytest.mark.parametrize(
    ("holder", "name", "value"),
    [
        (SETTINGS, "gain", -1.0),
        (SETTINGS.below, "gain", -1.0),
        (Settings, "depth", -1.0),
        (TABLE, "factor", -1.0),
        (elsewhere, "FACTOR", -1.0),
        (os.environ, "OCTAV_FX_TEST_SIGN", "1"),
        (DEEP.a.b.c, "gain", -1.0),
        (BY, "y", -1.0),
        (defaulted.__defaults__[0], "y", -1.0),
        (by_partial.keywords, "other", -1.0),
        (sys.modules[__name__], "by_partial", functools.partial(torch.mul, other=-1.0)),
        (sys.modules[__name__], "alias", torch.neg),
        (sys.modules[__name__], "ACT", Negated()),
        (sys.modules[__name__], "ONES", -torch.ones(8)),
        (SIGNS, "ones", -torch.ones(8)),
    ],
)
def test_what_lies_below_a_global_is_followed(
    monkeypatch: pytest.MonkeyPatch, holder: Any, name: str, value: Any
) -> None:
    model, x = Configured().eval(), torch.randn(4, 8)
    q = octav_fx.quantize(model, x)
    torch.compiler.reset()
    compiled = torch.compile(q, backend="eager", fullgraph=FOLLOWS_OBJECTS)
    before = q(x)
    assert torch.equal(compiled(x), before)
    change = monkeypatch.setitem if hasattr(holder, "__setitem__") else monkeypatch.setattr
    change(holder, name, value)
    after = q(x)
    assert torch.equal(after, -before)
    assert torch.equal(compiled(x), after)
    monkeypatch.undo()
    assert torch.equal(compiled(x), before)


@pytest.mark.slow
@pytest.mark.parametrize("is_compiled", [False, True])
def test_what_lies_deep_below_a_module_is_followed(is_compiled: bool) -> None:
    x = torch.randn(4, 8)
    q = octav_fx.quantize(Configured().eval(), x)
    torch.compiler.reset()
    call = torch.compile(q, backend="eager") if is_compiled else q
    before = call(x)
    q.held.a.b.c.gain = -1.0
    assert torch.equal(call(x), -before)
    q.function.__closure__[0].cell_contents["y"] = -1.0
    assert torch.equal(call(x), before)


def _doubled(x: int) -> int:
    return 2 * x


# As einops has it: by another name than the function's own.
doubled = functools.lru_cache(_doubled)


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) @ x.t() * doubled(3)


@pytest.mark.slow
def test_a_function_that_remembers_under_another_name_is_no_change() -> None:
    x = torch.randn(4, 8)
    q = octav_fx.quantize(Remembering().eval(), x)
    assert octav_fx.coverage(q).skipped == []
    assert torch.equal(torch.compile(q, backend="eager", fullgraph=True)(x), q(x))


@pytest.mark.slow
def test_a_setting_of_a_layer_and_a_global_are_followed_where_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 8)
    q = octav_fx.quantize(Net().eval(), x)
    torch.compiler.reset()
    compiled = torch.compile(q, backend="eager", fullgraph=True)
    compiled(x)
    monkeypatch.setitem(globals(), "FACTOR", -3.0)
    q.second.stride = (2,)
    # A graph more is captured outside of what is compiled.
    expected = q(x)
    assert expected.shape == (4, 8, 3)
    assert torch.equal(compiled(x), expected)


class Logs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        SEEN.append(1)
        return self.layer(x)


def test_a_module_that_changes_a_global_runs_its_own_python() -> None:
    x = torch.randn(4, 8)
    q = octav_fx.quantize(Logs().eval(), x)
    before = len(SEEN)
    q(x)
    q(x)
    assert len(SEEN) == before + 2
    assert "SEEN" in partial_lines(q)[0]


def counting() -> Callable[[], int]:
    n = 0

    def count() -> int:
        nonlocal n
        n += 1
        return n

    return count


def counted(memory: list[int] = [0]) -> int:  # noqa: B006
    memory[0] += 1
    return memory[0]


class Counts(nn.Module):
    calls = 0

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(8, 8), kind
        self.count, self.iterator = counting(), itertools.count(1)

    def count_by_class(self) -> int:
        Counts.calls += 1
        return Counts.calls

    def forward(self, x: Tensor) -> Tensor:
        match self.kind:
            case "closure":
                n = self.count()
            case "default":
                n = counted()
            case "class":
                n = self.count_by_class()
            case _:
                n = next(self.iterator)
        return self.layer(x) * n


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["closure", "default", "class", "iterator"])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_count_outside_of_attributes_goes_on(kind: str, is_compiled: bool) -> None:
    if is_compiled and kind != "iterator" and not FOLLOWS_OBJECTS:
        pytest.skip("Dynamo of torch 2.11 counts once, in float as well")
    x = torch.randn(4, 8)
    q = octav_fx.quantize(Counts(kind).eval(), x)
    assert len(partial_lines(q)) == 1
    torch.compiler.reset()
    call = torch.compile(q, backend="eager") if is_compiled else q
    one, before = q.layer(x), Counts.calls
    # quantize has moved it on, except where it is a class's.
    counts = [round(float((call(x) / one).detach().mean())) for _ in range(3)]
    assert counts == [counts[0], counts[0] + 1, counts[0] + 2]
    assert kind != "class" or counts[0] == before + 1


LATER: float
NOTHING = types.SimpleNamespace()
LOGGER = logging.getLogger(f"{__name__}.below")


class LooksForMore(nn.Module):
    """What there may be later, and what torch and logging are set to."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.logger = nn.Linear(8, 8), LOGGER

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) * getattr(NOTHING, "gain", 1.0) * getattr(type(self), "later", 1.0)
        y = y * globals().get("EARLIER", 1.0)
        with contextlib.suppress(NameError):
            y = y * LATER  # noqa: F821
        if torch.backends.cudnn.benchmark or not torch.backends.cuda.flash_sdp_enabled():
            y = -y
        if torch.backends.cuda.matmul.allow_tf32:
            y = -y
        return -y if LOGGER.isEnabledFor(logging.DEBUG) or self.logger.disabled else y


@pytest.mark.parametrize(
    ("holder", "name", "value"),
    [
        (sys.modules[__name__], "LATER", -1.0),
        (sys.modules[__name__], "EARLIER", -1.0),
        (NOTHING, "gain", -1.0),
        (LooksForMore, "later", -1.0),
        (torch.backends.cudnn, "benchmark", True),
        (LOGGER, "level", logging.DEBUG),
        (LOGGER.parent, "level", logging.DEBUG),
        (LOGGER, "disabled", True),
    ],
)
@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_is_there_later_and_flags_of_torch_and_logging_are_followed(
    monkeypatch: pytest.MonkeyPatch, holder: Any, name: str, value: Any, is_compiled: bool
) -> None:
    x = torch.randn(4, 8)
    q = octav_fx.quantize(LooksForMore().eval(), x)
    torch.compiler.reset()
    call = torch.compile(q, backend="eager") if is_compiled else q
    before = call(x)
    assert before.abs().max() > 0
    monkeypatch.setattr(holder, name, value, raising=False)
    # Loggers remember their answers until setLevel is called.
    LOGGER.setLevel(LOGGER.level)
    assert torch.equal(call(x), -before)
    monkeypatch.undo()
    LOGGER.setLevel(LOGGER.level)
    assert torch.equal(call(x), before)


def _allow_tf32(is_allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = is_allowed


@pytest.mark.parametrize("set_", [_allow_tf32, lambda flag: torch.backends.cuda.enable_flash_sdp(not flag)])
@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_a_backend_computes_is_followed(set_: Callable[[bool], None], is_compiled: bool) -> None:
    x = torch.randn(4, 8)
    q = octav_fx.quantize(LooksForMore().eval(), x)
    torch.compiler.reset()
    call = torch.compile(q, backend="eager") if is_compiled else q
    before = call(x)
    try:
        set_(True)
        assert torch.equal(call(x), -before)
    finally:
        set_(False)
    assert torch.equal(call(x), before)


class Table(dict[str, float]):
    __getattr__ = dict.__getitem__


BY_ATTRIBUTE = Table()


class AsksAboutTensors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def get_name(self) -> float:
        return 2.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if x.is_cuda and (torch.backends.cudnn.is_acceptable(x) or torch.backends.mps.is_available()):
            return y * getattr(BY_ATTRIBUTE, "gain", 1.0)
        return y * self.get_name()


def test_what_raises_where_it_is_asked_early_is_no_constant() -> None:
    model, x = AsksAboutTensors().eval(), torch.randn(4, 8)
    q = octav_fx.quantize(model, x)
    assert partial_lines(q) == []
    with octav_fx.float_mode(q):
        assert torch.equal(q(x), model(x))


def test_a_logger_that_is_used_is_no_reason_for_another_graph() -> None:
    """Asking a logger writes into it."""
    x = torch.randn(4, 8)
    q = octav_fx.quantize(LooksForMore().eval(), x)
    LOGGER.isEnabledFor(logging.CRITICAL)
    LOGGER.debug("")
    q(x)
    assert len(q.graphs_of(False)) == 1


@pytest.mark.slow
def test_what_torch_was_built_with_is_asked_in_no_call() -> None:
    class Asks(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return -y if torch.backends.mps.is_available() or torch.backends.cudnn.is_available() else y

    x = torch.randn(4, 8)
    q = octav_fx.quantize(Asks(8, 8).eval(), x)
    torch.compiler.reset()
    # Dynamo itself does not follow these questions.
    assert torch.equal(torch.compile(q, backend="eager", fullgraph=True)(x), q(x))


@pytest.mark.slow
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_forward_that_is_set_on_a_module_below_is_followed(is_compiled: bool) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU())).eval(), torch.randn(4, 8)
    q = octav_fx.quantize(model, x)
    before = q(x)
    own: Any = lambda x: x - 1  # noqa: E731
    q[1].forward = model[1].forward = own
    torch.compiler.reset()
    call = torch.compile(q, backend="eager") if is_compiled else q
    with silent_quantizers():
        assert_close("a call", call(x), model(x))
    del q[1].forward
    assert torch.equal(q(x), before)
