"""What is another one in each call: the clock, unique names, files. A graph has none of them.

A time may be computed with and printed, which a graph leaves out. Where it decides, enters a tensor or is kept, where
its text is taken for anything but a message, and where forward asks for anything else of these, the capture stops.
"""

import builtins
import datetime
import dis
import inspect
import operator
import os
import random
import secrets
import sys
import time
import traceback
import types
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import torch
from torch import nn

from octav_fx.capture.chance import SEEDS
from octav_fx.capture.contents import CLOSED
from octav_fx.capture.user_stack import caller, told_by
from octav_fx.errors import NotCaptured

if TYPE_CHECKING:
    from octav_fx.capture.symbolic.tracer import ValueTracer

_CLOCK: Final = "reads the clock, which is another one in each call"
_UNIQUE: Final = "asks for what is another one in each call"
_FILE: Final = "asks for a file, which is another one in each call"
_OF_AUTOCAST: Final = (
    *("set_autocast_enabled", "set_autocast_cpu_enabled", "set_autocast_dtype", "set_autocast_cpu_dtype"),
    *("set_autocast_gpu_dtype", "set_autocast_cache_enabled"),
)
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
    (torch, SEEDS, ("manual_seed",)),
    (torch.random, SEEDS, ("manual_seed",)),
    (torch, "turns autocast on or off by hand, which a graph does not", _OF_AUTOCAST),
    (torch, "asks for inference mode, in which no graph is captured", ("is_inference_mode_enabled",)),
)


def _stop(*_: Any) -> NoReturn:
    raise NotCaptured(f"{caller()}: forward {_CLOCK}")


def _computed(operation: Callable[..., Any]) -> Callable[..., Any]:
    """Return an operation on moments and plain values, whose result is a moment, too."""

    def call(*operands: Any) -> Any:
        values = [operand._value if type(operand) is Moment else operand for operand in operands]
        # A node would hold the number.
        if not all(isinstance(value, _OPERANDS) for value in values):
            return NotImplemented
        found = operation(*values)
        return tuple(map(Moment, found)) if isinstance(found, tuple) else Moment(found)

    return call


def _told(written: Callable[..., str]) -> Callable[..., str]:
    """Return a conversion to text that stops where the text is not for a reader alone."""

    def call(moment: Any, *form: Any) -> str:
        _stop_unless_told()
        return written(moment._value, *form)

    return call


def _printed(kind: Callable[..., Any]) -> Callable[..., Any]:
    """Return a conversion to a number for "%.1f" % moment alone, which a logger writes, too."""

    def call(moment: Any) -> Any:
        frame = sys._getframe(1)
        steps = dis.get_instructions(frame.f_code)
        if not any(step.offset == frame.f_lasti and step.argrepr in ("%", "%=") for step in steps):
            _stop()
        _stop_unless_told()
        return kind(moment._value)

    return call


def _stop_unless_told() -> None:
    frames = [frame for frame, _ in traceback.walk_stack(sys._getframe(1))]
    libraries = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame in frames]
    # A logger writes what it was told, by handlers of whatever library.
    if "logging" not in libraries:
        nearest = next((f for f, name in zip(frames, libraries, strict=True) if name not in CLOSED), None)
        if nearest is None or told_by(nearest) is None:
            _stop()


class Moment:
    """A time, a date, or what is computed from these alone: it prints as what it is, and decides nothing.

    No number: what is written in C takes those as they are, math.sin(time.time()) among it.
    """

    __slots__ = ("_value",)

    def __init__(self, value: Any) -> None:
        self._value = value

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            # Those who look at values of any kind ask for such.
            raise AttributeError(name)
        if name in _NUMBERS:
            return lambda: Moment(getattr(self._value, name)())
        if name not in _TEXTS:
            _stop()
        _stop_unless_told()
        return getattr(self._value, name)

    __repr__, __str__, __format__ = _told(repr), _told(str), _told(format)
    __neg__, __pos__, __abs__ = _computed(operator.neg), _computed(operator.pos), _computed(abs)
    __round__ = _computed(round)
    __int__, __float__ = _printed(int), _printed(float)
    __bool__ = __trunc__ = __floor__ = __ceil__ = __index__ = __complex__ = _stop
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = __hash__ = _stop


for _do in (operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, pow, divmod):
    setattr(Moment, f"__{_do.__name__}__", _computed(_do))
    setattr(Moment, f"__r{_do.__name__}__", _computed(lambda one, other, do=_do: do(other, one)))

_OPERANDS: Final = (int, float, datetime.date, datetime.timedelta)
# What dates and spans are asked for.
_NUMBERS: Final = ("total_seconds", "timestamp")
_TEXTS: Final = ("strftime", "isoformat")


@contextmanager
def opaque_clocks(tracer: "ValueTracer", root: nn.Module) -> Iterator[None]:
    """Give forward opaque times inside, and raise NotCaptured where it asks for what no graph has."""
    files = globals_of(root)

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


def globals_of(root: nn.Module) -> dict[int, dict[str, Any]]:
    """Return the globals of each file that has a forward, and of the user's functions there, by identity."""
    forwards = [inspect.getattr_static(kind, "forward", None) for kind in {type(m) for m in root.modules()}]
    files = _files(forwards)
    return files | _files([value for names in files.values() for value in names.values()])


def _files(values: Iterable[Any]) -> dict[int, dict[str, Any]]:
    # What decorates a function says that it is the user's, in a file of torch.
    functions = [inspect.unwrap(value) for value in values if isinstance(value, types.FunctionType)]
    return {id(function.__globals__): function.__globals__ for function in functions if is_users(function)}


def is_users(function: Any) -> bool:
    """Tell whether a value is a function of the user's own files."""
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
            found = getattr(kind, name)(*args, **kwargs)
            return Moment(found) if is_asked() else found

        return staticmethod(call)

    names = {name: read(name) for name in ("now", "utcnow", "today") if hasattr(kind, name)}
    return Meta(kind.__name__, (kind,), names)
