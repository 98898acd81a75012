"""One module as one graph: capture, the passes, the records of what they did."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn

from octav_fx.capture.inputs import Inputs
from octav_fx.capture.module_state import own_copy
from octav_fx.capture.modules import QuantizedModule, make_whole, quantized_modules, users_own
from octav_fx.capture.rerun import (
    difference,
    has_data,
    preserved_buffers,
    preserved_modes,
    run_keeping_state,
    run_once,
    without_quantizers,
)
from octav_fx.capture.symbolic.trace import Capture, capture
from octav_fx.compat.modules import buffers_of
from octav_fx.config import Config
from octav_fx.errors import NotCaptured, OctavError
from octav_fx.ir.edits import Kind
from octav_fx.ir.meta import keep_site
from octav_fx.ir.op import Trait
from octav_fx.ir.ops import OPS, UserRules
from octav_fx.ir.pipeline import run
from octav_fx.ir.records import records, update_graph_info
from octav_fx.nn import FakeQuantizer, Spec
from octav_fx.passes import Place, choose_spec, prepare_passes
from octav_fx.passes.prepare.quantize_operands import remove_unused


@dataclass(frozen=True, slots=True)
class Position:
    """Where in the model a module is: by default it is the model."""

    path: str = ""
    # It is one op itself (a Linear), and has its name in tables.
    is_op: bool = False
    # Whether the first contraction of the model is in it, and the last.
    holds_first: bool = True
    holds_last: bool = True
    # What operands (site, name) have in one graph of the whole model, if that is known.
    specs: Mapping[tuple[str, str], Spec] = field(default_factory=dict)

    def named(self, site: str) -> str:
        """Return the name in the whole model of a node of the module."""
        if self.is_op:
            return self.path
        return f"{self.path}.{site}" if self.path else site

    def placed(self, place: Place) -> Place:
        """Return the place of an operand in the whole model: a first layer of it need not be one of the model."""
        edge = place.edge and (self.holds_last if Trait.LAST_LAYER in OPS[place.op].traits else self.holds_first)
        return replace(place, site=self.named(place.site), edge=edge)


def prepare_module(
    module: nn.Module, example: Inputs, config: Config, position: Position, user: UserRules, both_modes: bool
) -> nn.Module:
    """Let the forward of a module be one rewritten graph for each mode that needs its own; return the module.

    Raises NotCaptured where no graph can hold it; with both_modes also where none can hold the mode it is not in,
    although it runs in it.
    """
    if "forward" in vars(module):
        raise NotCaptured(f"forward of {position.path or type(module).__name__} was replaced on the instance")
    # A part of it may be quantized already, where it is reached by two ways.
    with users_own(module):
        quantized = _rewritten(module, example, config, position, user, both_modes)
    return make_whole(quantized)


def _rewritten(
    module: nn.Module, example: Inputs, config: Config, position: Position, user: UserRules, both_modes: bool
) -> QuantizedModule:
    graphs, missing, notes = _graphs(module, example, user, both_modes)
    quantized = QuantizedModule(module, graphs, {})

    def choose(place: Place) -> Spec | str:
        placed = position.placed(place)
        return position.specs.get((placed.site, placed.operand)) or choose_spec(config, placed)

    found = {}
    for mode in quantized.modes:
        quantized.graph = graphs[mode]
        edits = run(quantized, prepare_passes(config, choose))
        rows = records(graphs[mode], edits)
        found[mode] = [replace(row, site=position.named(row.site)) for row in rows]
        notes += [f"{position.named(e.node)}: {e.detail}" for e in edits if e.kind is Kind.INFO]
    quantized.graph = graphs[module.training]
    update_graph_info(
        quantized,
        config=config.to_dict(),
        records={mode: found.get(mode, found[module.training]) for mode in graphs},
        notes=tuple(dict.fromkeys(notes)),
        missing=missing,
    )
    remove_unused(quantized, list(graphs.values()))
    _drop_values(graphs)
    return quantized


def specs_of_whole(model: nn.Module, example: Inputs, config: Config, user: UserRules) -> dict[tuple[str, str], Spec]:
    """Return the Spec of each operand (site, name) in one graph of a model, which stays as it is.

    Raises NotCaptured where no graph can hold the model.
    """
    held = [vars(model), buffers_of(model)]
    before = [set(names) for names in held]
    try:
        quantized = _rewritten(model, example, config, Position(), user, both_modes=False)
    finally:
        # Constants that capture leaves for its graph.
        for names, known in zip(held, before, strict=True):
            for name in set(names) - known:
                del names[name]
    found: dict[tuple[str, str], Spec] = {}
    for record in (record for rows in quantized.all_records.values() for record in rows):
        if record.quantizer is not None and record.operand is not None:
            quantizer = quantized.get_submodule(record.quantizer)
            assert isinstance(quantizer, FakeQuantizer)
            found[record.site, record.operand] = quantizer.spec
    return found


def check_equal(quantized: nn.Module, call: Inputs) -> None:
    """Check that the rewritten graph without its quantizers computes what the float module computes.

    Raises NotCaptured where it does not; does nothing without data (meta device).
    """
    if not has_data(quantized, call):
        return
    with ExitStack() as stack:
        for graphs in quantized_modules(quantized):
            stack.enter_context(graphs.as_float())
        expected = run_once(quantized, *call)
    try:
        with without_quantizers(quantized):
            found = run_once(quantized, *call)
    except Exception as error:
        raise NotCaptured(f"the captured graph does not run on a call that the model makes: {error}") from error
    if detail := difference(expected, found):
        raise NotCaptured(
            f"the captured graph does not compute what the model's forward does: {detail}. Python code in forward may "
            "look at something a graph does not have, such as the identity of a dtype; make it explicit there"
        )


def arguments_of(module: nn.Module, call: Inputs) -> dict[str, Any]:
    """Return the arguments of a call by the names of forward, defaults too. Raise NotCaptured where they do not fit."""
    try:
        bound = inspect.signature(module.forward).bind(*call.args, **call.kwargs)
    except TypeError as error:
        raise NotCaptured(f"example_inputs do not fit {type(module).__name__}.forward: {error}") from error
    bound.apply_defaults()
    return dict(bound.arguments)


def _graphs(
    module: nn.Module, example: Inputs, user: UserRules, both_modes: bool
) -> tuple[dict[bool, fx.Graph], str | None, list[str]]:
    """Return a graph for each mode, why the other mode has none if it needs one and cannot be captured, and notes."""
    mode = module.training
    captured = _capture(module, example, mode, user)
    if captured.stored and has_data(module, example):
        # A table that forward makes once: after a first run it is there, and forward reads it like any buffer.
        _warm_up(module, example)
        captured = _capture(module, example, mode, user)
    notes = [*captured.notes, *(f"{name}: forward stores it, the graph computes it anew" for name in captured.stored)]
    graphs = {mode: captured.graph, (not mode): captured.graph}
    if captured.depends_on_training:
        try:
            graphs[not mode] = _capture(module, example, not mode, user).graph
        except OctavError as error:
            missing = f"{'eval' if mode else 'training'} mode is not captured: {error}"
            if both_modes and _runs(module, example, not mode):
                raise NotCaptured(missing) from error
            # Inputs too small for an auxiliary head. The captured mode works; train() or eval() will say this.
            del graphs[not mode]
            return graphs, missing, [*notes, missing]
    return graphs, None, notes


def _warm_up(module: nn.Module, example: Inputs) -> None:
    """Run once and keep what forward stored; statistics and other buffers that were there stay as they were."""
    with preserved_buffers(module):
        run_keeping_state(module, *own_copy(example))


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


def _capture(module: nn.Module, example: Inputs, mode: bool, user: UserRules) -> Capture:
    """Capture in one mode; afterwards each module is in the mode it was in, frozen BatchNorms too."""
    with _in_mode(module, mode):
        return capture(module, arguments_of(module, example), user)


@contextmanager
def _in_mode(module: nn.Module, mode: bool) -> Iterator[None]:
    """Set a float module to a mode inside; where it is in it already, its parts keep theirs."""
    with preserved_modes(module):
        if module.training != mode:
            module.train(mode)
        yield


def _drop_values(graphs: Mapping[bool, fx.Graph]) -> None:
    """Drop what only the passes needed, fake tensors above all."""
    for graph in graphs.values():
        for node in graph.nodes:
            keep_site(node)
