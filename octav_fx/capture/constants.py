"""What a graph holds as constants, and users may set anew: the stride of a convolution, a global that forward names."""

import inspect
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from octav_fx.capture.kinds import MISSING, PLAIN
from octav_fx.capture.user_stack import is_users_code
from octav_fx.ir.ops import op_of_module
from octav_fx.ir.table.contractions import CONTRACTIONS


class _Constant(NamedTuple):
    """A plain value: of which it is, by what name, and what it was."""

    holder: str
    names: dict[str, Any]
    name: str
    value: Any


@dataclass(frozen=True, slots=True)
class Constants:
    """The plain attributes of layers that graphs spell as functions, and plain values of globals."""

    rows: tuple[_Constant, ...]

    @classmethod
    def of(cls, root: nn.Module) -> "Constants":
        """Return those that a graph of the module holds now."""
        layers = [vars(module) for module in root.modules() if op_of_module(module) in CONTRACTIONS]
        rows = [_Constant("a layer", held, *item) for held in layers for item in held.items() if item[0] != "training"]
        return cls((*(row for row in rows if _is_plain(row.value)), *_globals_named(root)))

    def change(self) -> str | None:
        """Say which is another one now, or return None."""
        for holder, names, name, before in self.rows:
            if (now := names.get(name)) is not before and now != before:
                return f"{name} of {holder}: {before!r} at capture, {now!r} now"
        return None


def _is_plain(value: Any) -> bool:
    return isinstance(value, PLAIN) or (isinstance(value, tuple) and all(isinstance(item, PLAIN) for item in value))


def _globals_named(root: nn.Module) -> list[_Constant]:
    """Return the plain globals that the forwards of a module name, and the functions and methods that they call."""
    found: dict[tuple[int, str], _Constant] = {}
    seen: set[types.CodeType] = set()
    waiting = [(kind, forward) for kind in {type(m) for m in root.modules()} for forward in _functions(kind, "forward")]
    while waiting:
        kind, function = waiting.pop()
        function = inspect.unwrap(function)
        code = getattr(function, "__code__", None)
        if code is None or code in seen or not is_users_code(code):
            continue
        seen.add(code)
        for name in _names(code):
            value = function.__globals__.get(name, MISSING)
            if isinstance(value, types.FunctionType):
                waiting.append((kind, value))
            elif value is not MISSING and _is_plain(value):
                place = function.__globals__
                found[id(place), name] = _Constant(str(place.get("__name__")), place, name, value)
            waiting += [(kind, method) for method in _functions(kind, name)]
    return list(found.values())


def _functions(kind: type, name: str) -> list[types.FunctionType]:
    """Return the methods of that name of a class and of those above it, and what computes a property."""
    held = [vars(above).get(name) for above in kind.__mro__]
    held = [getattr(value, "fget", None) or getattr(value, "__func__", value) for value in held]
    return [value for value in held if isinstance(value, types.FunctionType)]


def _names(code: types.CodeType) -> Iterator[str]:
    """Return the names of globals and attributes in a function, and in those that stand in it."""
    yield from (name for name in code.co_names if not name.startswith("__"))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
