"""Modules that a graph holds and does not call: what would reach them as modules is refused, not lost.

A graph reads the weight of a layer and calls no layer: a hook on it would never run, and a method of the model that
calls it would compute in float. Hooks that compute a weight (prune, weight_norm) are part of the next graph.
"""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, Final

from torch import nn

from octav_fx.capture.known_hooks import is_known, stand_in
from octav_fx.capture.permits import is_permitted
from octav_fx.capture.replaced import reweight
from octav_fx.compat.modules import RUNNING_HOOKS, hooks_of, is_weight_hook
from octav_fx.errors import OctavError

# The key of the refusal among the hooks: those of torch count from 0.
_REFUSAL: Final = -1


class HeldCall(OctavError):
    """A call of a module that a graph holds."""


class HeldHooks(OrderedDict[int, Any]):
    """The hooks of one kind of a held module: those from before it was held, and a refusal of what comes now."""

    def __init__(
        self, module: nn.Module, root: nn.Module, path: str, before: "OrderedDict[int, Any]", refuses_calls: bool
    ) -> None:
        super().__init__()
        self.module, self.root, self.path, self.before, self.refuses_calls = module, root, path, before, refuses_calls
        for key, hook in before.items():
            super().__setitem__(key, hook)
        if refuses_calls:
            super().__setitem__(_REFUSAL, self._refuse)

    @property
    def where(self) -> str:
        """Return the place of the module, for errors."""
        return f"{self.path} of {type(self.root).__name__}"

    def __setitem__(self, key: int, hook: Any) -> None:
        if is_weight_hook(hook):
            self.before[key] = hook
            reweight(self.module)
        elif is_known(hook):
            self.before[key] = hook
            stand_in(hook, self.root, self.where)
        elif not is_permitted():
            raise OctavError(
                f"{self.where} would never run this hook: the graph around it calls no such module. Register it on the "
                "whole model, before quantize, or on one of the blocks of octav_fx.quantize(..., blocks=[...])"
            )
        super().__setitem__(key, hook)

    def __delitem__(self, key: int) -> None:
        if is_weight_hook(self[key]):
            self.before.pop(key, None)
            reweight(self.module)
        super().__delitem__(key)

    def __bool__(self) -> bool:
        return any(key != _REFUSAL for key in self) or (self.refuses_calls and not is_permitted())

    def __reduce__(self) -> Any:
        # A copy of the module alone is held by no graph; one of all is held anew.
        return OrderedDict, ([(key, hook) for key, hook in self.items() if key != _REFUSAL],)

    def _refuse(self, *_: Any) -> None:
        if not is_permitted():
            raise HeldCall(
                f"{self.where} would compute in float here: it is part of a graph, which octav_fx.quantize made of the "
                "forward around it. Call that, or make blocks of what you call: octav_fx.quantize(..., blocks=[...]); "
                "octav_fx.float_mode(q) computes in float on purpose"
            )


def hold(root: nn.Module, called: Iterable[nn.Module], working: Iterable[nn.Module]) -> None:
    """Refuse hooks on the modules below root, and calls of the working ones; called: what the graphs of root call."""
    let_go(root)
    own = {module for part in called for module in part.modules()} | {root}
    working = set(working)
    for path, module in root.named_modules():
        if module in own or is_held(module):
            continue
        for hook in filter(is_known, hooks_of(module, "_forward_hooks").values()):
            stand_in(hook, root, f"{path} of {type(root).__name__}")
        for kind in RUNNING_HOOKS:
            refuses = kind == "_forward_pre_hooks" and module in working
            vars(module)[kind] = HeldHooks(module, root, path, hooks_of(module, kind), refuses)


def let_go(module: nn.Module) -> None:
    """Give a module the hooks back that it had before it was held."""
    for kind in RUNNING_HOOKS:
        if isinstance(hooks := hooks_of(module, kind), HeldHooks):
            vars(module)[kind] = hooks.before


def is_held(module: nn.Module) -> bool:
    """Tell whether hooks on a module are refused."""
    return isinstance(vars(module).get(RUNNING_HOOKS[0]), HeldHooks)


def is_hooked(module: nn.Module) -> bool:
    """Tell whether calling a module runs hooks of the user's: those of which it is known what they do are none."""
    kinds = ("_forward_pre_hooks", "_forward_hooks")
    hooks = (entry for kind in kinds for entry in hooks_of(module, kind).items())
    return any(key != _REFUSAL and not is_known(hook) for key, hook in hooks)
