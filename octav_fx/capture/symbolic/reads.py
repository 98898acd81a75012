"""What forward looks at besides its arguments: plain attributes of modules, the gradient mode."""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from octav_fx.capture.chance import without_chance
from octav_fx.capture.kinds import ANY_FLOAT, MISSING, kind_of, kind_of_number
from octav_fx.capture.symbolic.clocks import Moment, opaque_clocks
from octav_fx.capture.user_stack import caller, is_users
from octav_fx.compat.modules import PART_ATTRIBUTES
from octav_fx.errors import NotCaptured

if TYPE_CHECKING:
    from octav_fx.capture.symbolic.tracer import ValueTracer

# What nn.Module keeps for itself; the mode has a flag of its own.
INTERNAL: Final = frozenset({*vars(nn.Module()), "_is_hf_initialized"})
# In place of an attribute that a class computes.
_COMPUTED: Final = object()
_DEVICES: Final = ("cpu", "cuda")


@dataclass
class Reads:
    """Plain attributes by module and name, each with its kind before the trace; and the gradient mode if asked for."""

    attributes: dict[tuple[nn.Module, str], Any] = field(default_factory=dict)
    # Those of them that the graph reads in each call, with what is guarded of them.
    numbers: dict[tuple[nn.Module, str], Any] = field(default_factory=dict)
    # Set before it was read: what was there before does not matter.
    written: set[tuple[nn.Module, str]] = field(default_factory=set)
    gradient_mode: bool | None = None
    # Whether the call is under autocast, for each kind of device that forward asked for.
    autocast: dict[str, bool] = field(default_factory=dict)

    def remembered(self) -> list[tuple[nn.Module, str]]:
        """Return the attributes that forward has both read and changed."""
        return [key for key, kind in self.attributes.items() if kind_of(_found(*key)) != kind]


def _found(module: nn.Module, name: str) -> Any:
    """Return a plain attribute, or what the user's own __getattr__ finds in its place."""
    value, look = _plain(module, name), _of_class(type(module), "__getattr__")
    if value is MISSING and look is not nn.Module.__getattr__:
        with contextlib.suppress(AttributeError):
            return look(module, name)
    return value


def _plain(module: nn.Module, name: str) -> Any:
    """Return a plain attribute, of the class if need be, None for a parameter or buffer without a value.

    MISSING stands for none at all, _COMPUTED for what the class makes of others: a method, a property.
    """
    held = object.__getattribute__(module, "__dict__")
    of_class = _of_class(type(module), name)
    if hasattr(of_class, "__set__") or (of_class is not MISSING and hasattr(nn.Module, name)):
        return _COMPUTED
    if name in held:
        return held[name]
    if parts := [held[kind] for kind in PART_ATTRIBUTES if name in held.get(kind, ())]:
        return parts[0][name]
    return _COMPUTED if hasattr(of_class, "__get__") else of_class


def _of_class(kind: type, name: str) -> Any:
    # What inspect.getattr_static does takes long, and is asked for each attribute.
    return next((vars(above)[name] for above in kind.__mro__ if name in vars(above)), MISSING)


def _is_registered(module: nn.Module, value: Any) -> bool:
    held = object.__getattribute__(module, "__dict__")
    return isinstance(value, Tensor) and any(value is part for kind in PART_ATTRIBUTES for part in held[kind].values())


@contextmanager
def watched_reads(tracer: "ValueTracer", root: nn.Module) -> Iterator[Reads]:
    """Note what forward reads inside. Raise NotCaptured where it asks for what differs in each call."""
    reads = Reads()
    with (
        without_chance(root),
        opaque_clocks(tracer, root),
        _watched_modes(tracer, reads),
        _watched_attributes(tracer, root, reads),
    ):
        yield reads


def _places(root: nn.Module, paths: Iterable[str]) -> dict[tuple[nn.Module, str], str]:
    """Return paths of attributes by their modules and names."""
    split = [(path, *path.rpartition(".")[::2]) for path in paths]
    return {(root.get_submodule(owner), name): path for path, owner, name in split}


@contextmanager
def _watched_attributes(tracer: "ValueTracer", root: nn.Module, reads: Reads) -> Iterator[None]:
    original: Any = nn.Module.__setattr__
    numbers = _places(root, tracer.numbers)
    # What was read before: the first read tells all.
    noted = set[tuple[nn.Module, str]]()

    def read(module: nn.Module, name: str) -> Any:
        key = (module, name)
        if name in INTERNAL or tracer.evaluating or key in noted:
            return object.__getattribute__(module, name)
        if key in numbers and key not in reads.written and is_users(sys._getframe(1)):
            value = object.__getattribute__(module, name)
            reads.attributes.setdefault(key, kind_of(value))
            reads.numbers.setdefault(key, (ANY_FLOAT, kind_of_number(value)))
            return tracer.number(numbers[key])
        tracer.evaluating = True
        try:
            value = _found(module, name)
        finally:
            tracer.evaluating = False
        if isinstance(value, Tensor) and key not in reads.written:
            tracer.read_first.add(key)
        if value is _COMPUTED:
            # Only a write makes anything else of it.
            noted.add(key)
        else:
            # Modules and their parameters and buffers have nodes of their own.
            is_part = isinstance(value, nn.Module) or _is_registered(module, value)
            # Tracers look for names that are free.
            is_probe = value is MISSING and not is_users(sys._getframe(1))
            if not is_probe:
                noted.add(key)
            if not is_part and not is_probe and key not in reads.attributes and key not in reads.written:
                reads.attributes[key] = kind_of(value)
        return object.__getattribute__(module, name)

    def write(module: nn.Module, name: str, value: Any) -> None:
        if type(value) is Moment:
            raise NotCaptured(f"{caller()}: forward keeps a time in {name}, and a graph does not read the clock")
        if not tracer.evaluating and (module, name) not in reads.attributes:
            reads.written.add((module, name))
            tracer.set_first.add((module, name))
        original(module, name, value)

    kind: Any = nn.Module
    kind.__getattribute__, kind.__setattr__ = read, write
    try:
        yield
    finally:
        del kind.__getattribute__
        kind.__setattr__ = original


@contextmanager
def _watched_modes(tracer: "ValueTracer", reads: Reads) -> Iterator[None]:
    """Answer with the modes of the caller where forward has not changed them: the trace itself has gradients on."""
    original, outer = torch.is_grad_enabled, torch.is_grad_enabled()
    original_autocast, outer_autocast = (
        torch.is_autocast_enabled,
        {kind: torch.is_autocast_enabled(kind) for kind in _DEVICES},
    )

    def asked() -> bool:
        if tracer.evaluating or not is_users(sys._getframe(1)):
            return original()
        reads.gradient_mode = outer
        return outer and original()

    def asked_autocast(kind: str = "cuda") -> bool:
        found = original_autocast(kind)
        # Inside of a region of forward's own it does not depend on the call.
        if not tracer.evaluating and is_users(sys._getframe(1)) and found == outer_autocast.get(kind):
            reads.autocast[kind] = found
        return found

    modes: Any = torch
    modes.is_grad_enabled, modes.is_autocast_enabled = asked, asked_autocast
    try:
        yield
    finally:
        modes.is_grad_enabled, modes.is_autocast_enabled = original, original_autocast
