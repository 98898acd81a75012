"""What forward keeps outside of its modules: the module runs its own Python, which finds there what it has put in."""

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import octav_fx
from octav_fx.capture.partial import partial_lines
from octav_fx.capture.symbolic.clocks import Moment
from octav_fx.capture.symbolic.proxies import PROXIES
from tests.support.alike import silent_quantizers

x, longer = torch.randn(2, 5, 8), torch.randn(3, 7, 8)
SEEN: list[Any] = []
TABLE: dict[Any, Any] = {}
LENGTHS: dict[str, list[Any]] = {"seen": []}
FIRST = None


class Config:
    last: Any = 1


class Stats:
    def __init__(self) -> None:
        self.last: Any = 1


STATS = Stats()


class Net(nn.Module):
    last: Any = 1

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def keep(self, x: Tensor) -> Any:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) * self.keep(x)


class InList(Net):
    def keep(self, x: Tensor) -> Any:
        SEEN.append((x.shape[1], time.time()))
        return SEEN[-1][0]


class InListBelow(Net):
    def keep(self, x: Tensor) -> Any:
        LENGTHS["seen"].append(x.shape[1])
        return LENGTHS["seen"][-1]


class InTable(Net):
    def keep(self, x: Tensor) -> Any:
        TABLE[x.shape[0]] = x.mean()
        return x.shape[1]


class InGlobal(Net):
    def keep(self, x: Tensor) -> Any:
        global FIRST
        FIRST = x.shape[1]
        return FIRST


class InClass(Net):
    def keep(self, x: Tensor) -> Any:
        Config.last = x.shape[1]
        return Config.last


class InItsClass(Net):
    def keep(self, x: Tensor) -> Any:
        type(self).last = time.time()
        return x.shape[1]


class InObject(Net):
    def keep(self, x: Tensor) -> Any:
        STATS.last = x.shape[1]
        return STATS.last


class InDefault(Net):
    def keep(self, x: Tensor, seen: list[Any] = []) -> Any:  # noqa: B006
        seen.append(x.shape[1])
        return seen[-1]


def default() -> list[Any]:
    return (InDefault.keep.__defaults__ or ())[0]


@pytest.mark.parametrize(
    ("kind", "last"),
    [
        (InList, lambda: SEEN[-1][0]),
        (InListBelow, lambda: LENGTHS["seen"][-1]),
        (InTable, lambda: 7 if list(TABLE)[-1] == 3 else None),
        (InGlobal, lambda: FIRST),
        (InClass, lambda: Config.last),
        (InItsClass, lambda: 7 if time.time() - InItsClass.last < 1e3 else None),
        (InObject, lambda: STATS.last),
        (InDefault, lambda: default()[-1]),
    ],
)
def test_what_is_kept_is_that_of_the_call(kind: type[Net], last: Any) -> None:
    q: Any = octav_fx.quantize(kind(), x)
    (line,) = partial_lines(q)
    assert "a graph has no memory" in line
    with silent_quantizers():
        torch.testing.assert_close(q(longer), q.b(q.a(longer)) * 7)
    assert last() == 7
    everything = (
        *SEEN,
        LENGTHS["seen"],
        TABLE.items(),
        [*TABLE, FIRST, Config.last, InItsClass.last, STATS.last],
        default(),
    )
    assert not any(type(item) in (*PROXIES, Moment) for held in everything for item in held)
