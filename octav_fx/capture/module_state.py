"""What forward does to its modules besides computing, undone."""

import collections
import copy
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import nn

from octav_fx.compat.modules import PART_ATTRIBUTES, buffers_of
from octav_fx.compat.tensors import pytree

_CONTAINERS: Final = (list, dict, set, collections.OrderedDict)


@contextmanager
def preserved_attributes(root: nn.Module) -> Iterator[None]:
    """Put back, afterwards, attributes and buffers that were set, and what lists, dicts and sets held.

    What is written into tensors in place stays.
    """
    before = _state(root)
    try:
        yield
    finally:
        _restore(before)


@contextmanager
def attributes_kept_on_success(root: nn.Module) -> Iterator[None]:
    """Like preserved_attributes, but only after an error."""
    before = _state(root)
    try:
        yield
    except BaseException:
        _restore(before)
        raise


def _state(root: nn.Module) -> list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
    return [(held, dict(held), _contents(held)) for _, held in attributes(root)]


def _restore(before: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]) -> None:
    for held, old, contents in before:
        for key in [key for key in held if key not in PART_ATTRIBUTES]:
            if key not in old:
                del held[key]
        held.update(old)
        for key, content in contents.items():
            _refill(held[key], content)


def attributes(root: nn.Module) -> list[tuple[str, dict[str, Any]]]:
    """Return (path, attributes by name) of each module, and of its buffers."""
    named = [(name, m) for name, m in root.named_modules() if not isinstance(m, torch.jit.ScriptModule)]
    return [(name, held) for name, module in named for held in (module.__dict__, buffers_of(module))]


def _contents(held: dict[str, Any]) -> dict[str, Any]:
    """Copy each container; hooks are in some, and libraries install theirs in the first call."""
    return {k: copy.copy(v) for k, v in held.items() if type(v) in _CONTAINERS and k not in PART_ATTRIBUTES}


def _refill(container: Any, content: Any) -> None:
    if type(container) is type(content):
        container.clear()
        getattr(container, "extend" if isinstance(container, list) else "update")(content)


def without_history(root: nn.Module) -> dict[int, Any]:
    """Return a memo for copy.deepcopy with copies of what forward has left on modules, an auxiliary loss.

    Tensors with a history of gradients cannot be copied as they are.
    """
    kept = [leaf for _, held in attributes(root) for leaf in pytree.tree_leaves(held) if isinstance(leaf, torch.Tensor)]
    return {id(t): t.detach().clone() for t in kept if not t.is_leaf}


def own_copy(inputs: Any) -> Any:
    """Copy inputs, so that forward may write into their tensors and objects (a cache)."""
    memo: dict[int, Any] = {}

    def copied(leaf: Any) -> Any:
        if isinstance(leaf, nn.Module):
            return leaf
        if isinstance(leaf, torch.Tensor):
            return memo.setdefault(id(leaf), leaf.clone())
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
