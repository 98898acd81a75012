"""Hooks of a layer whose call is a function call in the graph: what they do there. And which modules need calls."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from octav_fx.capture.held import HeldHooks
from octav_fx.capture.known_hooks import is_known
from octav_fx.compat.modules import (
    RUNNING_HOOKS,
    forward_hooks_of,
    forward_pre_hooks_of,
    hooks_of,
    is_weight_hook,
    weight_hooks_of,
)


def needs_calls(module: nn.Module) -> bool:
    """Tell whether a module has hooks of the user's, which run where it is called as a module."""
    return any(_is_users(hook) for kind in RUNNING_HOOKS for hook in hooks_of(module, kind).values())


@contextmanager
def set_aside(module: nn.Module, known: bool = False) -> Iterator[None]:
    """Let calls of a module run no hooks of the user's inside, and with known none of those that are known, too."""
    held = {kind: hooks_of(module, kind) for kind in RUNNING_HOOKS}
    for kind, hooks in held.items():
        kept = {key: hook for key, hook in hooks.items() if not (_is_users(hook) or (known and is_known(hook)))}
        vars(module)[kind] = OrderedDict(kept)
    try:
        yield
    finally:
        vars(module).update(held)


def as_hooks_leave(value: Any) -> Any:
    """Return a value that hooks may change in any call: nothing is known of it."""
    return value


def effective_weight(module: nn.Module, name: str) -> Tensor:
    """Return the weight that hooks of weight_norm, spectral_norm or prune compute before each call of a module."""
    for hook in weight_hooks_of(module).get(name, ()):
        hook(module, None)
    weight: Tensor = getattr(module, name)
    if not isinstance(weight, nn.Parameter):
        # What a module keeps between two calls must not hold a history: it could not be copied.
        setattr(module, name, weight.detach())
    return weight


def before_call(module: nn.Module, *args: Any) -> tuple[Any, ...]:
    """Run the hooks that a module runs before its forward; return the arguments as they leave them."""
    kwargs: dict[str, Any] = {}
    for hook, takes_keywords in forward_pre_hooks_of(module):
        result = hook(module, args, kwargs) if takes_keywords else hook(module, args)
        if result is not None:
            args = result[0] if takes_keywords else result if isinstance(result, tuple) else (result,)
    return args


def after_call(module: nn.Module, result: Any, *args: Any) -> Any:
    """Run the hooks that a module runs behind its forward, which returned result; return it as they leave it."""
    for hook, takes_keywords in forward_hooks_of(module):
        changed = hook(module, args, {}, result) if takes_keywords else hook(module, args, result)
        result = result if changed is None else changed
    return result


def _is_users(hook: Any) -> bool:
    is_ours = isinstance(getattr(hook, "__self__", None), HeldHooks)
    return not is_ours and not is_weight_hook(hook) and not is_known(hook)
