"""Hooks of a layer whose call is a function call in the graph: what they do there."""

from typing import Any

from torch import Tensor, nn

from octav_fx.compat.modules import forward_hooks_of, forward_pre_hooks_of, weight_hooks_of


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
