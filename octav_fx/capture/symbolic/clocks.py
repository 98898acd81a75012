"""What is another one in each call: the clock, unique names, files. A graph has none of them.

A time may be subtracted and printed, which a graph leaves out. Where it decides, enters a tensor or is kept, and where
forward asks for anything else of these, the capture stops.
"""

import builtins
import datetime
import inspect
import os
import random
import secrets
import sys
import time
import types
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import torch
from torch import nn

from octav_fx.capture.module_state import CLOSED
from octav_fx.capture.user_stack import caller
from octav_fx.errors import NotCaptured

if TYPE_CHECKING:
    from octav_fx.capture.symbolic.tracer import ValueTracer

_CLOCK: Final = "reads the clock, which is another one in each call"
_UNIQUE: Final = "asks for what is another one in each call"
_FILE: Final = "asks for a file, which is another one in each call"
_CLOCKS: Final = (
    *("time", "perf_counter", "monotonic", "process_time", "thread_time"),
    *("time_ns", "perf_counter_ns", "monotonic_ns", "process_time_ns", "thread_time_ns"),
)
# Functions, and what forward does that calls one.
_REFUSED: Final[tuple[tuple[Any, str, tuple[str, ...]], ...]] = (
    (time, _CLOCK, ("localtime", "gmtime", "ctime", "asctime", "strftime")),
    (uuid, _UNIQUE, ("uuid1", "uuid4")),
    (os, _UNIQUE, ("urandom",)),
    (secrets, _UNIQUE, ("choice", "randbelow", "randbits", "token_bytes", "token_hex", "token_urlsafe")),
    (random, _UNIQUE, ("SystemRandom",)),
    (builtins, _FILE, ("open",)),
    (torch, _FILE, ("load",)),
    (os, _FILE, ("listdir", "stat")),
    (os.path, _FILE, ("exists", "isfile", "isdir", "getmtime")),
    (Path, _FILE, ("exists", "is_file", "open", "read_text", "read_bytes")),
    (torch, "seeds torch's generator, which a graph does not", ("manual_seed",)),
    (torch, "asks for inference mode, in which no graph is captured", ("is_inference_mode_enabled",)),
)


def _stop(*_: Any) -> NoReturn:
    raise NotCaptured(f"{caller()}: forward {_CLOCK}")


def _moment(operation: Callable[..., Any]) -> Callable[..., Any]:
    def call(*values: Any) -> Any:
        found = operation(*values)
        return Moment(found) if isinstance(found, (int, float)) else found

    return call


class Moment(float):
    """A time in seconds or nanoseconds, or what is computed from one alone: it prints as it is, and decides nothing."""

    __add__, __radd__ = _moment(float.__add__), _moment(float.__radd__)
    __sub__, __rsub__ = _moment(float.__sub__), _moment(float.__rsub__)
    __mul__, __rmul__ = _moment(float.__mul__), _moment(float.__rmul__)
    __truediv__, __rtruediv__ = _moment(float.__truediv__), _moment(float.__rtruediv__)
    __neg__, __pos__, __abs__ = _moment(float.__neg__), _moment(float.__pos__), _moment(float.__abs__)
    __round__ = _moment(float.__round__)
    __bool__ = __int__ = __float__ = __trunc__ = __floor__ = __ceil__ = _stop
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __divmod__ = __rdivmod__ = __pow__ = __rpow__ = _stop
    is_integer = as_integer_ratio = hex = conjugate = _stop
    real = imag = property(_stop)
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = __hash__ = _stop


class _Span(datetime.timedelta):
    """The time between two dates."""

    def total_seconds(self) -> float:
        """Return it in seconds."""
        return Moment(super().total_seconds())

    days = seconds = microseconds = property(_stop)
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __neg__ = __pos__ = __abs__ = _stop
    __truediv__ = __floordiv__ = __mod__ = __divmod__ = _stop
    __bool__ = __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = __hash__ = _stop


