"""What forward does to its modules besides computing, undone."""

import collections
import copy
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from octav_fx.capture.kinds import tags_of
from octav_fx.compat.modules import PART_ATTRIBUTES, buffers_of, children_of, parameters_of
from octav_fx.compat.tensors import pytree
from octav_fx.nn.fake_quantizer import QUANTIZERS

# So deep in objects of the user's own, whose parts may lead anywhere.
_DEEP: Final = 4
_FLAGS: Final = frozenset({type(None), bool, int, float, str})
# What each module holds for torch besides its parts: hooks, most of them empty.
_TORCHS: Final = frozenset(vars(nn.Module())) - {*PART_ATTRIBUTES, "training"}
CONTAINERS: Final = (list, dict, set, collections.OrderedDict, collections.defaultdict, collections.deque)
# Libraries whose objects keep what they keep, whatever forward does.
CLOSED: Final = frozenset({*sys.stdlib_module_names, "torch", "octav_fx", "numpy"}) - {"__main__"}


@contextmanager
def preserved_attributes(root: nn.Module) -> Iterator[Callable[[], bool]]:
    """Put back, afterwards, attributes, parameters and buffers that were set, and what containers in them held.

    So is what the user's objects held, and children that are new are taken out. What is written into tensors in place
    stays. Gives a function that tells whether all of it is as it was.
    """
    before = _Before.of(root)
    try:
        yield before.holds
    finally:
        before.restore()


@contextmanager
def attributes_kept_on_success(root: nn.Module) -> Iterator[None]:
    """Like preserved_attributes, but only after an error."""
    before = _Before.of(root)
    try:
        yield
    except BaseException:
        before.restore()
        raise


@dataclass(frozen=True, slots=True)
class _Before:
    """What modules hold, and what that holds: dicts by name, and the user's containers with a copy of each."""

    attributes: list[tuple[dict[str, Any], dict[str, Any]]]
    containers: list[tuple[Any, Any]]
    # What is in the classes of the modules: a count of calls.
    classes: list[tuple[type, dict[str, Any]]]
    # The children of each module, but for quantizers, and their names.
    children: list[tuple[dict[str, nn.Module | None], set[str]]]

    @classmethod
    def of(cls, root: nn.Module) -> "_Before":
        named = [(held, dict(held)) for _, held in attributes(root)]
        # Those that forward ties.
        modules = [module for module in root.modules() if not isinstance(module, torch.jit.ScriptModule)]
        named += [(held, dict(held)) for held in map(parameters_of, modules)]
        # By identity: what stands for a class is equal to it.
        own_kinds = {id(kind): kind for kind in map(type, modules)}
        above = {id(kind): kind for own_kind in own_kinds.values() for kind in own_kind.__mro__}
        kinds = {at: kind for at, kind in above.items() if is_users_class(kind)}
        quantizers = [children_of(module)[QUANTIZERS] for module in modules if QUANTIZERS in children_of(module)]
        own = {part for held in quantizers if held is not None for part in held.modules()}
        containers = [(container, copy.copy(container) if container else ()) for container in containers_of(root)]
        # Forward may be the first that registers a hook.
        hooks = [held for module in modules for name in _TORCHS if not (held := vars(module).get(name, True))]
        containers += [(held, ()) for held in hooks if type(held) in CONTAINERS]
        return cls(
            named,
            containers,
            [(kind, dict(vars(kind))) for kind in kinds.values()],
            [(children_of(module), set(children_of(module))) for module in modules if module not in own],
        )

    def holds(self) -> bool:
        """Tell whether nothing was set, put in or taken out since."""
        classes = [(dict(vars(kind)), names) for kind, names in self.classes]
        named = all(_is_same(held, old) for held, old in (*self.attributes, *self.containers, *classes))
        return named and all(children.keys() - {QUANTIZERS} <= names for children, names in self.children)

    def restore(self) -> None:
        for held, old in self.attributes:
            if held.keys() != old.keys():
                for key in [key for key in held if key not in PART_ATTRIBUTES and key not in old]:
                    del held[key]
            held.update(old)
        for children, names_before in self.children:
            for name in children.keys() - names_before - {QUANTIZERS}:
                del children[name]
        for container, content in self.containers:
            refill(container, content)
        for kind, names in self.classes:
            for name in [name for name, value in vars(kind).items() if names.get(name, kind) is not value]:
                if name in names:
                    setattr(kind, name, names[name])
                else:
                    delattr(kind, name)


