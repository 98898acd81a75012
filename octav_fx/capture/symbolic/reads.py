"""What forward looks at besides its arguments: plain attributes of modules, the gradient mode, the clock, chance."""

import builtins
import inspect
import random
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from octav_fx.capture.kinds import MISSING, PLAIN, kind_of
from octav_fx.capture.user_stack import caller, is_users
from octav_fx.compat.modules import PART_ATTRIBUTES
from octav_fx.errors import NotCaptured

if TYPE_CHECKING:
    from octav_fx.capture.symbolic.tracer import ValueTracer

# What nn.Module keeps for itself; the mode has a flag of its own.
_INTERNAL: Final = frozenset({*vars(nn.Module()), "_is_hf_initialized"})
_CLOCKS: Final = ("time", "time_ns", "perf_counter", "perf_counter_ns", "monotonic", "process_time")


@dataclass
class Reads:
    """Plain attributes by module and name, each with its kind before the trace; and the gradient mode if asked for."""

    attributes: dict[tuple[nn.Module, str], Any] = field(default_factory=dict)
    # The same of values that the class of the module has, too: what sets them may be the user, on one module.
    defaults: dict[tuple[nn.Module, str], Any] = field(default_factory=dict)
    # Set before it was read: what was there before does not matter.
    written: set[tuple[nn.Module, str]] = field(default_factory=set)
    gradient_mode: bool | None = None

    def remembered(self) -> list[tuple[nn.Module, str]]:
        """Return the attributes that forward has both read and changed."""
        return [key for key, kind in self.attributes.items() if kind_of(_plain(*key)) != kind]

    def settings(self) -> dict[tuple[nn.Module, str], Any]:
        """Return the plain values that forward has read and not changed, those of classes too."""
        return self.attributes | {key: kind for key, kind in self.defaults.items() if kind_of(_plain(*key)) == kind}


def _plain(module: nn.Module, name: str) -> Any:
    """Return a plain attribute, of the module or its class, None for a parameter or buffer without a value, or MISSING.

    MISSING also stands for what only a class has and is no plain value: methods and properties.
    """
    held = object.__getattribute__(module, "__dict__")
    if name in held:
        return held[name]
    parts = [held[kind] for kind in PART_ATTRIBUTES if name in held.get(kind, ())]
    return _of_class(module, name) if not parts else parts[0][name]


def _of_class(module: nn.Module, name: str) -> Any:
    """Return the plain value that a user's class gives its modules, MISSING for all else that a class has."""
    kinds = type(module).__mro__
    found = next((vars(kind)[name] for kind in kinds[: kinds.index(nn.Module)] if name in vars(kind)), MISSING)
    return found if isinstance(found, PLAIN) else MISSING


@contextmanager
def watched_reads(tracer: "ValueTracer", root: nn.Module) -> Iterator[Reads]:
    """Note what forward reads inside. Raise NotCaptured where it asks for what differs in each call."""
    reads = Reads()
    with (
        _without_chance(),
        _without_clocks(tracer, root),
        _watched_gradient_mode(tracer, reads),
        _watched_attributes(tracer, reads),
    ):
        yield reads


@contextmanager
def _without_chance() -> Iterator[None]:
    numpy = sys.modules.get("numpy")
    drawn, of_numpy = random.getstate(), None if numpy is None else numpy.random.get_state()
    yield
    is_drawn = random.getstate() != drawn
    random.setstate(drawn)
    if numpy is not None and of_numpy is not None:
        now = numpy.random.get_state()
        is_drawn = is_drawn or now[2:] != of_numpy[2:] or bool((now[1] != of_numpy[1]).any())
        numpy.random.set_state(of_numpy)
    if is_drawn:
        raise NotCaptured("forward draws random numbers of Python or NumPy, which are others in each call")


@contextmanager
def _watched_attributes(tracer: "ValueTracer", reads: Reads) -> Iterator[None]:
    original: Any = nn.Module.__setattr__

    def read(module: nn.Module, name: str) -> Any:
        key = (module, name)
        value = MISSING if name in _INTERNAL or tracer.evaluating else _plain(module, name)
        if isinstance(value, Tensor) and key not in reads.written:
            tracer.read_first.add(key)
        # A value of the class that forward changes on the module is one that it makes anew, not one that it needs.
        is_default = hasattr(type(module), name)
        if is_default and value is not MISSING and isinstance(value, PLAIN) and key not in reads.written:
            reads.defaults.setdefault(key, kind_of(value))
        if name not in _INTERNAL and not tracer.evaluating and not is_default:
            # Tensors and modules have nodes of their own.
            is_part = isinstance(value, (nn.Module, Tensor))
            # Tracers look for names that are free.
            is_probe = value is MISSING and not is_users(sys._getframe(1))
            if not is_part and not is_probe and key not in reads.attributes and key not in reads.written:
                reads.attributes[key] = kind_of(value)
        return object.__getattribute__(module, name)

    def write(module: nn.Module, name: str, value: Any) -> None:
        if not tracer.evaluating and (module, name) not in reads.attributes:
            reads.written.add((module, name))
        original(module, name, value)

    kind: Any = nn.Module
    kind.__getattribute__, kind.__setattr__ = read, write
    try:
        yield
    finally:
        del kind.__getattribute__
        kind.__setattr__ = original


@contextmanager
def _watched_gradient_mode(tracer: "ValueTracer", reads: Reads) -> Iterator[None]:
    """Answer with the mode of the caller where forward has not changed it: the trace itself has gradients on."""
    original, outer = torch.is_grad_enabled, torch.is_grad_enabled()

    def asked() -> bool:
        if tracer.evaluating or not is_users(sys._getframe(1)):
            return original()
        reads.gradient_mode = outer
        return outer and original()

    torch.is_grad_enabled = asked
    try:
        yield
    finally:
        torch.is_grad_enabled = original


@contextmanager
def _without_clocks(tracer: "ValueTracer", root: nn.Module) -> Iterator[None]:
    def refused(original: Callable[..., Any], what: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not tracer.evaluating and id(sys._getframe(1).f_globals) in files:
                raise NotCaptured(f"{caller()}: forward {what}, which is another one in each call")
            return original(*args, **kwargs)

        return call

    forwards = (inspect.getattr_static(type(m), "forward", None) for m in root.modules())
    files = {id(f.__globals__) for f in forwards if isinstance(f, types.FunctionType)}
    places: list[tuple[Any, str, str]] = [(time, name, "reads the clock") for name in _CLOCKS]
    places.append((builtins, "open", "opens a file"))
    originals = [getattr(place, name) for place, name, _ in places]
    try:
        for (place, name, what), original in zip(places, originals, strict=True):
            setattr(place, name, refused(original, what))
        yield
    finally:
        for (place, name, _), original in zip(places, originals, strict=True):
            setattr(place, name, original)
