"""Find what a graph holds as constants.

Of the code that forward runs the names are known before it runs. So are the plain values that they may stand for:

    FACTOR, cfg.scale, Config.depth, settings.EPS, TABLE["k"], os.environ["FLAG"], a count in a closure or a default,
    what a variable of the context or of the thread holds, what torch answers: torch.get_default_dtype(),
    torch.backends.cudnn.benchmark, logger.isEnabledFor(logging.DEBUG)

So is that there is none yet: a global that is set later, getattr(cfg, "scale", 1.0).
"""

import builtins
import contextvars
import copy
import functools
import inspect
import logging
import os
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch import distributed as dist

from octav_fx.capture.code_names import Named
from octav_fx.capture.constants import Constants, Held
from octav_fx.capture.contents import CLOSED, is_users_class, is_users_object
from octav_fx.capture.kinds import MISSING, PLAIN, kind_of
from octav_fx.capture.user_stack import is_users_code
from octav_fx.compat.tensors import pytree
from octav_fx.ir.ops import op_of_module
from octav_fx.ir.table.contractions import CONTRACTIONS
from octav_fx.nn.fake_quantizer import FakeQuantizer

# So deep below a global, or what a module holds: cfg.model.scale.
_DEEP: Final = 6
# Of larger lists and tables only what code names is asked.
_SMALL: Final = 64


def _rank() -> tuple[int, int] | None:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else None


# What code may ask of torch, by the name of the question; forward has the answers of the present.
_QUESTIONS: Final[dict[str, Callable[[], Any]]] = {
    "are_deterministic_algorithms_enabled": torch.are_deterministic_algorithms_enabled,
    "get_default_dtype": torch.get_default_dtype,
    "get_float32_matmul_precision": torch.get_float32_matmul_precision,
    "get_num_threads": torch.get_num_threads,
    **dict.fromkeys(("is_initialized", "get_rank", "get_world_size"), _rank),
}
# Methods and attributes of loggers by which code chooses.
_OF_LOGGERS: Final = frozenset({"isEnabledFor", "getEffectiveLevel", "level", "disabled"})
_CACHED: Final = type(functools.cache(_rank))
# Defaults of functions that keep what is put into them.
_CHANGING: Final = (list, dict, set)


def constants_of(root: nn.Module) -> Constants:
    """Return those that a graph of the module holds now: of layers that it spells as functions, and of globals."""
    found = _Found()
    for module in root.modules():
        if op_of_module(module) in CONTRACTIONS:
            found.add_attributes("a layer", module, _settings(module))
    found.add_named(root)
    attributes, items, objects = (tuple(held) for held in found.rows())
    answers = tuple((name, question, answer) for name, (question, answer) in found.answers.items())
    below = [module for module in root.modules() if module is not root and not isinstance(module, FakeQuantizer)]
    forwards = tuple((vars(module), vars(module).get("forward")) for module in below)
    return Constants(attributes, items, objects, answers, tuple(found.variables.items()), tuple(found.caches), forwards)


def functions_of(root: nn.Module) -> list[types.FunctionType]:
    """Return the functions of the user's that the forwards of a module name, and those that these name."""
    found = _Found()
    found.add_named(root)
    return list(dict.fromkeys(function for function, _ in found.seen))