def is_users_class(kind: type) -> bool:
    """Tell whether a class is of the user's own files or of a library of models."""
    return kind.__module__.partition(".")[0] not in CLOSED


def containers_of(root: nn.Module) -> list[Any]:
    """Return the lists, dicts, sets and queues that modules hold, however deep, and the dicts of the user's objects."""
    return _containers_in(_kept(root))


def _containers_in(values: list[Any]) -> list[Any]:
    found: dict[int, Any] = {}

    def visit(value: Any, depth: int) -> None:
        if type(value) in CONTAINERS:
            if id(value) in found:
                return
            found[id(value)] = value
            for item in list(value.values()) if isinstance(value, dict) else list(value):
                visit(item, depth)
        elif isinstance(value, tuple):
            for item in value:
                visit(item, depth)
        elif depth and is_users_object(value):
            visit(vars(value), depth - 1)

    for value in values:
        visit(value, _DEEP)
    return list(found.values())


def _kept(root: nn.Module) -> list[Any]:
    """Return what is in the attributes of modules, but numbers, texts, None and torch's empty dicts: most are these."""
    return [
        value
        for _, held in attributes(root)
        for name, value in held.items()
        if type(value) not in _FLAGS and name not in PART_ATTRIBUTES and (name not in _TORCHS or value)
    ]


def is_users_object(value: Any) -> bool:
    """Tell whether a value is an object of some class of the user's, with attributes."""
    is_closed = isinstance(value, (nn.Module, torch.Tensor, type)) or not hasattr(value, "__dict__")
    if is_closed or isinstance(value, types.FunctionType):
        return False
    return isinstance(value, types.SimpleNamespace) or type(value).__module__.partition(".")[0] not in CLOSED


def _is_same(container: Any, content: Any) -> bool:
    """Tell whether a container holds what it held."""
    if len(container) != len(content):
        return False
    if isinstance(container, dict) and content:
        return all(container.get(key, container) is value for key, value in content.items())
    return all(a is b for a, b in zip(container, content, strict=True))


def refill(container: Any, content: Any) -> None:
    """Let a container hold what it held."""
    if not _is_same(container, content):
        container.clear()
        getattr(container, "extend" if isinstance(container, (list, collections.deque)) else "update")(content)


def state_tensors(root: nn.Module) -> list[torch.Tensor]:
    """Return the buffers of modules and the tensors in their attributes, parameters aside."""
    leaves = (leaf for value in held_values(root) for leaf in _leaves(value))
    tensors = {id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.Tensor)}
    return [t for t in tensors.values() if not isinstance(t, nn.Parameter)]


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, torch.Tensor):
        return [value]
    # Flattening all of these, of which most are modules and sizes of kernels, would take most of the time.
    items = value if type(value) is tuple else (value,)
    is_plain = all(type(item) in _FLAGS or isinstance(item, nn.Module) for item in items)
    return [] if is_plain or (type(value) in CONTAINERS and not value) else pytree.tree_leaves(value)


def held_values(root: nn.Module) -> list[Any]:
    """Return the buffers of modules, what is in their attributes, and what is in the containers there, however deep.

    Numbers, texts and None among the attributes are left out.
    """
    kept = _kept(root)
    return kept + [item for c in _containers_in(kept) for item in (c.values() if isinstance(c, dict) else c)]


def attributes(root: nn.Module) -> list[tuple[str, dict[str, Any]]]:
    """Return (path, attributes by name) of each module, and of its buffers."""
    named = [(name, m) for name, m in root.named_modules() if not isinstance(m, torch.jit.ScriptModule)]
    return [(name, held) for name, module in named for held in (module.__dict__, buffers_of(module))]