class _Date(datetime.datetime):
    """A date of the call: the difference to another one is a _Span, and both print."""

    def __sub__(self, other: Any) -> Any:
        difference = super().__sub__(other)
        return _Span(0, difference.total_seconds()) if isinstance(difference, datetime.timedelta) else difference

    def timestamp(self) -> float:
        """Return it in seconds."""
        return Moment(super().timestamp())

    def __format__(self, form: str) -> str:
        return format(datetime.datetime.fromisoformat(self.isoformat()), form)

    def strftime(self, form: str) -> str:
        """Return it as text."""
        return format(self, form)

    year = month = day = hour = minute = second = microsecond = property(_stop)
    date = time = timetz = weekday = isoweekday = isocalendar = toordinal = timetuple = utctimetuple = _stop
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = __hash__ = _stop


OPAQUE: Final = (Moment, _Date, _Span)


@contextmanager
def opaque_clocks(tracer: "ValueTracer", root: nn.Module) -> Iterator[None]:
    """Give forward opaque times inside, and raise NotCaptured where it asks for what no graph has."""
    files = _files(root)

    def is_asked() -> bool:
        return not tracer.evaluating and id(sys._getframe(2).f_globals) in files

    def opaque(original: Callable[..., Any]) -> Callable[..., Any]:
        def call() -> Any:
            return Moment(original()) if is_asked() else original()

        return call

    def refused(original: Callable[..., Any], what: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if is_asked():
                raise NotCaptured(f"{caller()}: forward {what}")
            return original(*args, **kwargs)

        return call

    places: list[tuple[Any, str, Any]] = [(time, name, opaque(getattr(time, name))) for name in _CLOCKS]
    places += [(datetime, name, _shadow(getattr(datetime, name), is_asked)) for name in ("datetime", "date")]
    places += [(place, name, refused(getattr(place, name), what)) for place, what, names in _REFUSED for name in names]
    by_original = {id(getattr(place, name)): shadow for place, name, shadow in places}
    # from time import perf_counter
    held = [(names, name) for names in files.values() for name, value in names.items() if id(value) in by_original]
    originals = [getattr(place, name) for place, name, _ in places]
    imported = [names[name] for names, name in held]
    try:
        for place, name, shadow in places:
            setattr(place, name, shadow)
        for names, name in held:
            names[name] = by_original[id(names[name])]
        yield
    finally:
        for (place, name, _), original in zip(places, originals, strict=True):
            setattr(place, name, original)
        for (names, name), original in zip(held, imported, strict=True):
            names[name] = original


def _files(root: nn.Module) -> dict[int, dict[str, Any]]:
    """Return the globals of each file that has a forward, and of the user's functions there, by identity."""
    forwards = (inspect.getattr_static(kind, "forward", None) for kind in {type(m) for m in root.modules()})
    files = {id(f.__globals__): f.__globals__ for f in forwards if _is_users(f)}
    files |= {id(f.__globals__): f.__globals__ for names in [*files.values()] for f in names.values() if _is_users(f)}
    return files


def _is_users(function: Any) -> bool:
    is_function = isinstance(function, types.FunctionType)
    return is_function and (function.__module__ or "").partition(".")[0] not in CLOSED


def _shadow(kind: Any, is_asked: Callable[[], bool]) -> Any:
    """Return what stands for datetime or date: a class whose now() is opaque, and else what the class is."""

    class Meta(type):
        def __instancecheck__(cls, x: Any) -> bool:
            return isinstance(x, kind)

        def __subclasscheck__(cls, other: type) -> bool:
            return issubclass(other, kind)

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            return kind(*args, **kwargs)

    def read(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not is_asked():
                return getattr(kind, name)(*args, **kwargs)
            if kind is datetime.date:
                _stop()
            return getattr(_Date, name)(*args, **kwargs)

        return staticmethod(call)

    names = {name: read(name) for name in ("now", "utcnow", "today") if hasattr(kind, name)}
    return Meta(kind.__name__, (kind,), names)
