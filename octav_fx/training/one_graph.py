"""One module as one graph: capture, the passes, the records of what they did."""

import contextlib
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import fx, nn

from octav_fx.capture.find_constants import constants_of
from octav_fx.capture.guards import GuardedGraph
from octav_fx.capture.inputs import Inputs
from octav_fx.capture.modules import QuantizedModule, graphs_of
from octav_fx.capture.rerun import (
    difference,
    has_data,
    preserved_tensors,
    run_once,
    without_quantizers,
)
from octav_fx.capture.symbolic.trace import Capture
from octav_fx.capture.whole import code_around, make_whole, users_own
from octav_fx.compat.graphs import replaced_graph
from octav_fx.compat.modules import buffers_of
from octav_fx.config import Config
from octav_fx.errors import NotCaptured
from octav_fx.ir.edits import Kind
from octav_fx.ir.meta import keep_site
from octav_fx.ir.op import Trait
from octav_fx.ir.ops import OPS, UserRules
from octav_fx.ir.pipeline import run
from octav_fx.ir.records import NOT_CALLED, Record, graph_info, idle_records, records, update_graph_info
from octav_fx.ir.sites import in_model
from octav_fx.nn import FakeQuantizer, Settings
from octav_fx.nn.fake_quantizer import QUANTIZERS
from octav_fx.passes import Place, choose_spec, prepare_passes
from octav_fx.passes.prepare.quantize_operands import remove_unused
from octav_fx.training.capturing import captured_in, graphs_for
from octav_fx.training.known_quantizers import fits, quantizers_by_operand
from octav_fx.training.progress import step


class NeedsCalls(NotCaptured):
    """A module with parts around whose calls something happens.

    They are recomputed in backward, have hooks, or there are hooks on what they save for backward.
    """


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
    settings: Mapping[tuple[str, str], Settings] = field(default_factory=dict)

    def named(self, site: str) -> str:
        """Return the name in the whole model of a node of the module."""
        return in_model(site, self.path, self.is_op)

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
    module: nn.Module,
    example: Inputs,
    config: Config,
    position: Position,
    user: UserRules,
    both_modes: bool,
    is_to_run: bool = True,
) -> QuantizedModule:
    graphs, missing, notes, captures = graphs_for(module, example, user, both_modes)
    if is_to_run:
        for captured in captures:
            _check_calls(module, captured, position)
    recipe = Recipe(config, position, user)
    of_modes = {mode: [graph] for mode, graph in graphs.items()}
    quantized = QuantizedModule(module, of_modes, {}, recipe, is_rewritten=False)
    found = {}
    for mode in quantized.modes:
        step("rewriting", position.path)
        with replaced_graph(quantized, graphs[mode].graph):
            found[mode], told = recipe.rewrite(quantized)
        notes += told
    quantized.recompile()
    update_graph_info(
        quantized,
        path=position.path,
        is_op=position.is_op,
        config=config.to_dict(),
        records={mode: found.get(mode, found[module.training]) for mode in graphs},
        notes=tuple(dict.fromkeys(notes)),
        missing=missing,
    )
    remove_unused(quantized, [guarded.graph for guarded in graphs.values()])
    _drop_values([guarded.graph for guarded in graphs.values()])
    return quantized


