"""Hooks of transformers, of which it is known what they are for, so that a graph need not run them."""

import inspect
from typing import Any, Final

from torch import Tensor, nn

from octav_fx.capture.permits import is_permitted
from octav_fx.compat.modules import hooks_of
from octav_fx.errors import OctavError

# Hands outputs to a caller that asked for them, and does nothing else; on many modules from the first such call on.
_RECORDER: Final = ("transformers.utils.output_capturing", "output_capturing_hook")
# Lets gradients through embeddings of a model whose parameters want none.
_WANTS_GRADIENTS: Final = ("transformers.modeling_utils", "make_inputs_require_grads")


def is_recorder(hook: Any) -> bool:
    """Tell whether a hook does something only where a caller asks for outputs."""
    return _name(hook) == _RECORDER


def stand_in(hook: Any, root: nn.Module, where: str) -> None:
    """Let root, whose graph holds a module, do what a known hook on that does; where: the module, for errors."""
    if _name(hook) == _WANTS_GRADIENTS:
        if _require_gradients not in hooks_of(root, "_forward_hooks").values():
            root.register_forward_hook(_require_gradients)
    elif is_recorder(hook):
        refusal = _Refusal(hook, where)
        before = [other for other in hooks_of(root, "_forward_pre_hooks").values() if isinstance(other, _Refusal)]
        if all(other.key != refusal.key for other in before):
            root.register_forward_pre_hook(refusal)


def is_known(hook: Any) -> bool:
    """Tell whether a hook is one that stand_in() takes or makes."""
    return _name(hook) in (_RECORDER, _WANTS_GRADIENTS) or _name(hook)[0] == __name__


class _Refusal:
    """A hook of a module whose graph does not record what is asked for."""

    def __init__(self, recorder: Any, where: str) -> None:
        self.key: str = inspect.getclosurevars(recorder).nonlocals["key"]
        self.recorder, self.where = recorder, where

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Raise OctavError where a caller asks for it."""
        if not is_permitted() and self.key in (self.recorder.__globals__["_active_collector"].get() or ()):
            raise OctavError(
                f"{self.where} is part of a graph, which hands no {self.key} out: give octav_fx.quantize such modules "
                "as blocks=[...], or ask octav_fx.float_mode(q) for them"
            )


def _require_gradients(module: nn.Module, args: Any, output: Any) -> None:
    if isinstance(output, Tensor) and output.is_floating_point():
        output.requires_grad_()


def _name(hook: Any) -> tuple[Any, str]:
    return getattr(hook, "__module__", None), getattr(hook, "__qualname__", "").rpartition(".")[2]
