"""What modules hold besides parts and numbers: tensors, containers, objects of the user's."""

import collections
import sys
import types
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from octav_fx.compat.modules import PART_ATTRIBUTES, buffers_of
from octav_fx.compat.tensors import pytree

# So deep in objects of the user's own, whose parts may lead anywhere.
_DEEP: Final = 4
_FLAGS: Final = frozenset({type(None), bool, int, float, str})
# What each module holds for torch besides its parts: hooks, most of them empty.
TORCHS: Final = frozenset(vars(nn.Module())) - {*PART_ATTRIBUTES, "training"}
CONTAINERS: Final = (list, dict, set, collections.OrderedDict, collections.defaultdict, collections.deque)
# Libraries whose objects keep what they keep, whatever forward does.
CLOSED: Final = frozenset({*sys.stdlib_module_names, "torch", "octav_fx", "numpy"}) - {"__main__"}


@dataclass(frozen=True, slots=True)
class Contents:
    """What modules hold, found in one walk for all who ask."""

    # Scripted modules aside.
    modules: list[nn.Module]
    # The attributes of each module by name, and its buffers.
    attributes: list[dict[str, Any]]
    # What is in attributes and buffers, but numbers, texts, None and torch's empty dicts: most are these.
    kept: list[Any]
    # The lists, dicts, sets and queues in them, however deep, and the dicts of the user's objects.
    containers: list[Any]

    @classmethod
    def of(cls, root: nn.Module) -> "Contents":
        """Look at a module and all below it."""
        modules = [module for _, module in _named_modules(root)]
        held = [each for module in modules for each in _held_by(module)]
        kept = [
            value
            for each in held
            for name, value in each.items()
            if type(value) not in _FLAGS and name not in PART_ATTRIBUTES and (name not in TORCHS or value)
        ]
        return cls(modules, held, kept, _containers_in(kept))

    def values(self) -> list[Any]:
        """Return what is kept, and what is in the containers."""
        return self.kept + [item for c in self.containers for item in (c.values() if isinstance(c, dict) else c)]

    def state_tensors(self) -> list[torch.Tensor]:
        """Return the buffers of the modules and the tensors in their attributes, parameters aside."""
        leaves = (leaf for value in self.values() for leaf in _leaves(value))
        tensors = {id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.Tensor)}
        return [t for t in tensors.values() if not isinstance(t, nn.Parameter)]


def attributes(root: nn.Module) -> list[tuple[str, dict[str, Any]]]:
    """Return (path, attributes by name) of each module, and of its buffers."""
    return [(name, held) for name, module in _named_modules(root) for held in _held_by(module)]


def _named_modules(root: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, m) for name, m in root.named_modules() if not isinstance(m, torch.jit.ScriptModule)]


def _held_by(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    return module.__dict__, buffers_of(module)


def is_users_class(kind: type) -> bool:
    """Tell whether a class is of the user's own files or of a library of models."""
    return kind.__module__.partition(".")[0] not in CLOSED


def is_users_object(value: Any) -> bool:
    """Tell whether a value is an object of some class of the user's, with attributes."""
    is_closed = isinstance(value, (nn.Module, torch.Tensor, type)) or not hasattr(value, "__dict__")
    if is_closed or isinstance(value, types.FunctionType):
        return False
    return isinstance(value, types.SimpleNamespace) or type(value).__module__.partition(".")[0] not in CLOSED


def _containers_in(values: list[Any]) -> list[Any]:
    found: dict[int, Any] = {}

    def visit(value: Any, depth: int) -> None:
        if type(value) in CONTAINERS:
            if id(value) in found:
                return
            found[id(value)] = value
            visit_all(value.values() if isinstance(value, dict) else value, depth)
        elif isinstance(value, tuple):
            visit_all(value, depth)
        elif depth and is_users_object(value):
            visit(vars(value), depth - 1)

    def visit_all(items: Iterable[Any], depth: int) -> None:
        # Most are numbers: sizes of kernels.
        for item in [item for item in items if type(item) not in _FLAGS]:
            visit(item, depth)

    visit_all(values, _DEEP)
    return list(found.values())


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, torch.Tensor):
        return [value]
    # Flattening all of these, of which most are modules and sizes of kernels, would take most of the time.
    items = value if type(value) is tuple else (value,)
    is_plain = all(type(item) in _FLAGS or isinstance(item, nn.Module) for item in items)
    return [] if is_plain or (type(value) in CONTAINERS and not value) else pytree.tree_leaves(value)
