"""What nn.Module keeps, and what its subclasses in torch.nn keep."""

import types
from collections.abc import Callable
from typing import Any, Final, TypeVar

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

T = TypeVar("T")

# Where a module keeps its parts.
PART_ATTRIBUTES: Final = ("_modules", "_parameters", "_buffers")

# The hooks that run when a module is called, or in its backward.
RUNNING_HOOKS: Final = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")

# What is known of the hooks around a forward.
_FORWARD_HOOKS: Final = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")

HOOK_ATTRIBUTES: Final = (
    *RUNNING_HOOKS,
    *_FORWARD_HOOKS,
    *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)

# The code object of nn.Module.__call__'s inner function: a frame of it has the module as `self`.
CALL_CODE: Final[types.CodeType] = nn.Module._call_impl.__code__


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return the children of a module by name: the dict itself."""
    return module._modules


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the parameters that a module itself holds, by name: the dict itself."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """Return the buffers that a module itself holds, by name: the dict itself."""
    return module._buffers


def hooks_of(module: nn.Module, kind: str) -> Any:
    """Return the hooks of one kind by their ids: the dict itself."""
    return vars(module)[kind]


def has_forward_hooks(module: nn.Module) -> bool:
    """Tell whether calling a module runs hooks besides its forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def weight_hooks_of(module: nn.Module) -> dict[str, list[Any]]:
    """Return the hooks that compute a weight before each call (old weight_norm, spectral_norm, prune), by its name."""
    found: dict[str, list[Any]] = {}
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, (WeightNorm, SpectralNorm)):
            found.setdefault(hook.name, []).append(hook)
        elif isinstance(hook, BasePruningMethod):
            found.setdefault(hook._tensor_name, []).append(hook)
    return found


def is_weight_hook(hook: Any) -> bool:
    """Tell whether a hook computes a weight before each call."""
    return isinstance(hook, (WeightNorm, SpectralNorm, BasePruningMethod))


def forward_pre_hooks_of(module: nn.Module) -> list[tuple[Any, bool]]:
    """Return the other hooks before a forward, and whether each takes keyword arguments; torch counts them from 0."""
    hooks = module._forward_pre_hooks.items()
    return [(h, key in module._forward_pre_hooks_with_kwargs) for key, h in hooks if key >= 0 and not is_weight_hook(h)]


def forward_hooks_of(module: nn.Module) -> list[tuple[Any, bool]]:
    """Return the hooks behind a forward, and whether each takes keyword arguments."""
    return [(hook, key in module._forward_hooks_with_kwargs) for key, hook in module._forward_hooks.items()]


def parametrization_of(module: nn.Module, name: str) -> nn.Module | None:
    """Return what computes a parameter (torch.nn.utils.parametrize), or None for one that is there."""
    computed = getattr(module, "parametrizations", None)
    return computed[name] if isinstance(computed, nn.ModuleDict) and name in computed else None


def has_backward_hooks(module: nn.Module) -> bool:
    """Tell whether the backward of a module runs hooks."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


def conv_forward_of(convolution: type[nn.Module]) -> Any:
    """Return what forward of a class of convolutions calls, or None for any other class."""
    return getattr(convolution, "_conv_forward", None)


def has_own_forward(module: nn.Module) -> bool:
    """Tell whether forward, or what forward of a convolution calls, was replaced on the instance."""
    return "forward" in vars(module) or "_conv_forward" in vars(module)


def padding_of(convolution: nn.Module) -> tuple[int, ...]:
    """Return the padding of a convolution in the order that F.pad takes it."""
    return tuple(convolution._reversed_padding_repeated_twice)  # type: ignore[arg-type]


def is_compiled(module: nn.Module) -> bool:
    """Tell whether torch.compile returned a module; the original is in `_orig_mod`."""
    return isinstance(module, torch._dynamo.OptimizedModule)


def allow_missing_binary_ops(torchvision: types.ModuleType) -> None:
    """Let torchvision call nms without asking whether its library of binary ops was loaded."""
    torchvision.ops.boxes._assert_has_ops = _no_question


def _no_question() -> None:
    """Ask nothing. A function by name, as scripted code may call it."""


def share_parts(source: nn.Module, target: nn.Module) -> None:
    """Let a module hold the very children, parameters and buffers of another one."""
    target._modules, target._parameters, target._buffers = source._modules, source._parameters, source._buffers
    target._non_persistent_buffers_set = source._non_persistent_buffers_set


def share_forward_hooks(source: nn.Module, target: nn.Module) -> None:
    """Let calls of a module run the very hooks around its forward that another one has."""
    for name in ("_forward_pre_hooks", "_forward_hooks", *_FORWARD_HOOKS):
        vars(target)[name] = vars(source)[name]


def replace_children(module: nn.Module, children: dict[str, nn.Module | None]) -> None:
    """Give a module other children, in a dict of its own."""
    module._modules = children


def apply_to_tensors(module: nn.Module, fn: Any, recurse: bool) -> None:
    """Run what nn.Module does for .to() and its like, which a subclass may have replaced."""
    nn.Module._apply(module, fn, recurse)


@_disable_dynamo
def not_compiled(function: Callable[[], T]) -> T:
    """Return what a function returns, called between two compiled graphs, not in one.

    As torch.compiler.disable, which loads the compiler at once.
    """
    return function()