@dataclass(eq=False)
class _Found:
    """What was found so far. Holders are told apart by identity."""

    attributes: dict[int, tuple[str, Any, dict[Any, Any]]] = field(default_factory=dict)
    items: dict[int, tuple[str, Any, dict[Any, Any]]] = field(default_factory=dict)
    objects: dict[int, tuple[str, Any, dict[Any, Any]]] = field(default_factory=dict)
    answers: dict[str, tuple[Callable[[], Any], Any]] = field(default_factory=dict)
    variables: dict[contextvars.ContextVar[Any], Any] = field(default_factory=dict)
    caches: set[Any] = field(default_factory=set)
    # Modules by class: what `self` is in its methods.
    modules: dict[type, list[nn.Module]] = field(default_factory=dict)
    # Functions to be read, each with what `self` may be in it; and those that were.
    waiting: list[tuple[types.FunctionType, Any]] = field(default_factory=list)
    seen: set[tuple[types.FunctionType, int]] = field(default_factory=set)

    def rows(self) -> Iterator[list[Held]]:
        for kind in (self.attributes, self.items, self.objects):
            held = [(where, holder, values) for where, holder, values in kind.values() if values]
            yield [Held(where, holder, tuple(values), tuple(values.values())) for where, holder, values in held]

    def add_attributes(self, where: str, holder: Any, names: Iterable[str]) -> None:
        for name in names:
            value = inspect.getattr_static(holder, name, MISSING)
            if value is not MISSING and _is_plain(value):
                self._values(self.attributes, where, holder)[name] = _as_held(copy.deepcopy(value))

    def add_named(self, root: nn.Module) -> None:
        """Add what the forwards of a module name, and the functions and methods that they call."""
        for module in root.modules():
            self.modules.setdefault(type(module), []).append(module)
        for kind in self.modules:
            self.waiting += [(forward, kind) for forward in _functions(kind, "forward")]
        while self.waiting:
            function, owner = self.waiting.pop()
            function = inspect.unwrap(function)
            code = getattr(function, "__code__", None)
            if code is None or (function, id(owner)) in self.seen or not _is_followed(function):
                continue
            self.seen.add((function, id(owner)))
            named = Named.by(code, owner)
            questions = ((name, _QUESTIONS[name]) for name in named.names if name in _QUESTIONS)
            self.answers |= {name: (question, question()) for name, question in questions}
            self._look(function.__globals__, named, _DEEP)
            self._look_for_asked(function, named)
            for cell in filter(_is_filled, function.__closure__ or ()):
                self._meet(cell, "cell_contents", cell.cell_contents, named, _DEEP)
            if any(type(value) in _CHANGING for value in function.__defaults__ or ()):
                self._meet(function, "__defaults__", function.__defaults__, named, 0)
            if isinstance(owner, type):
                self.waiting += [(method, owner) for name in named.names for method in _functions(owner, name)]
                self.caches |= {
                    held for name in named.names for held in _held(owner, name) if isinstance(held, _CACHED)
                }
                self.add_attributes(owner.__name__, owner, named.names)
                for module in self.modules.get(owner, ()):
                    self._look_below(module, named)
            else:
                self._look(owner, named, _DEEP)

    def _look_below(self, module: nn.Module, named: Named) -> None:
        """Look into what code names of a module: functions, and objects, of which guards ask what is not so deep."""
        for name in named.names:
            value = vars(module).get(name)
            if isinstance(value, (types.FunctionType, functools.partial, _CACHED, logging.Logger)) or _is_space(value):
                self._meet(module, name, value, named, _DEEP)
        if named.asks_dict:
            self.add_attributes(type(module).__name__, module, named.keys)

    def _look_for_asked(self, function: types.FunctionType, named: Named) -> None:
        """Take what a function asks for by getattr and hasattr, there or not, of globals and of its own class."""
        for first, *path, last in named.asked:
            holder = named.owner if first == "type" else function.__globals__.get(first, MISSING)
            for name in path:
                holder = inspect.getattr_static(holder, name, MISSING)
            value = inspect.getattr_static(holder, last, MISSING)
            if _is_space(holder) and (value is not MISSING or _is_missing(holder, last)):
                self._meet(holder, last, value, named, _DEEP)

    def _look_at_torch(self, space: Any, named: Named) -> None:
        """Take what code names below torch.backends: flags, and functions that tell one."""
        for name in named.names:
            value = getattr(space, name, MISSING)
            if callable(value):
                # Others tell what torch was built with, or set a flag.
                if name.endswith("_enabled") and not name.startswith("set_"):
                    self.answers[name] = (value, value())
            elif isinstance(value, PLAIN) and value is not MISSING:
                self._values(self.attributes, "torch.backends", space)[name] = value
            elif getattr(value, "__name__", type(value).__module__).startswith("torch.backends"):
                self._look_at_torch(value, named)

    def _look_at_logger(self, logger: logging.Logger) -> None:
        """Take what decides which messages are written: levels of a logger and of those above it."""
        above: logging.Logger | None = logger
        while above is not None:
            held = self._values(self.items, f"logger {above.name}", vars(above))
            held |= {"level": above.level, "disabled": above.disabled}
            above = above.parent
        self._values(self.items, "logging", vars(logger.manager))["_disable"] = logger.manager.disable

    def _look(self, space: Any, named: Named, depth: int) -> None:
        """Look in a place for what code names: globals, a module, a class, an object, or a table."""
        if id(space) in named.looked:
            return
        named.looked.add(id(space))
        is_table = isinstance(space, dict) or space is os.environ
        is_globals = is_table and "__builtins__" in space
        if not is_globals:
            named = replace(named, owner=space)
        for name in named.of_globals if is_globals else named.keys if is_table else named.names:
            # What a thread holds is found by asking alone.
            found = getattr if isinstance(space, threading.local) else inspect.getattr_static
            value = space.get(name, MISSING) if is_table else found(space, name, MISSING)
            is_to_come = space is os.environ or (is_globals and not hasattr(builtins, name))
            if value is not MISSING or is_to_come:
                self._meet(space, name, value, named, depth)
        if space is os and "getenv" in named.names:
            self._look(os.environ, named, 0)

    def _meet(self, space: Any, name: str, value: Any, named: Named, depth: int) -> None:
        """Take what stands in a place: a plain value, a function to be read, a place to look in."""
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        if _is_alias(name, value) and not isinstance(space, (nn.Module, types.CellType)):
            self._add(space, name, value)
        if isinstance(value, _CACHED):
            self.caches.add(value)
            value = inspect.unwrap(value)
        if isinstance(value, functools.partial):
            # A compiler sees another one in each that it looks at.
            self._add(space, name, kind_of(value))
            value = value.func
        if isinstance(value, types.FunctionType):
            self.waiting.append((value, named.owner))
        elif isinstance(value, property) and isinstance(value.fget, types.FunctionType):
            self.waiting.append((value.fget, space))
        elif _is_plain(value):
            self._add(space, name, copy.deepcopy(value))
        elif isinstance(value, (Tensor, nn.Module)):
            holder = sys.modules.get(str(space.get("__name__"))) if isinstance(space, dict) else space
            if getattr(holder, name, MISSING) is value:
                self._values(self.objects, getattr(holder, "__name__", type(holder).__name__), holder)[name] = value
        elif isinstance(value, type) and issubclass(value, nn.Module):
            # What its methods name is looked for where modules of it are.
            self.add_attributes(value.__name__, value, named.names if is_users_class(value) else ())
        elif isinstance(value, types.ModuleType) and value.__name__.startswith("torch.backends"):
            self._look_at_torch(value, named)
        elif value is torch and "backends" in named.names:
            self._look_at_torch(torch.backends, named)
        elif isinstance(value, logging.Logger):
            if not _OF_LOGGERS.isdisjoint(named.names):
                self._look_at_logger(value)
        elif isinstance(value, contextvars.ContextVar):
            if _is_plain(held := value.get(MISSING)) and held == held:
                self.variables[value] = copy.deepcopy(held)
        elif depth and _is_space(value):
            self._look(value, named, depth - 1)

    def _add(self, space: Any, name: str, value: Any) -> None:
        """Take a value under its name in a place: as an attribute, or as an item of a table."""
        value = _as_held(value)
        if isinstance(space, dict) and "__builtins__" in space:
            file = sys.modules.get(str(space.get("__name__")))
            # Of what a file does not have a compiler knows nothing later, of what its dict does not have it does.
            if file is not None and vars(file) is space and value is not MISSING:
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


