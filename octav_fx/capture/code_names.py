"""What a function names: globals, attributes, keys, and what it asks for by getattr. Known before it runs."""

import dis
import functools
import itertools
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Named:
    """What a function names, what `self` is in it, and where its names have been looked for, by identity."""

    names: tuple[str, ...]
    # Those of the names that stand for globals; the others are attributes of something.
    of_globals: tuple[str, ...]
    keys: tuple[str, ...]
    # What it asks for by getattr and hasattr, each as the names that lead there.
    asked: tuple[tuple[str, ...], ...]
    owner: Any
    # Whether it looks into what modules hold past their attributes: self.__dict__["scale"].
    asks_dict: bool
    looked: set[int] = field(default_factory=set)

    @classmethod
    def by(cls, code: types.CodeType, owner: Any) -> "Named":
        """Return what the code of a function names, with owner for its `self`."""
        names, of_globals = tuple(dict.fromkeys(names_in(code))), _global_names(code)
        keys = tuple(dict.fromkeys(key for key in _constants(code) if isinstance(key, str)))
        if "globals" in of_globals:
            of_globals += keys
        asks_dict = not {"__dict__", "vars"}.isdisjoint(code.co_names)
        return cls(names, of_globals, keys, _asked(code), owner, asks_dict)


def names_in(code: types.CodeType) -> Iterator[str]:
    """Return the names of globals and attributes in a function, and in those that stand in it."""
    yield from (name for name in code.co_names if not name.startswith("__"))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names_in(constant)


@functools.cache
def _global_names(code: types.CodeType) -> tuple[str, ...]:
    """Return the names of globals in a function, and in those that stand in it."""
    found = [str(i.argval) for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    within = (_global_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return tuple(dict.fromkeys(itertools.chain(found, *within)))


@functools.cache
def _asked(code: types.CodeType) -> tuple[tuple[str, ...], ...]:
    """Return what a function asks for by getattr and hasattr, and those that stand in it, as the names that lead there.

    getattr(cfg.model, "scale", 1.0) -> ("cfg", "model", "scale"); hasattr(type(self), "scale") -> ("type", "scale")
    """
    found: list[tuple[str, ...]] = []
    path: list[str] | None = None
    for step in dis.get_instructions(code):
        match step.opname, step.argval:
            case "LOAD_GLOBAL" | "LOAD_NAME", "getattr" | "hasattr":
                path = []
            case "LOAD_GLOBAL" | "LOAD_NAME" | "LOAD_ATTR", str(name) if path is not None:
                path = ["type"] if name == "__class__" else [*path, name]
            case "LOAD_CONST", str(name) if path:
                found.append((*path, name))
                path = None
            case "LOAD_CONST" | "STORE_FAST", _:
                path = None
            case "LOAD_FAST", _ if path != ["type"]:
                # What self holds has guards of its own.
                path = None if path is None else ["self"]
    within = (_asked(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return tuple(dict.fromkeys(itertools.chain(found, *within)))


def _constants(code: types.CodeType) -> Iterator[Any]:
    """Return the constants in a function, and in those that stand in it."""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _constants(constant)
        else:
            yield constant