def without_history(root: nn.Module) -> dict[int, Any]:
    """Return a memo for copy.deepcopy with copies of what forward has left on modules, an auxiliary loss.

    Tensors with a history of gradients cannot be copied as they are.
    """
    kept = [leaf for _, held in attributes(root) for leaf in pytree.tree_leaves(held) if isinstance(leaf, torch.Tensor)]
    return {id(t): t.detach().clone() for t in kept if not t.is_leaf}


def deep_copy(model: nn.Module) -> nn.Module:
    """Copy a model in its modes; functions on its modules (hooks, lambdas) that speak of modules speak of copies."""
    memo = without_history(model)
    copied = copy.deepcopy(model, memo)
    for original, module in zip(model.modules(), copied.modules(), strict=True):
        # A __setstate__ that calls __init__ (layers of einops) leaves a module in training mode.
        if module.training != original.training:
            module.training = original.training
        if not isinstance(module, torch.jit.ScriptModule):
            for held in (vars(module), *(v for v in vars(module).values() if type(v) in CONTAINERS)):
                items = held.items() if isinstance(held, dict) else enumerate(held) if isinstance(held, list) else ()
                for key, value in list(items):
                    if isinstance(value, types.FunctionType) and (function := _speaking_of(value, memo)) is not None:
                        held[key] = function
    return copied


def _speaking_of(function: types.FunctionType, memo: dict[int, Any]) -> types.FunctionType | None:
    """Return a function whose closure holds the copies of the modules in its closure; None where it holds none."""
    contents = [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]
    owned = [getattr(content, "__self__", content) for content in contents]
    if not any(isinstance(owner, nn.Module) and id(owner) in memo for owner in owned):
        return None
    cells = tuple(types.CellType(_copied(content, memo)) for content in contents)
    made = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__, made.__dict__ = function.__kwdefaults__, dict(vars(function))
    return made


def _copied(content: Any, memo: dict[int, Any]) -> Any:
    owner = getattr(content, "__self__", content)
    return copy.deepcopy(content, memo) if isinstance(owner, nn.Module) and id(owner) in memo else content


def own_copy(inputs: Any) -> Any:
    """Copy inputs, so that forward may write into their tensors and objects (a cache)."""
    memo: dict[int, Any] = {}

    def copied(leaf: Any) -> Any:
        if isinstance(leaf, nn.Module):
            return leaf
        if isinstance(leaf, torch.Tensor):
            if id(leaf) not in memo:
                memo[id(leaf)] = with_tags_of(leaf, _cloned(leaf))
            return memo[id(leaf)]
        # deepcopy refuses tensors with a history of gradients: a cache that earlier layers have filled.
        for tensor in _tensors_within(leaf, set()):
            if not tensor.is_leaf:
                memo.setdefault(id(tensor), tensor.clone())
        try:
            return copy.deepcopy(leaf, memo)
        except Exception:
            # A handle of something that cannot be copied: forward gets the one there is.
            return leaf

    return pytree.tree_map(copied, inputs)


def _cloned(tensor: torch.Tensor) -> torch.Tensor:
    """Clone a tensor; what is a parameter stays one, which code may ask for."""
    if not isinstance(tensor, nn.Parameter):
        return tensor.clone()
    return nn.Parameter(tensor.detach().clone(), tensor.requires_grad)


def with_tags_of(tensor: torch.Tensor, copied: torch.Tensor) -> torch.Tensor:
    """Set on a copy of a tensor what users set on the tensor; return the copy."""
    # A loop, which a compiler follows.
    for name, value in tags_of(tensor).items():
        setattr(copied, name, value)
    return copied


def _tensors_within(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Yield the tensors in a container or an object of the user's, however deep. seen: by identity, where it was."""
    if isinstance(value, torch.Tensor):
        yield value
        return
    if id(value) in seen or isinstance(value, (nn.Module, type, types.ModuleType)):
        return
    seen.add(id(value))
    parts: Any = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, set)) else ()
    for part in (*parts, *getattr(value, "__dict__", {}).values()):
        yield from _tensors_within(part, seen)
