"""What is another one in each call: printed it costs nothing, else the module that asks for it runs its own Python."""

import datetime
import logging
import math
import secrets
import time
import uuid
from collections.abc import Callable
from datetime import datetime as imported_datetime
from time import perf_counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import octav_fx
from octav_fx.capture.partial import PartialModule, partial_lines
from octav_fx.capture.symbolic.clocks import Moment
from octav_fx.errors import NotCaptured

x = torch.randn(2, 5, 8)


class Asks(nn.Module):
    def __init__(self, ask: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.ask, self.a, self.b, self.seconds = ask, nn.Linear(8, 8), nn.Linear(8, 8), 0.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        factor = self.ask(self)
        return self.b(y) * (1 if factor is None else factor)


class Around(nn.Module):
    def __init__(self, ask: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.first, self.asks, self.block = nn.Linear(8, 8), Asks(ask), nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.asks(self.first(x)))


def says_how_long(_: nn.Module) -> None:
    begin, there = perf_counter(), datetime.datetime.now()
    took = round(1e3 * (time.perf_counter() - begin), 2)
    print(f"{took:.2f} ms, {abs(-took)} ms, %.1f s" % time.time())
    print(f"{there:%H:%M} {datetime.datetime.now() - there} {(imported_datetime.now() - there).total_seconds()}")
    logging.getLogger("octav_fx.test_clocks").critical("%d s, %.1f s", time.time(), took)
    print(isinstance(there, datetime.date) and issubclass(imported_datetime, datetime.date))
    print(datetime.datetime(2000, 1, 2).year)


def test_a_time_that_is_printed_costs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    q = octav_fx.quantize(Around(says_how_long), x)
    assert partial_lines(q) == [] and octav_fx.coverage(q).skipped == []
    said = capsys.readouterr().out
    assert "True\n2000" in said and "False" not in said and "object" not in said
    assert not any(type(read()) is Moment for read in (time.time, perf_counter, datetime.datetime.now))
    assert time.time is not perf_counter and datetime.datetime is imported_datetime


def keeps(module: Any) -> None:
    module.seconds = time.time()


def decides(_: nn.Module) -> int:
    begin = perf_counter()
    return 2 if perf_counter() - begin > 100 else 1


ASKED: dict[str, Callable[[Any], Any]] = {
    "time.time() of the module": lambda _: time.time(),
    "perf_counter() of its own": lambda _: perf_counter(),
    "datetime.now()": lambda _: datetime.datetime.now().timestamp(),
    "an attribute of datetime.now()": lambda _: imported_datetime.now().microsecond,
    "a number of seconds": lambda _: (datetime.datetime.now() - datetime.datetime.now()).total_seconds(),
    "a date of today": lambda _: datetime.date.today().year,
    "int": lambda _: int(time.time()),
    "localtime": lambda _: time.localtime().tm_sec,
    "uuid4": lambda _: uuid.uuid4().int % 1000003,
    "secrets": lambda _: secrets.randbelow(1000003),
    "math.sin": lambda _: math.sin(time.time()),
    "math.fmod": lambda _: math.fmod(perf_counter(), 1.0),
    "a tensor": lambda _: torch.tensor(time.time()),
    "kept": keeps,
    "decides": decides,
}


MOMENTS: dict[str, Callable[[Any], Any]] = {
    "divmod": lambda t: float(divmod(t, 60)[1]),
    "of another number": lambda t: int(10**12 // t),
    "the rest": lambda t: 10**12 % t > 1,
    "a power": lambda t: math.floor(0.5**t),
    "is_integer": lambda t: t.is_integer(),
    "real": lambda t: t.real,
    "twice": lambda t: float(+t + t),
    "math.sin": lambda t: math.sin(t),
    "math.fmod": lambda t: math.fmod(t, 1.0),
    "a sum": lambda t: math.fsum([t, 1.0]),
    "an index": lambda t: [1, 2, 3][t],
    "the rest of a number": lambda t: float(t) % 2,
    "its last digit": lambda t: int(str(t)[-1]),
    "a key": lambda t: {"2": 3}.get(f"{t:.0f}"),
    "a number again": lambda t: float("%.1f" % t),  # noqa: UP031
}
SPANS: dict[str, Callable[[Any], Any]] = {
    "a sum": lambda span: bool(span + datetime.timedelta(1)),
    "abs": lambda span: abs(span) < datetime.timedelta(1),
    "in minutes": lambda span: round(span / datetime.timedelta(minutes=1)) == 1,
    "the rest": lambda span: {span % datetime.timedelta(minutes=1)},
    "days": lambda span: span.days,
}
DATES: dict[str, Callable[[Any], Any]] = {
    "isoweekday": lambda date: date.isoweekday(),
    "isocalendar": lambda date: date.isocalendar(),
    "later": lambda date: (date + datetime.timedelta(1)).isoweekday(),
    "utctimetuple": lambda date: date.utctimetuple(),
    "strftime": lambda date: int(date.strftime("%H")),
    "isoformat": lambda date: date.isoformat() > "2000",
}


@pytest.mark.parametrize(
    ("value", "ask"),
    [
        *((2.0, ask) for ask in MOMENTS.values()),
        *((datetime.timedelta(1), ask) for ask in SPANS.values()),
        *((datetime.datetime(2000, 1, 2), ask) for ask in DATES.values()),
    ],
    ids=[*MOMENTS, *SPANS, *DATES],
)
def test_what_is_computed_from_a_time_is_one_or_stops(value: Any, ask: Callable[[Any], Any]) -> None:
    with pytest.raises(NotCaptured, match="reads the clock"):
        ask(Moment(value))


def test_a_tensor_takes_no_time() -> None:
    for compute in (lambda t: torch.ones(2) * t, lambda t: t * torch.ones(2), torch.tensor):
        with pytest.raises((TypeError, RuntimeError)):
            compute(Moment(2.0))


@pytest.mark.slow
@pytest.mark.parametrize("name", ASKED)
def test_only_the_module_that_asks_runs_its_own_python(name: str) -> None:
    q = octav_fx.quantize(Around(ASKED[name]), x)
    around, asks = partial_lines(q)
    assert around.startswith("the model: in parts") and asks.startswith("asks: in parts")
    assert "test_clocks.py" in asks and isinstance(q.asks, PartialModule)
    # Its children and those around it are quantized.
    assert octav_fx.coverage(q).skipped == []


class Decorated(nn.Module):
    """Its forward is a function of torch's, with the name of the user's file."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            y = self.fc(x)
        return y.float() * (time.perf_counter_ns() % 1000003)


def test_a_decorator_hides_no_file_and_brings_none_of_torchs() -> None:
    q = octav_fx.quantize(nn.Sequential(Decorated()), x)
    assert not torch.equal(q(x), q(x))
    (reason,) = (line for line in partial_lines(q) if line.startswith("0: in parts"))
    assert "test_clocks.py" in reason and "clock" in reason


@pytest.mark.slow
def test_a_time_goes_on() -> None:
    q = octav_fx.quantize(Around(lambda _: time.perf_counter_ns() % 1000003), x)
    assert not torch.equal(q(x), q(x))
    q = octav_fx.quantize(Around(keeps), x)
    q(x)
    assert type(q.asks.seconds) is float and q.asks.seconds > 0
