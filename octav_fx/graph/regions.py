"""with torch.no_grad() and with torch.autocast() in forward: what a trace of single calls would lose."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.amp import autocast_mode

if TYPE_CHECKING:
    from octav_fx.graph.tracer import ValueTracer


@contextmanager
def regions(tracer: "ValueTracer") -> Iterator[None]:
    """Entering and leaving torch.autocast makes nodes; gradients are on, so that the tracer sees who turns them off."""
    enter, leave = torch.autocast.__enter__, torch.autocast.__exit__

    def entered(region: torch.autocast) -> Any:
        if not tracer.evaluating:
            settings = (region.device, region.fast_dtype, region._enabled, region._cache_enabled)
            region.node = tracer.create_node(  # type: ignore[attr-defined]
                "call_function", autocast_mode._enter_autocast, settings, {}
            )
        return enter(region)

    def left(region: torch.autocast, *error: Any) -> Any:
        if hasattr(region, "node"):
            tracer.create_node("call_function", autocast_mode._exit_autocast, (region.node,), {})
            del region.node
        return leave(region, *error)

    with torch.enable_grad(), _patched(entered, left):
        yield


@contextmanager
def _patched(enter: Callable[..., Any], leave: Callable[..., Any]) -> Iterator[None]:
    originals = torch.autocast.__enter__, torch.autocast.__exit__
    torch.autocast.__enter__, torch.autocast.__exit__ = enter, leave  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__enter__, torch.autocast.__exit__ = originals  # type: ignore[method-assign]
