"""A module that runs its own Python, over children that are quantized."""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from octav_fx.capture.classes import forward_of, stand_in, users_class
from octav_fx.capture.inputs import Inputs, call_of
from octav_fx.capture.module_state import without_history
from octav_fx.capture.modules import GRAPHS, graphs_of
from octav_fx.capture.permits import is_permitted
from octav_fx.capture.replaced import STRUCTURE, is_changed, looked_at, remember_structure
from octav_fx.capture.whole import users_own
from octav_fx.compat.modules import not_compiled
from octav_fx.errors import OctavError
from octav_fx.ir.records import Record

_PARTIAL: Final = "octav_partial"
# What octav_fx keeps on the user's modules.
ATTRIBUTES: Final = (GRAPHS, _PARTIAL, STRUCTURE)


@dataclass(frozen=True, slots=True)
class PartialInfo:
    """What is known of a descended module."""

    # Why no graph holds its forward, with the file and line that stopped the capture.
    reason: str
    # What its own code and its float children multiply.
    records: tuple[Record, ...]
    # Of the outermost one: what the whole model was quantized with. Not pickled.
    example: Inputs | None = None
    # With what its children are quantized.
    recipe: Any = None
    # Whether it calls some of them inside of a transform of torch.func, where a compiler knows no quantizers.
    transforms: bool = False


class PartialModule:
    """Marks such a module: descend() makes its class a subclass of its own and of this one.

    isinstance, attributes, methods and keys stay those of the user's class; tables find what stays float, and the
    backend sees that it is so on purpose.
    """

    octav_partial: PartialInfo
    # Quantizes what was put in the places of children since, for a call. It is a floor above, and
    # training/again.py puts it here.
    quantize_replaced: ClassVar[Callable[["PartialModule", Inputs], None]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The subclass has no name to be pickled by.
        return _restore, (users_class(type(self)), self._state(), replace(self.octav_partial, example=None))

    @torch.compiler.disable(reason="octav_fx copies graphs and quantizers")
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        owner: Any = self
        memo.update(without_history(owner))
        copied: Any = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self._state(), memo))
        copied.__dict__[_PARTIAL] = self.octav_partial
        return copied

    def _state(self) -> Any:
        """Return what the user's class says its state is."""
        # torch refuses the state of a module with parametrizations, for its pickles; a copy may have it.
        state = dict(vars(self)) if is_parametrized(self) else self.__getstate__()  # type: ignore[arg-type]
        return {k: v for k, v in state.items() if k != _PARTIAL} if isinstance(state, dict) else state


def outermost(q: nn.Module) -> nn.Module:
    """Return the module that quantize() returned, whatever wraps it. Raise OctavError unless there is exactly one."""
    found = [module for module in q.modules() if isinstance(module, PartialModule) or graphs_of(module) is not None]
    if not found:
        raise OctavError(f"{type(q).__name__} holds no module that octav_fx.quantize returned")
    inside = set(found[0].modules())
    if others := sum(module not in inside for module in found):
        raise OctavError(
            f"{type(q).__name__} holds {others + 1} modules that octav_fx.quantize returned, a table shows one"
        )
    return found[0]


def example_of(quantized: nn.Module) -> Inputs | None:
    """Return the inputs that quantize() was given."""
    if (graphs := graphs_of(quantized)) is not None:
        return graphs.examples
    return quantized.octav_partial.example if isinstance(quantized, PartialModule) else None


def float_records(quantized: nn.Module) -> list[Record]:
    """Return what partial modules multiply in float, each once."""
    found = [r for m in quantized.modules() if isinstance(m, PartialModule) for r in m.octav_partial.records]
    return list(dict.fromkeys(found))


def partial_lines(quantized: nn.Module) -> list[str]:
    """Return a line for each module that runs its own Python, and why."""
    found = {name: m for name, m in quantized.named_modules() if isinstance(m, PartialModule)}
    return [f"{name or 'the model'}: in parts, because {m.octav_partial.reason}" for name, m in found.items()]


def mark_partial(module: nn.Module, descent: PartialInfo) -> nn.Module:
    """Mark a module as one that runs its own Python over quantized children; return the same module."""
    be_partial(module)
    module.__dict__[_PARTIAL] = descent
    remember_structure(module)
    return module


def be_partial(module: nn.Module) -> None:
    """Give a module the class that mark_partial() gives it, which its own Python may ask for before that."""
    kind: Any = type(module)
    if not isinstance(module, PartialModule):
        module.__class__ = _partial_class(kind)


@contextmanager
def users_classes(root: nn.Module) -> Iterator[None]:
    """Let every module in root be of the user's class inside, as it was before quantize()."""
    kinds = {module: type(module) for module in root.modules() if isinstance(module, PartialModule)}
    for module, kind in kinds.items():
        module.__class__ = users_class(kind)
    try:
        with users_own(root):
            yield
    finally:
        for module, kind in kinds.items():
            module.__class__ = kind


@functools.cache
def _partial_class(kind: Any) -> type[nn.Module]:
    """Return a subclass of a user's class for a module that runs its own Python."""
    own = forward_of(kind)

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_changed(self) and not is_permitted():
            _look(self, args, kwargs)
        run = functools.partial(own(), self, *args, **kwargs)
        transforms = torch.compiler.is_compiling() and self.octav_partial.transforms
        result = not_compiled(run) if transforms else run()
        if is_changed(self) and not is_permitted():
            # Modules that forward has made.
            _look(self, args, kwargs)
        return result

    return stand_in(kind, PartialModule, forward)


@torch.compiler.disable(reason="octav_fx quantizes what modules below were replaced by; the next call is compiled")
def _look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if looked_at(module):
        PartialModule.quantize_replaced(module, call_of(module, args, kwargs))


def _restore(kind: type[nn.Module], state: Any, descent: PartialInfo) -> nn.Module:
    module = kind.__new__(kind)
    module.__setstate__(state)
    return mark_partial(module, descent)
