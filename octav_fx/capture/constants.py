"""What a graph holds as constants, and users may set anew: the stride of a convolution, a global that forward names.

Of the code that forward runs the names are known before it runs. So are the plain values that they may stand for:

    FACTOR, cfg.scale, Config.depth, settings.EPS, TABLE["k"], os.environ["FLAG"]

Each is asked at every call, and where the call is compiled, by the compiler's own guards.
"""

import copy
import inspect
import math
import os
import sys
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch
from torch import nn

from octav_fx.capture.kinds import MISSING, PLAIN
from octav_fx.capture.module_state import CLOSED, is_users_object
from octav_fx.capture.user_stack import is_users_code
from octav_fx.compat.tensors import pytree
from octav_fx.ir.ops import op_of_module
from octav_fx.ir.table.contractions import CONTRACTIONS

# So deep below a global: cfg.model.scale.
_DEEP: Final = 3
# Of larger lists and tables only what code names is asked.
_SMALL: Final = 64


class _Held(NamedTuple):
    """Plain values of one holder by name: its attributes or its items."""

    where: str
    holder: Any
    names: tuple[Any, ...]
    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Constants:
    """Plain values that graphs do not read again, each by where it is found."""

    attributes: tuple[_Held, ...]
    items: tuple[_Held, ...]

    @classmethod
    def of(cls, root: nn.Module) -> "Constants":
        """Return those that a graph of the module holds now: of layers that it spells as functions, and of globals."""
        found = _Found()
        for module in root.modules():
            if op_of_module(module) in CONTRACTIONS:
                found.add_attributes("a layer", module, _settings(module))
        found.add_named(root)
        return cls(*(tuple(held) for held in found.rows()))

    def change(self) -> str | None:
        """Say which is another one now, or return None."""
        # Plain loops, which a compiler follows.
        for where, holder, names, values in self.attributes:
            for name, before in zip(names, values, strict=True):
                if (now := getattr(holder, name, MISSING)) != before:
                    return _told(name, where, before, now)
        for where, holder, names, values in self.items:
            for name, before in zip(names, values, strict=True):
                if (now := holder.get(name, MISSING)) != before:
                    return _told(name, where, before, now)
        return None


def _told(name: str, where: str, before: Any, now: Any) -> str:
    # What a compiler takes a number for may have no text.
    return name if torch.compiler.is_compiling() else f"{name} of {where}: {before!r} at capture, {now!r} now"


