"""Constants: a plain value that users set anew, on a layer or in a file, makes a new graph."""

import os
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import octav_fx
from octav_fx.capture.constants import Constants
from octav_fx.capture.partial import partial_lines
from tests.support import elsewhere

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
    found = {held.where: dict(zip(held.names, held.values, strict=True)) for held in Constants.of(Net()).attributes}
    assert found.keys() == {"a layer", __name__}
    assert found[__name__] == {"FACTOR": 2.0, "SIGN": True}


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

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) * SETTINGS.twice() * SETTINGS.below.gain * Settings.depth * TABLE["factor"] * elsewhere.FACTOR
        return -y if os.environ.get("OCTAV_FX_TEST_SIGN", "0") == "1" else y


@pytest.mark.parametrize(
    ("holder", "name", "value"),
    [
        (SETTINGS, "gain", -1.0),
        (SETTINGS.below, "gain", -1.0),
        (Settings, "depth", -1.0),
        (TABLE, "factor", -1.0),
        (elsewhere, "FACTOR", -1.0),
        (os.environ, "OCTAV_FX_TEST_SIGN", "1"),
    ],
)
def test_what_lies_below_a_global_is_followed(
    monkeypatch: pytest.MonkeyPatch, holder: Any, name: str, value: Any
) -> None:
    model, x = Configured().eval(), torch.randn(4, 8)
    q = octav_fx.quantize(model, x)
    torch.compiler.reset()
    compiled = torch.compile(q, backend="eager", fullgraph=True)
    before = q(x)
    assert torch.equal(compiled(x), before)
    change = monkeypatch.setattr if not hasattr(holder, "get") else monkeypatch.setitem
    change(holder, name, value)
    after = q(x)
    assert torch.equal(after, -before)
    assert torch.equal(compiled(x), after)
    monkeypatch.undo()
    assert torch.equal(compiled(x), before)


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
