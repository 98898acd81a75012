"""What a trace of single calls would lose: regions (no_grad, autocast, saved_tensors_hooks), checkpoint(), Function."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from octav_fx.capture.symbolic.proxies import PROXIES
from octav_fx.capture.user_stack import user_frame
from octav_fx.compat.checkpoints import CheckpointFunction, watched_checkpoints
from octav_fx.compat.graphs import ENTER_AUTOCAST, EXIT_AUTOCAST, autocast_settings
from octav_fx.compat.tensors import pytree

if TYPE_CHECKING:
    from octav_fx.capture.symbolic.tracer import ValueTracer


@contextmanager
def regions(tracer: "ValueTracer") -> Iterator[None]:
    """Make nodes where torch.autocast is entered and left, and where a function with a gradient of its own is called.

    Gradients are on, so that the tracer sees who turns them off. What is recomputed in backward is traced through, and
    so is what has hooks on the tensors that it saves for it; the tracer knows where.
    """
    enter, leave = torch.autocast.__enter__, torch.autocast.__exit__

    def entered(region: torch.autocast) -> Any:
        if not tracer.evaluating:
            settings = autocast_settings(region)
            region.node = tracer.create_node(  # type: ignore[attr-defined]
                "call_function", ENTER_AUTOCAST, settings, {}
            )
        return enter(region)

    def left(region: torch.autocast, *error: Any) -> Any:
        if hasattr(region, "node"):
            tracer.create_node("call_function", EXIT_AUTOCAST, (region.node,), {})
            del region.node
        return leave(region, *error)

    # What Function.apply calls, whatever name user code has for it: a global, an attribute, a partial.
    base: Any = torch.autograd.Function.__mro__[1]
    inherited: Any = vars(base.__mro__[1])["apply"]

    def applied(function: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        if function is CheckpointFunction and not tracer.evaluating:
            # What it runs may hold proxies that no argument is: a partial, a closure.
            recomputed()
            run, _, *inputs = args
            return run(*inputs)
        if tracer.evaluating or not any(type(leaf) in PROXIES for leaf in pytree.tree_leaves((args, kwargs))):
            return inherited.__get__(None, function)(*args, **kwargs)
        return tracer.create_proxy("call_function", apply_function, (tracer.constant(Kept(function)), *args), kwargs)

    def recomputed() -> None:
        noted("forward has a part of it recomputed in backward (torch.utils.checkpoint at {})")

    def noted(reason: str) -> None:
        if not tracer.evaluating:
            frame = user_frame()
            line = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            # Recomputing is done by such hooks.
            tracer.around.setdefault(frame.f_code, reason.format(line))

    def hooked(hooks: Any) -> Any:
        noted("forward has hooks on what a part of it saves for backward (torch.autograd.graph at {})")
        return enter_hooks(hooks)

    mode: Any = torch.set_grad_enabled
    set_mode = mode.__init__

    def decided(region: Any, on: Any) -> None:
        # A proxy would become a node, and the mode of the trace would be the old one.
        set_mode(region, bool(on))

    hooks: Any = torch.autograd.graph.saved_tensors_hooks
    enter_hooks = hooks.__enter__
    base.apply, mode.__init__, hooks.__enter__ = classmethod(applied), decided, hooked
    try:
        with torch.enable_grad(), _patched(entered, left), watched_checkpoints(recomputed):
            yield
    finally:
        del base.apply
        mode.__init__, hooks.__enter__ = set_mode, enter_hooks


@dataclass(frozen=True, slots=True)
class Kept:
    """A function with a gradient of its own, which a graph cannot hold by itself."""

    function: type[torch.autograd.Function]


def apply_function(kept: Kept, *args: Any, **kwargs: Any) -> Any:
    """Call a function with a gradient of its own, as a graph can hold it."""
    return kept.function.apply(*args, **kwargs)


@contextmanager
def _patched(enter: Callable[..., Any], leave: Callable[..., Any]) -> Iterator[None]:
    originals = torch.autocast.__enter__, torch.autocast.__exit__
    torch.autocast.__enter__, torch.autocast.__exit__ = enter, leave  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__enter__, torch.autocast.__exit__ = originals  # type: ignore[method-assign]