def settings_of_whole(
    model: nn.Module, example: Inputs, config: Config, user: UserRules, position: Position | None = None
) -> dict[tuple[str, str], Settings]:
    """Return the Settings of each operand (site, name) in one graph of a model, which stays as it is.

    That graph never runs: what forward recomputes may be in it, and what has hooks. Raises NotCaptured where no graph
    can hold the model.
    """
    held = [vars(model), buffers_of(model)]
    before = [set(names) for names in held]
    try:
        # A part of it may be quantized already, and a wrapper was put around that.
        with users_own(model):
            quantized = _rewritten(
                model, example, config, position or Position(), user, both_modes=False, is_to_run=False
            )
    finally:
        # Constants that capture leaves for its graph.
        for names, known in zip(held, before, strict=True):
            for name in set(names) - known:
                del names[name]
    found: dict[tuple[str, str], Settings] = {}
    for record in (record for rows in quantized.all_records.values() for record in rows):
        if record.quantizer is not None and record.operand is not None:
            quantizer = quantized.get_submodule(record.quantizer)
            assert isinstance(quantizer, FakeQuantizer)
            found[record.site, record.operand] = quantizer.settings
    return found


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the graphs of a quantized module are made with."""

    config: Config
    position: Position
    user: UserRules

    def add_graph(self, quantized: QuantizedModule, call: Inputs) -> None:
        """Capture a graph for a call that no graph of the module holds for, with the quantizers that are there.

        A float on a module that was another one at an earlier capture is read in each call, where that can be done.
        Raises NotCaptured where no graph can hold it.
        """
        graphs = quantized.graphs_of(quantized.training)
        numbers = frozenset(path for guarded in graphs for path in guarded.numbers(quantized.owner))
        if numbers:
            with contextlib.suppress(NotCaptured):
                self._add_graph(quantized, call, numbers)
                return
        self._add_graph(quantized, call, frozenset())

    def _add_graph(self, quantized: QuantizedModule, call: Inputs, numbers: frozenset[str]) -> None:
        mode = quantized.training
        owner = quantized.owner
        with users_own(owner):
            captured, notes = captured_in(owner, call, mode, self.user, numbers)
            _check_calls(owner, captured, self.position)
        # Some of these belong to other graphs, or to what runs in the place of one.
        before = {name for name, _ in quantized.get_submodule(QUANTIZERS).named_children()}
        with users_own(owner, but=owner), replaced_graph(quantized, captured.graph):
            rows, told = self.rewrite(quantized)
            remove_unused(quantized, [captured.graph], before)
        _drop_values([captured.graph])
        guarded = GuardedGraph(captured.graph, captured.guards, captured.caches)
        guarded.hold_constants(constants_of(owner))
        if has_data(owner, call):
            _check_graph(quantized, guarded, call)
        for held in (True, False):
            if held is mode or not captured.depends_on_training:
                quantized.graphs_of(held).append(guarded)
        add_records(quantized, mode, rows, [*notes, *told])

    def rewrite(self, quantized: QuantizedModule) -> tuple[list[Record], list[str]]:
        """Run the passes on the present graph; return a record for each operand, and notes."""
        known = quantizers_by_operand(quantized)

        def choose(place: Place) -> Settings | str:
            placed = self.position.placed(place)
            if (whole := self.position.settings.get((placed.site, placed.operand))) is not None:
                return whole
            choice, there = choose_spec(self.config, placed), known.get((placed.site, placed.operand))
            if isinstance(choice, str) or there is None or (choice.spec.format.signed and not there.spec.format.signed):
                return choice
            # The quantizer that an earlier graph has for it, though here it may be the first or last layer.
            if fits(there.spec.granularity, choice.spec.granularity, place):
                return there.settings
            return replace(choice, spec=replace(choice.spec, format=there.spec.format))

        # Hooks that compute a weight run there, and may keep what they computed (spectral_norm).
        with preserved_tensors(quantized):
            edits = run(quantized, prepare_passes(self.config, choose))
        found = records(quantized.graph, edits)
        found += [] if self.position.is_op else idle_records(quantized, quantized.graph)
        rows = [replace(row, site=self.position.named(row.site)) for row in found]
        return rows, [f"{self.position.named(e.node)}: {e.detail}" for e in edits if e.kind is Kind.INFO]


def add_records(quantized: QuantizedModule, mode: bool, rows: Iterable[Record], notes: Iterable[str]) -> None:
    """Add rows for operands that no row of a mode speaks of yet, and notes."""
    known = graph_info(quantized)
    new = [row for row in rows if row.reason != NOT_CALLED]
    sites = {row.site for row in new}
    # What the first graph did not call is called now.
    present = [row for row in known.records.get(mode, []) if row.reason != NOT_CALLED or row.site not in sites]
    seen = {(row.site, row.operand) for row in present}
    added = [row for row in new if (row.site, row.operand) not in seen]
    update_graph_info(
        quantized,
        records={**known.records, mode: [*present, *added]},
        notes=tuple(dict.fromkeys((*known.notes, *notes))),
    )


def check_equal(module: nn.Module, call: Inputs) -> None:
    """Check that the graph for a call computes, without its quantizers, what the user's own forward does.

    Where no graph of the module holds for the call, one more is captured. Raises NotCaptured where that cannot be done
    or something else is computed; does nothing without data (meta device).
    """
    quantized = graphs_of(module)
    assert quantized is not None
    if not has_data(module, call):
        return
    guarded = quantized.holding(*call)
    if guarded is None:
        quantized.recipe.add_graph(quantized, call)
        return
    _check_graph(quantized, guarded, call)


def _check_graph(quantized: QuantizedModule, guarded: GuardedGraph, call: Inputs) -> None:
    gradients, owner = guarded.asks_for_gradients and torch.is_grad_enabled(), quantized.owner
    with users_own(owner, but=owner):
        expected = run_once(owner, *call, quantized.float_forward, gradients=gradients)
        try:
            with without_quantizers(owner):
                found = run_once(owner, *call, functools.partial(guarded.function(), owner), gradients=gradients)
        except Exception as error:
            raise NotCaptured(f"the captured graph does not run on a call that the model makes: {error}") from error
    if detail := difference(expected, found):
        raise NotCaptured(
            f"the captured graph does not compute what the model's forward does: {detail}. Python code in forward may "
            "look at something a graph does not have, such as the identity of a dtype; make it explicit there"
        )


def _check_calls(module: nn.Module, captured: Capture, position: Position) -> None:
    # What also runs around graphs does it to them.
    outside = code_around(type(module))
    for reason in (reason for code, reason in captured.around.items() if code is not outside):
        raise NeedsCalls(reason)
    for path in captured.hooked:
        raise NeedsCalls(f"hooks on {position.named(path)} run where that is called as a module")


def _drop_values(graphs: Iterable[fx.Graph]) -> None:
    """Drop what only the passes needed, fake tensors above all."""
    for graph in graphs:
        for node in graph.nodes:
            keep_site(node)
