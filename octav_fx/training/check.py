"""check(): whether graphs compute what the float model computes, on data of the user's own."""

import functools
from collections.abc import Iterable
from typing import Any

from torch import nn

from octav_fx.capture.guards import GuardedGraph
from octav_fx.capture.inputs import Inputs, batches_of
from octav_fx.capture.module_state import own_copy
from octav_fx.capture.modules import QuantizedModule, graphs_of, quantized_modules
from octav_fx.capture.rerun import difference, difference_where_written, run_once, unwritten_as_nan, without_quantizers
from octav_fx.errors import OctavError
from octav_fx.training.quantize import float_mode
from octav_fx.training.self_check import first_layer


def check(q: nn.Module, batches: Iterable[Any]) -> None:
    """Compare q without its quantizers with the float model, batch by batch, in its present mode.

    batches: tensors, tuples of arguments or dicts of keyword arguments, as quantize() takes them, or a loader of (x, y)
    for a model that takes x. Each quantized module gets the inputs that it gets in the float model. q keeps its
    parameters, statistics and random state, and has graphs for the kinds of calls in the batches afterwards. Raises
    OctavError for the first module that computes something else, with the batch, by how much, and the first layer in it
    whose result differs.
    """
    modules = {part: name for name, module in q.named_modules() if (part := graphs_of(module)) is not None}
    quantized_modules(q)
    for index, (args, kwargs) in enumerate(batches_of(q, batches)):
        # The graphs for this batch, and the warm starts that belong to them.
        run_once(q, args, kwargs)
        for module, call in _calls(q, list(modules), Inputs(args, kwargs)):
            guarded = module.holding(*call)
            if guarded is None:
                # It runs its own Python.
                continue
            if detail := _difference(module, guarded, call):
                layer = first_layer(module, guarded, call)
                where = f"; the first layer whose result differs is {layer}" if layer else ""
                raise OctavError(
                    f"batch {index}: {modules[module] or 'the model'} computes something else than the float model, "
                    f"quantizers aside: {detail}{where}"
                )


def _difference(module: QuantizedModule, guarded: GuardedGraph, call: Inputs) -> str | None:
    """Say how the graph for a call computes something else than the float module, or return None."""

    def results() -> tuple[Any, Any]:
        expected = run_once(module.owner, *call, module.float_forward)
        with without_quantizers(module.owner):
            return expected, run_once(module.owner, *call, functools.partial(guarded.function(), module.owner))

    if difference(*results()) is None:
        return None
    # Rows that nothing writes (beyond the last group of a grouped product) hold what memory held.
    with unwritten_as_nan():
        return difference_where_written(*results())


def _calls(q: nn.Module, modules: list[QuantizedModule], call: Inputs) -> list[tuple[QuantizedModule, Inputs]]:
    """Return how the float model calls the modules that have graphs."""
    calls: list[tuple[QuantizedModule, Inputs]] = []

    def noted(owner: Any, args: Any, kwargs: Any) -> None:
        calls.append((parts[owner], own_copy(Inputs(args, kwargs))))

    parts = {module.owner: module for module in modules}
    handles = [owner.register_forward_pre_hook(noted, with_kwargs=True) for owner in parts]
    try:
        with float_mode(q):
            run_once(q, *call)
    finally:
        for handle in handles:
            handle.remove()
    return calls
