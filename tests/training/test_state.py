"""What forward reads besides its arguments, and what it leaves on modules: followed, stored, or not held."""

import copy
import random
import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import octav_fx
from octav_fx.capture.partial import PartialModule
from octav_fx.capture.rerun import without_quantizers
from octav_fx.capture.whole import WholeModule
from tests.support.graphs import model

# Float addition in another order of the same sums: a few units in the last place of numbers near one.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


class Scaled(nn.Module):
    """Reads plain attributes of its own and of a module below."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(8, 8), nn.Linear(8, 8), Kept()
        self.scale, self.flag, self.act = 1.0, False, F.relu
        self.sizes = [1, 2]
        self.config = Settings()

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.act(self.a(x))) * self.scale + sum(self.sizes)
        return self.b(y) if self.flag or self.config.deep.more else y * self.config.factor


class Kept(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, training=False) * (1 - self.p)


class Deep:
    def __init__(self) -> None:
        self.more = False


class Settings:
    def __init__(self) -> None:
        self.factor, self.deep = 2, Deep()


def alike(q: nn.Module, float_module: nn.Module, x: Tensor) -> None:
    # Whatever graph it takes is captured first.
    q(x)
    with without_quantizers(q):
        torch.testing.assert_close(q(x), float_module(x), **CLOSE)


def appended(m: Any) -> None:
    m.sizes.append(3)


def configured(m: Any) -> None:
    m.config.factor = 7


def deeper(m: Any) -> None:
    m.config.deep.more = True


CHANGES: dict[str, Callable[[Any], None]] = {
    "a number": lambda m: setattr(m, "scale", 5.0),
    "a flag": lambda m: setattr(m, "flag", True),
    "a function": lambda m: setattr(m, "act", F.gelu),
    "of a module below": lambda m: setattr(m.drop, "p", 0.0),
    "a list": lambda m: setattr(m, "sizes", [4]),
    "in a list": appended,
    "in an object": configured,
    "in an object of an object": deeper,
}


@pytest.mark.parametrize("name", CHANGES)
def test_attributes_that_are_set_later_count(name: str) -> None:
    float_module, x = Scaled().eval(), torch.randn(4, 8)
    q = octav_fx.quantize(float_module, x)
    before = q(x)
    alike(q, float_module, x)
    for m in (float_module, q):
        CHANGES[name](m)
    alike(q, float_module, x)
    assert not torch.equal(q(x), before)
    assert len(q.graphs_of(False)) == 2
    with octav_fx.float_mode(q):
        assert torch.equal(q(x), float_module(x))
    copied = copy.deepcopy(q)
    assert torch.equal(copied(x), q(x)) and len(copied.graphs_of(False)) == 2


def test_an_attribute_of_its_own_does_not_reach_the_float_model_given() -> None:
    float_module = Scaled()
    q = octav_fx.quantize(float_module, torch.randn(4, 8))
    q.scale = 5.0
    assert q.scale == 5.0 and float_module.scale == 1.0


def test_the_mode_of_one_child_counts() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 3 if self.training else x

    float_module = nn.Sequential(nn.Linear(8, 8), Noisy(), Noisy()).train()
    x = torch.randn(4, 8)
    q = octav_fx.quantize(float_module, x)
    for change in (lambda m: m[1].eval(), lambda m: m[2].eval(), lambda m: m.train(), lambda m: m.eval()):
        for m in (float_module, q):
            change(m if m is float_module else Indexed(m))
        alike(q, float_module, x)


class Indexed:
    """A quantized Sequential, indexed as the float one."""

    def __init__(self, q: Any) -> None:
        self.q = q

    def __getitem__(self, i: int) -> nn.Module:
        return self.q.get_submodule(str(i))  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.q, name)


def test_the_gradient_mode_counts_where_forward_asks_for_it() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.a(x) + 1 if torch.is_grad_enabled() else self.b(x)

    float_module, x = model(forward, a=nn.Linear(8, 8), b=nn.Linear(8, 8)), torch.randn(4, 8)
    q = octav_fx.quantize(float_module, x)
    assert isinstance(q, WholeModule)
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            alike(q, float_module, x)
    assert len(q.graphs_of(False)) == 2


def auxiliary(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    self.aux = y.square().mean()
    self.b.aux = {"mean": y.mean(), "all": [y]}
    return self.b(y)


def logged(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    self.log["mean"] = y.mean()
    return self.b(y)


@pytest.mark.parametrize("compiled", [False, True])
def test_what_forward_stores_is_of_the_last_call_and_has_its_gradient(compiled: bool) -> None:
    float_module, x = model(auxiliary, a=nn.Linear(8, 8), b=nn.Linear(8, 8)), torch.randn(4, 8)
    q = octav_fx.quantize(float_module, x)
    assert isinstance(q, WholeModule) and not hasattr(q, "aux")
    torch._dynamo.reset()
    run = torch.compile(q, backend="eager") if compiled else q
    for scale in (1, 10):
        run(scale * x)
        with without_quantizers(q):
            float_module(scale * x)
            q(scale * x)
            torch.testing.assert_close(q.aux, float_module.aux, **CLOSE)
            torch.testing.assert_close(q.b.aux["mean"], float_module.b.aux["mean"], **CLOSE)
    run(x)
    (q.aux + q.b.aux["all"][0].sum()).backward()
    assert q.a.weight.grad is not None and q.a.weight.grad.abs().sum() > 0
    copied = copy.deepcopy(q)
    assert torch.equal(copied(x), q(x)) and torch.equal(copied.aux, q.aux)


def test_a_log_keeps_what_else_is_in_it() -> None:
    float_module, x = model(logged, a=nn.Linear(8, 8), b=nn.Linear(8, 8)), torch.randn(4, 8)
    float_module.log = {"epoch": 1}
    q = octav_fx.quantize(float_module, x)
    kept = q.log
    q(x)
    assert q.log is kept and sorted(kept) == ["epoch", "mean"] and kept["mean"].requires_grad
    assert isinstance(q, WholeModule) and len(q.graphs_of(False)) == 1


def test_what_is_stored_is_no_part_of_a_converted_model() -> None:
    float_module, x = model(auxiliary, a=nn.Linear(8, 8), b=nn.Linear(8, 8)), torch.randn(4, 8)
    q = octav_fx.freeze(octav_fx.calibrate(octav_fx.quantize(float_module, x), [x]))
    converted = octav_fx.convert(q)
    assert converted(x).shape == (4, 8) and "store_" not in converted.code
    assert len(list(torch.export.export(q, (x,)).graph.nodes)) > 0


def seed() -> None:
    random.seed(0)
    np.random.seed(0)


def counting(self: Any, x: Tensor) -> Tensor:
    self.n = getattr(self, "n", 0) + 1
    return self.b(self.a(x)) * self.n


def appending(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    self.losses.append(y.mean())
    return self.b(y)


def caching(self: Any, x: Tensor) -> Tensor:
    k = self.a(x)
    self.cache = k if self.cache is None else torch.cat([self.cache, k])
    return self.b(self.cache)


def numpys(self: Any, x: Tensor) -> Tensor:
    return self.a(x) if np.random.rand() < 0.5 else self.b(x)


def pythons(self: Any, x: Tensor) -> Tensor:
    return [self.a, self.b][random.randint(0, 1)](x)


def timed(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x)) * (time.time() > 0)


NOT_HELD = {
    "a counter": (counting, {"n": 0}, "reads n and changes it"),
    "a growing list": (appending, {"losses": []}, "reads losses and changes it"),
    "a cache": (caching, {"cache": None}, "cache from its own last value|reads cache and changes it"),
    "chance of NumPy": (numpys, {}, "random numbers of Python or NumPy"),
    "chance of Python": (pythons, {}, "random numbers of Python or NumPy"),
    "the clock": (timed, {}, r"test_state\.py:\d+: forward reads the clock"),
}


@pytest.mark.parametrize("name", NOT_HELD)
def test_what_no_graph_can_hold_is_the_models_own_python(name: str) -> None:
    forward, attributes, words = NOT_HELD[name]
    float_module, x = model(forward, a=nn.Linear(8, 8), b=nn.Linear(8, 8)), torch.randn(4, 8)
    vars(float_module).update(copy.deepcopy(attributes))
    q = octav_fx.quantize(float_module, x)
    assert isinstance(q, PartialModule) and all(vars(q)[key] == value for key, value in attributes.items())
    assert re.search(words, octav_fx.table(q))
    for _ in range(4):
        seed()
        expected = float_module(x)
        seed()
        with without_quantizers(q):
            torch.testing.assert_close(q(x), expected, **CLOSE)
    for key in attributes:
        torch.testing.assert_close(getattr(q, key), getattr(float_module, key), **CLOSE)


class Flagged(nn.Module):
    """As PEFT's layers: what the class says for all, until someone sets it on one."""

    doubles = False

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.fc(x) if self.doubles else self.fc(x)


def test_a_value_of_the_class_that_is_set_on_one_module_is_followed() -> None:
    q, x = octav_fx.quantize(Flagged(), torch.randn(2, 4)), torch.randn(2, 4)
    before = q(x)
    q.doubles = True
    assert torch.equal(q(x), 2 * before)
    del q.doubles
    assert torch.equal(q(x), before)
