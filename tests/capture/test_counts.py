"""kept_counts: quantize, and a graph for a new kind of calls, move no count of forward on, wherever it is kept."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import octav_fx
from octav_fx.capture.modules import graphs_of
from tests.support.alike import silent_quantizers

CALLS, TOTAL = 0, 0.0
LENGTHS: list[int] = []
STATISTICS = {"calls": 0}
IS_READY, FACTOR = False, 0


class Log:
    calls = 0


LOG = Log()


def counter() -> tuple[Callable[[], None], Callable[[], int]]:
    count = 0

    def step() -> None:
        nonlocal count
        count += 1

    return step, lambda: count


STEP, COUNT = counter()


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        global CALLS, TOTAL
        CALLS += 1
        TOTAL += 0.5
        LENGTHS.append(x.shape[1])
        STATISTICS["calls"] += 1
        LOG.calls += 1
        STEP()
        return self.fc(x) * scale * (2 if CALLS > 3 else 1)


def counts() -> Any:
    return CALLS, TOTAL, list(LENGTHS), dict(STATISTICS), LOG.calls, COUNT()


def test_counts() -> None:
    model = Counting()
    assert counts() == (0, 0.0, [], {"calls": 0}, 0, 0)
    q = octav_fx.quantize(model, torch.randn(2, 5, 8))
    assert counts() == (0, 0.0, [], {"calls": 0}, 0, 0)
    x = torch.randn(3, 7, 8)
    with silent_quantizers():
        for scale in (1.0, 2.0, 2.0):
            torch.testing.assert_close(q(x, scale), model.fc(x) * scale)
        assert counts() == (3, 1.5, [7, 7, 7], {"calls": 3}, 3, 3)
        torch.testing.assert_close(q(x), model.fc(x) * 2)


class SetsOnce(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        global IS_READY, FACTOR
        if not IS_READY:
            IS_READY, FACTOR = True, 3
        return self.fc(x) * FACTOR


@pytest.mark.usefixtures("not_ready")
def test_what_a_graph_holds_for_stays() -> None:
    model, x = SetsOnce(), torch.randn(2, 8)
    q = octav_fx.quantize(model, x)
    assert graphs_of(q) is not None and (IS_READY, FACTOR) == (True, 3)
    with silent_quantizers():
        torch.testing.assert_close(q(x), model.fc(x) * 3)


@pytest.fixture
def not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "IS_READY", False)