@dataclass(eq=False)
class _Found:
    """What was found so far. Holders are told apart by identity."""

    attributes: dict[int, tuple[str, Any, dict[Any, Any]]] = field(default_factory=dict)
    items: dict[int, tuple[str, Any, dict[Any, Any]]] = field(default_factory=dict)
    # Functions to be read, each with what `self` may be in it; and those that were.
    waiting: list[tuple[types.FunctionType, Any]] = field(default_factory=list)
    seen: set[tuple[types.CodeType, int]] = field(default_factory=set)

    def rows(self) -> Iterator[list[_Held]]:
        for kind in (self.attributes, self.items):
            held = [(where, holder, values) for where, holder, values in kind.values() if values]
            yield [_Held(where, holder, tuple(values), tuple(values.values())) for where, holder, values in held]

    def add_attributes(self, where: str, holder: Any, names: Iterable[str]) -> None:
        for name in names:
            value = inspect.getattr_static(holder, name, MISSING)
            if _is_plain(value):
                self._values(self.attributes, where, holder)[name] = copy.deepcopy(value)

    def add_named(self, root: nn.Module) -> None:
        """Add what the forwards of a module name, and the functions and methods that they call."""
        for kind in {type(module) for module in root.modules()}:
            self.waiting += [(forward, kind) for forward in _functions(kind, "forward")]
        while self.waiting:
            function, owner = self.waiting.pop()
            function = inspect.unwrap(function)
            code = getattr(function, "__code__", None)
            if code is None or (code, id(owner)) in self.seen or not _is_followed(function):
                continue
            self.seen.add((code, id(owner)))
            names, keys = list(_names(code)), [key for key in _constants(code) if isinstance(key, str)]
            self._look(function.__globals__, names, keys, owner, _DEEP)
            for cell in function.__closure__ or ():
                if isinstance(cell_value := _content(cell), types.FunctionType):
                    self.waiting.append((cell_value, owner))
            if isinstance(owner, type):
                self.waiting += [(method, owner) for name in names for method in _functions(owner, name)]
            else:
                self._look(owner, names, keys, owner, _DEEP)

    def _look(self, space: Any, names: list[str], keys: list[str], owner: Any, depth: int) -> None:
        """Look in a place for what code names: globals, a module, a class, an object, or a table."""
        is_table = isinstance(space, dict) or space is os.environ
        is_globals = is_table and "__builtins__" in space
        for name in dict.fromkeys(keys if is_table and not is_globals else names):
            value = space.get(name, MISSING) if is_table else inspect.getattr_static(space, name, MISSING)
            if isinstance(value, (staticmethod, classmethod)):
                value = value.__func__
            if isinstance(value, types.FunctionType):
                self.waiting.append((value, owner if is_globals else space))
            elif isinstance(value, property) and isinstance(value.fget, types.FunctionType):
                self.waiting.append((value.fget, space))
            elif _is_plain(value) and (value is not MISSING or space is os.environ):
                self._add_plain(space, is_globals, name, copy.deepcopy(value))
            elif depth and _is_space(value):
                self._look(value, names, keys, owner, depth - 1)
        if space is os and "getenv" in names:
            self._look(os.environ, names, keys, owner, 0)

    def _add_plain(self, space: Any, is_globals: bool, name: str, value: Any) -> None:
        if is_globals:
            file = sys.modules.get(str(space.get("__name__")))
            if file is not None and vars(file) is space:
                self._values(self.attributes, file.__name__, file)[name] = value
            else:
                self._values(self.items, str(space.get("__name__")), space)[name] = value
        elif isinstance(space, dict) or space is os.environ:
            self._values(self.items, "a table" if isinstance(space, dict) else "os.environ", space)[name] = value
        else:
            self._values(self.attributes, getattr(space, "__name__", type(space).__name__), space)[name] = value

    @staticmethod
    def _values(kind: dict[int, tuple[str, Any, dict[Any, Any]]], where: str, holder: Any) -> dict[Any, Any]:
        return kind.setdefault(id(holder), (where, holder, {}))[2]


def _settings(layer: nn.Module) -> list[str]:
    return [name for name in vars(layer) if name[:1] != "_" and name != "training"]


def _is_plain(value: Any) -> bool:
    """Tell whether a value is a plain one, or a small container of such, and equal to itself."""
    if isinstance(value, PLAIN):
        return not (isinstance(value, float) and math.isnan(value))
    if type(value) not in (tuple, list, dict, set, frozenset) or len(value) > _SMALL:
        return False
    leaves = list(value) if isinstance(value, (set, frozenset)) else pytree.tree_leaves(value)
    return len(leaves) <= _SMALL and all(isinstance(leaf, PLAIN) and _is_plain(leaf) for leaf in leaves)


def _is_space(value: Any) -> bool:
    """Tell whether plain values may be found in a value: a file, class or object of the user's, or a table."""
    if value is os or value is os.environ:
        return True
    if isinstance(value, types.ModuleType):
        return value.__name__.partition(".")[0] not in CLOSED
    if isinstance(value, type):
        return not issubclass(value, nn.Module) and value.__module__.partition(".")[0] not in CLOSED
    return isinstance(value, dict) or is_users_object(value)


def _is_followed(function: types.FunctionType) -> bool:
    return is_users_code(function.__code__) and (function.__module__ or "").partition(".")[0] not in CLOSED


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


def _constants(code: types.CodeType) -> Iterator[Any]:
    """Return the constants in a function, and in those that stand in it."""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _constants(constant)
        else:
            yield constant


def _content(cell: types.CellType) -> Any:
    return None if cell == types.CellType() else cell.cell_contents