def _is_missing(holder: Any, name: str) -> bool:
    """Tell whether an object has nothing by a name, and finds nothing by its __getattr__, which may raise any error."""
    try:
        return getattr(holder, name, MISSING) is MISSING
    except Exception:
        return False


def _is_alias(name: str, value: Any) -> bool:
    """Tell whether a function stands under a name that is not its own: a choice that somebody may make anew."""
    return isinstance(value, (types.FunctionType, types.BuiltinFunctionType)) and value.__name__ != name


def _settings(layer: nn.Module) -> list[str]:
    return [name for name in vars(layer) if name[:1] != "_" and name != "training"]


def _is_plain(value: Any) -> bool:
    """Tell whether a value is a plain one, or a small container of such that are equal to themselves."""
    if isinstance(value, PLAIN):
        return True
    if type(value) not in (tuple, list, dict, set, frozenset) or len(value) > _SMALL:
        return False
    leaves = list(value) if isinstance(value, (set, frozenset)) else pytree.tree_leaves(value)
    return len(leaves) <= _SMALL and all(isinstance(leaf, PLAIN) and leaf == leaf for leaf in leaves)


def _as_held(value: Any) -> Any:
    """Return what a value is compared with later: of zero and nan the kind, as -0.0 is equal to 0.0, nan to nothing."""
    is_odd = isinstance(value, float) and not (value > 0 or value < 0)
    return kind_of(value) if is_odd else value


def _is_space(value: Any) -> bool:
    """Tell whether plain values may be found in a value: a file, class or object of the user's, or a table."""
    if value is os or value is os.environ or isinstance(value, threading.local):
        return True
    if isinstance(value, types.ModuleType):
        return value.__name__.partition(".")[0] not in CLOSED
    if isinstance(value, type):
        return is_users_class(value)
    return isinstance(value, dict) or is_users_object(value)


def _is_followed(function: types.FunctionType) -> bool:
    return is_users_code(function.__code__) and (function.__module__ or "").partition(".")[0] not in CLOSED


def _functions(kind: type, name: str) -> list[types.FunctionType]:
    """Return the methods of that name of a class and of those above it, and what computes a property."""
    held = [inspect.unwrap(value) if isinstance(value, _CACHED) else value for value in _held(kind, name)]
    return [value for value in held if isinstance(value, types.FunctionType)]


def _held(kind: type, name: str) -> list[Any]:
    held = [vars(above).get(name) for above in kind.__mro__]
    return [getattr(value, "fget", None) or getattr(value, "__func__", value) for value in held]


def _is_filled(cell: types.CellType) -> bool:
    return cell != types.CellType()
