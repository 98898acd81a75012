"""What Python may have looked at in a value besides the contents of its tensors, as a value to compare."""

import collections
import functools
import logging
import math
import types
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from octav_fx.compat.tensors import HigherOrderOperator
from octav_fx.ir.meta import fake

PLAIN: Final = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout)
# In place of an attribute that is not there.
MISSING: Final = "missing"
# What counts by being itself; levels of loggers are constants (constants.py). To Dynamo some functions are operators,
# checkpoint among them.
_ITSELF: Final = (
    HigherOrderOperator,
    *(nn.Module, type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType),
    logging.Logger,
)
# In place of the kind of an attribute that a graph reads in each call: any number of its class and sign.
ANY_FLOAT: Final = "any float"
# So deep in objects of the user's own, whose parts may lead anywhere.
_DEEP: Final = 3


def kind_of_attribute(module: nn.Module, name: str) -> Any:
    """Return the kind of an attribute, that of MISSING where there is none."""
    return kind_of(getattr(module, name, MISSING))


def kind_of_number(value: Any) -> Any:
    """Return the class and the sign of a number that a graph reads in each call: grids without a sign rest on it."""
    # A compiler decides here: a truth that it takes for a symbol is no part of a tuple.
    return type(value).__name__, "-" if isinstance(value, float) and value < 0 else "+"


def kind_of(value: Any, depth: int = _DEEP) -> Any:
    """Return the kind of a value: two of equal kind lead Python the same ways, sizes and data of tensors aside.

    Of a tensor its class, the number of its axes and what users set on it, of a plain value the value and its type, of
    a container its keys and the kinds of what it holds, of any other object its class and the kinds of its attributes.
    """
    if isinstance(value, Tensor):
        tags = [(name, kind_of(held, depth)) for name, held in tags_of(value).items()]
        return ("Tensor" if type(value) is Tensor else _class_of(value), value.dim(), *tags)
    if isinstance(value, float):
        return (type(value).__name__, _number(value))
    if isinstance(value, PLAIN):
        return value if value is None else (type(value).__name__, value)
    if isinstance(value, _ITSELF):
        return value
    if isinstance(value, Mapping):
        return (type(value).__name__, *[(key, kind_of(item, depth)) for key, item in value.items()])
    if isinstance(value, (list, tuple, collections.deque)):
        return (type(value).__name__, *[kind_of(item, depth) for item in value])
    if isinstance(value, (set, frozenset)):
        return (type(value).__name__, *value)
    if isinstance(value, range):
        # A compiler does not go over one whose ends it takes for sizes.
        return ("range", value.start, value.stop, value.step)
    if isinstance(value, fx.Proxy):
        return kind_of(fake(value.node), depth)
    if isinstance(value, functools.partial):
        # Under Dynamo of torch 2.11 the arguments are a list.
        return ("partial", kind_of(value.func), kind_of(tuple(value.args), depth), kind_of(value.keywords, depth))
    if type(value).__module__ == "numpy":
        # Arrays are read by reference, whatever is in them.
        return (type(value).__name__, *(value.shape or (value.item(),)))
    if depth and hasattr(value, "__dict__"):
        return (type(value).__name__, *[(key, kind_of(item, depth - 1)) for key, item in value.__dict__.items()])
    if depth and hasattr(value, "__slots__"):
        held = [(name, getattr(value, name, MISSING)) for name in _slots(type(value))]
        return (type(value).__name__, *[(name, kind_of(item, depth - 1)) for name, item in held])
    return type(value).__name__


def _number(value: float) -> Any:
    """Return a number, or the name of one that is equal to another one, or not to itself."""
    if value != value:
        return "nan"
    return "-0.0" if value == 0 and math.copysign(1, value) < 0 else value


def _class_of(tensor: Tensor) -> str:
    """Return what isinstance tells of a tensor: a parameter, a class of the user's, or no more than a tensor."""
    if isinstance(tensor, nn.Parameter):
        return "Parameter"
    return "Tensor" if type(tensor).__module__.startswith("torch.") else type(tensor).__name__


def tags_of(tensor: Tensor) -> dict[str, Any]:
    """Return what users set on a tensor, by name: x.lengths = lengths. A compiler does not see it."""
    if type(tensor) not in (Tensor, nn.Parameter) or torch.compiler.is_compiling():
        return {}
    return {name: value for name, value in vars(tensor).items() if name[:1] != "_"}


def same_tensors(*values: Any) -> tuple[int, ...]:
    """Return for each tensor in plain containers, in their order, where the same one was first: (0, 1, 0).

    Code may ask `a is b`, and what is written into one of them is read from the other.
    """
    known: list[Tensor] = []
    places: list[int] = []
    for tensor in _tensors(values):
        # A loop that a compiler follows.
        at = 0
        while at < len(known) and known[at] is not tensor:
            at += 1
        known.append(tensor)
        places.append(at)
    return tuple(places)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    held = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in held for tensor in _tensors(item)]


def _slots(kind: type) -> list[str]:
    found: list[str] = []
    for above in kind.__mro__:
        slots = getattr(above, "__slots__", ())
        found += [slots] if isinstance(slots, str) else slots
    return found
