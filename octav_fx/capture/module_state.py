"""What forward does to its modules besides computing, undone."""

import collections
import copy
import operator
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from octav_fx.capture.contents import CONTAINERS, TORCHS, Contents, attributes, is_users_class
from octav_fx.capture.kinds import tags_of
from octav_fx.compat.modules import PART_ATTRIBUTES, children_of, parameters_of
from octav_fx.compat.tensors import copy_hooks, pytree
from octav_fx.nn.fake_quantizer import QUANTIZERS


@contextmanager
def preserved_attributes(root: nn.Module, contents: Contents | None = None) -> Iterator[Callable[[], bool]]:
    """Put back, afterwards, attributes, parameters and buffers that were set, and what containers in them held.

    So is what the user's objects held, and children that are new are taken out. What is written into tensors in place
    stays, and so do constants of a graph that is captured inside. contents: what the modules hold, where somebody has
    looked. Gives a function that tells whether all of it is as it was.
    """
    before = _Before.of(contents or Contents.of(root))
    try:
        yield before.holds
    finally:
        before.restore()


@contextmanager
def attributes_kept_on_success(root: nn.Module) -> Iterator[None]:
    """Like preserved_attributes, but only after an error."""
    before = _Before.of(Contents.of(root))
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
    def of(cls, contents: Contents) -> "_Before":
        modules = contents.modules
        # Parameters are there because forward may tie them.
        named = [(each, dict(each)) for each in (*contents.attributes, *map(parameters_of, modules))]
        # By identity: what stands for a class is equal to it.
        own_kinds = {id(kind): kind for kind in map(type, modules)}
        above = {id(kind): kind for own_kind in own_kinds.values() for kind in own_kind.__mro__}
        kinds = {at: kind for at, kind in above.items() if is_users_class(kind)}
        quantizers = [children_of(module)[QUANTIZERS] for module in modules if QUANTIZERS in children_of(module)]
        own = {part for holder in quantizers if holder is not None for part in holder.modules()}
        containers = [(container, copy.copy(container) if container else ()) for container in contents.containers]
        # Forward may be the first that registers a hook.
        hooks = [empty for module in modules for name in TORCHS if not (empty := vars(module).get(name, True))]
        containers += [(empty, ()) for empty in hooks if type(empty) in CONTAINERS]
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
                    if not is_constant(key):
                        del held[key]
            held.update(old)
        for children, names_before in self.children:
            for name in children.keys() - names_before - {QUANTIZERS}:
                del children[name]
        for container, content in self.containers:
            # Most are hooks that nobody has registered.
            if content or len(container):
                refill(container, content)
        for kind, names in self.classes:
            for name in [name for name, value in vars(kind).items() if names.get(name, kind) is not value]:
                if name in names:
                    setattr(kind, name, names[name])
                else:
                    delattr(kind, name)


def is_constant(name: str) -> bool:
    """Tell whether fx or our tracer named an attribute: a graph reads it, and no code of the user's has set it."""
    return name.startswith(("_tensor_constant", "octav_object_"))


def _is_same(container: Any, content: Any) -> bool:
    """Tell whether a container holds what it held."""
    if len(container) != len(content):
        return False
    if not isinstance(container, dict) or not content:
        return all(map(operator.is_, container, content))
    # In the same order, as they nearly always are, there is no need to look anything up.
    are_alike = all(map(operator.is_, container.values(), content.values())) and all(
        map(operator.is_, container, content)
    )
    return are_alike or all(container.get(key, container) is value for key, value in content.items())


def refill(container: Any, content: Any) -> None:
    """Let a container hold what it held."""
    if not _is_same(container, content):
        container.clear()
        getattr(container, "extend" if isinstance(container, (list, collections.deque)) else "update")(content)


def without_history(root: nn.Module) -> dict[int, Any]:
    """Return a memo for copy.deepcopy with copies of what forward has left on modules, an auxiliary loss.

    Tensors with a history of gradients cannot be copied as they are.
    """
    kept = [leaf for _, held in attributes(root) for leaf in pytree.tree_leaves(held) if isinstance(leaf, torch.Tensor)]
    return {id(t): t.detach().clone() for t in kept if not t.is_leaf}


def deep_copy(model: nn.Module) -> nn.Module:
    """Copy a model in its modes; functions on its modules (hooks, lambdas) that speak of modules speak of copies.

    What copy.deepcopy leaves out of parameters, hooks on their gradients and what users set on them, copies have, too.
    """
    memo = without_history(model)
    # The parameters of a scripted copy would be results, and get no gradient.
    with torch.no_grad():
        copied = copy.deepcopy(model, memo)
    for known, parameter in zip(model.parameters(), copied.parameters(), strict=True):
        if parameter.requires_grad != known.requires_grad:
            parameter.requires_grad_(known.requires_grad)
        tags = {name: value for name, value in vars(known).items() if name not in vars(parameter)}
        vars(parameter).update({name: _tag_of_copy(value, memo) for name, value in tags.items()})
        copy_hooks(known, parameter, lambda hook: _of_copies(hook, memo))
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


def _tag_of_copy(value: Any, memo: dict[int, Any]) -> Any:
    """Return what a user set on a parameter, for its copy: sums of gradients (main_grad) would be those of both."""
    if not isinstance(value, torch.Tensor):
        return _copied(value, memo)
    if not value.is_leaf:
        # deepcopy refuses those with a history of gradients.
        memo.setdefault(id(value), value.detach().clone())
    return copy.deepcopy(value, memo)


def _of_copies(hook: Any, memo: dict[int, Any]) -> Any:
    """Return a hook that speaks of the copies of the modules that it speaks of, or is a method of."""
    spoken = _speaking_of(hook, memo) if isinstance(hook, types.FunctionType) else None
    return spoken or _copied(hook, memo)


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
        for tensor in tensors_within(leaf):
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


def tensors_within(value: Any, seen: set[int] | None = None) -> Iterator[torch.Tensor]:
    """Yield the tensors in a container or an object of the user's, however deep. seen: by identity, where it was."""
    seen = set() if seen is None else seen
    if isinstance(value, torch.Tensor):
        yield value
        return
    if id(value) in seen or isinstance(value, (nn.Module, type, types.ModuleType)):
        return
    seen.add(id(value))
    parts: Any = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, set)) else ()
    for part in (*parts, *getattr(value, "__dict__", {}).values()):
        yield from tensors_within(part, seen)
