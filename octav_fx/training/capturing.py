"""The graphs of a float module: captured in each mode, and warm where forward keeps tables."""

import contextlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from octav_fx.capture.find_constants import constants_of
from octav_fx.capture.guards import GuardedGraph
from octav_fx.capture.inputs import Inputs
from octav_fx.capture.module_state import attributes_kept_on_success, own_copy
from octav_fx.capture.rerun import (
    difference,
    has_data,
    preserved_modes,
    preserved_tensors,
    run_keeping_state,
    run_once,
)
from octav_fx.capture.symbolic.trace import Capture, capture
from octav_fx.errors import NotCaptured, OctavError
from octav_fx.ir.ops import UserRules


def graphs_for(
    module: nn.Module, example: Inputs, user: UserRules, both_modes: bool
) -> tuple[dict[bool, GuardedGraph], str | None, list[str], list[Capture]]:
    """Return a graph for each mode, why the other mode has none (or None), notes, and what was captured.

    The other mode has none where it needs a graph of its own and cannot be captured.
    """
    mode = module.training
    captured, notes = captured_in(module, example, mode, user)
    guarded = GuardedGraph(captured.graph, captured.guards, captured.caches)
    graphs, captures = {mode: guarded, (not mode): guarded}, [captured]
    if captured.depends_on_training:
        try:
            other = _capture(module, example, not mode, user)
            graphs[not mode] = GuardedGraph(other.graph, other.guards, other.caches)
            captures.append(other)
        except OctavError as error:
            missing = f"{'eval' if mode else 'training'} mode is not captured: {error}"
            if both_modes and _runs(module, example, not mode):
                raise NotCaptured(missing) from error
            # Inputs too small for an auxiliary head. The captured mode works; a call in the other one will say this.
            del graphs[not mode]
            return graphs, missing, [*notes, missing], captures
    return graphs, None, notes, captures


def captured_in(
    module: nn.Module, call: Inputs, mode: bool, user: UserRules, numbers: frozenset[str] = frozenset()
) -> tuple[Capture, list[str]]:
    """Capture in one mode, after a first run where forward keeps tables; return what was captured, and notes.

    numbers: paths of plain numbers on modules that the graph is to read in each call.
    """
    constants = constants_of(module)
    with constants.without_caches():
        captured = _capture(module, call, mode, user, numbers)
    if constants.change() is not None:
        # A table of a file that forward fills once.
        constants = constants_of(module)
        captured = _capture(module, call, mode, user, numbers)
        if (change := constants.change()) is not None:
            raise NotCaptured(f"forward changes what it reads, and a graph has no memory: {change}")
    if captured.remembered and has_data(module, call):
        with contextlib.suppress(_NoTable):
            captured = _captured_warm(module, call, mode, user, captured)
    _check_memory(captured)
    return captured, list(captured.notes)


class _NoTable(Exception):
    """Raised where what forward stores is no table: a value that is made once, and changes no result."""


def _captured_warm(module: nn.Module, call: Inputs, mode: bool, user: UserRules, cold: Capture) -> Capture:
    """Capture with the tables that forward makes once: after a first run they are there, and read like any buffer."""
    with attributes_kept_on_success(module):
        first, second = _warm_up(module, call), _warm_up(module, call)
        captured = _capture(module, call, mode, user)
        _check_memory(captured)
        # A log is stored in each call and not read.
        read = {str(node.target) for node in captured.graph.find_nodes(op="get_attr")}
        is_stored = any(name in captured.stored and (name in cold.begun or name in read) for name in cold.remembered)
        # Results differ where forward looks, say, whether this length is that of the call before.
        if is_stored or difference(first, second) is not None:
            raise _NoTable
        return captured


def _check_memory(captured: Capture) -> None:
    # What begins as a tensor of this call is stored by the graph, and guards ask what was there.
    for name in (name for name in captured.remembered if name not in captured.begun):
        raise NotCaptured(f"forward reads {name} and changes it for the next call, and a graph has no memory")


def _warm_up(module: nn.Module, example: Inputs) -> Any:
    """Run once and keep what forward stored; statistics and other buffers that were there stay as they were.

    Returns what it gives.
    """
    with preserved_tensors(module):
        return run_keeping_state(module, *own_copy(example))


def _runs(module: nn.Module, example: Inputs, mode: bool) -> bool:
    """Tell whether the float module itself runs on the example in a mode."""
    if not has_data(module, example):
        return False
    try:
        with _in_mode(module, mode):
            run_once(module, *example)
    except Exception:
        return False
    return True


def _capture(
    module: nn.Module, example: Inputs, mode: bool, user: UserRules, numbers: frozenset[str] = frozenset()
) -> Capture:
    """Capture in one mode; afterwards each module is in the mode it was in, frozen BatchNorms too."""
    with _in_mode(module, mode):
        return capture(module, arguments_of(module, example), user, numbers)


def arguments_of(module: nn.Module, call: Inputs) -> dict[str, Any]:
    """Return the arguments of a call by the names of forward, defaults too. Raise NotCaptured where they do not fit."""
    try:
        bound = inspect.signature(module.forward).bind(*call.args, **call.kwargs)
    except TypeError as error:
        hint = "; leave out what it does not take, such as labels" if "too many" in str(error) else ""
        raise NotCaptured(f"example_inputs do not fit {type(module).__name__}.forward: {error}{hint}") from error
    bound.apply_defaults()
    return dict(bound.arguments)


@contextmanager
def _in_mode(module: nn.Module, mode: bool) -> Iterator[None]:
    """Set a float module to a mode inside; where it is in it already, its parts keep theirs."""
    with preserved_modes(module):
        if module.training != mode:
            module.train(mode)
        yield
