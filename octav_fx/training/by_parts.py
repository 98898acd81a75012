"""Capture that does not give up: a module in one graph, else each of its children in the same way.

What is not reached so stays float, runs as it did, and is a record with its reason.
"""

import contextlib
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import nn

from octav_fx.capture.inputs import Inputs
from octav_fx.capture.module_state import attributes_kept_on_success
from octav_fx.capture.modules import graphs_of, quantized_modules
from octav_fx.capture.partial import ATTRIBUTES, PartialInfo, PartialModule, be_partial, mark_partial, users_classes
from octav_fx.capture.rerun import (
    difference,
    has_data,
    macs_by_module,
    preserved_modes,
    record_calls,
    run_once,
    without_quantizers,
)
from octav_fx.capture.symbolic.recurrent import is_recurrent
from octav_fx.capture.symbolic.tracer import is_torch_leaf
from octav_fx.capture.whole import users_own
from octav_fx.compat.modules import RUNNING_HOOKS, children_of
from octav_fx.config import Config
from octav_fx.errors import NotCaptured
from octav_fx.ir.ops import UserRules, op_of_module
from octav_fx.ir.records import NOT_CALLED, Record, update_graph_info
from octav_fx.ir.table.contractions import CONTRACTIONS
from octav_fx.nn import FakeQuantizer, Settings
from octav_fx.training.one_graph import NeedsCalls, Position, Recipe, check_equal, prepare_module, settings_of_whole
from octav_fx.training.progress import step
from octav_fx.training.self_check import check_in_turn

# Modules with their classes, children, hooks, and what octav_fx keeps on them.
_Tree = list[tuple[nn.Module, type[nn.Module], dict[str, Any], dict[str, Any]]]


_HIDDEN: Final = "no call of it succeeds outside of torch.cond, while_loop or a transform of torch.func"
_KEPT: Final = (*ATTRIBUTES, *RUNNING_HOOKS)


@dataclass
class PartsQuantizer:
    """Quantize one model: what holds for all of it, and what was found on the way."""

    config: Config
    user: UserRules
    # By identity: the modules that are graphs of their own, inside the Python of those around them.
    blocks: set[int] = field(default_factory=set)
    # What each operand (site, name) has in one graph of the whole model, where one holds it: blocks have the same.
    settings: Mapping[tuple[str, str], Settings] = field(default_factory=dict)
    # Which modules multiply and how much, in the order in which they do; known from the first descent on.
    macs_by_module: list[tuple[str, int]] = field(default_factory=list)
    # The same by identity, as a module may have several paths.
    workers: set[int] = field(default_factory=set)

    def quantize(self, module: nn.Module, calls: list[Inputs], path: str = "") -> nn.Module:
        """Quantize a module for these calls, the first of which is the example; return the same module, changed.

        Raises NotCaptured where not one multiplication below the module could be quantized.
        """
        # One that is reached by two ways is quantized once.
        if graphs_of(module) is not None or isinstance(module, PartialModule):
            return module
        is_unrolled = self.user.unrolls and is_recurrent(module)
        has_no_rule = is_torch_leaf(module) and op_of_module(module) not in CONTRACTIONS and not is_unrolled
        if path and (has_no_rule or isinstance(module, self.user.leaves)):
            raise NotCaptured(f"no rule for {type(module).__name__}")
        return self._quantized(module, calls, path)

    def _quantized(self, module: nn.Module, calls: list[Inputs], path: str) -> nn.Module:
        if any(id(part) in self.blocks for part in module.modules() if part is not module):
            return self.descend(module, calls, path, "blocks of it are graphs of their own")
        try:
            return self._one_graph(module, calls, path)
        except NotCaptured as reason:
            if isinstance(reason, NeedsCalls):
                self.find_settings(module, calls[0], path)
            try:
                return self.descend(module, calls, path, str(reason))
            except NotCaptured:
                # One mode is better than none; entering the other raises.
                with contextlib.suppress(NotCaptured):
                    return self._one_graph(module, calls, path, both_modes=False)
                raise

    def find_settings(self, module: nn.Module, call: Inputs, path: str = "") -> None:
        """Find what operands would have in one graph of a module that gets several, if one can hold it."""
        if any(is_at(site, path) for site, _ in self.settings):
            return
        with contextlib.suppress(NotCaptured):
            position = self._position(module, path)
            found = settings_of_whole(module, call, self.config, self.user, position)
            self.settings = {**self.settings, **found}

    def _position(self, module: nn.Module, path: str) -> Position:
        if not self.macs_by_module:
            # A layer that is quantized by itself has no place in a network, and is no edge of one.
            is_network = op_of_module(module) not in CONTRACTIONS
            return Position(holds_first=is_network, holds_last=is_network)
        first, last = self.macs_by_module[0][0], self.macs_by_module[-1][0]
        return Position(path, op_of_module(module) is not None, is_at(first, path), is_at(last, path))

    def _one_graph(self, module: nn.Module, calls: list[Inputs], path: str, both_modes: bool = True) -> nn.Module:
        tree, position = tree_of(module), replace(self._position(module, path), settings=self.settings)
        # A table that a first run leaves is for the graph that reads it.
        with attributes_kept_on_success(module):
            try:
                step("capturing", path)
                prepare_module(module, calls[0], self.config, position, self.user, both_modes)
                step("comparing", path)
                for call in calls:
                    check_equal(module, call)
                if not position.is_op:
                    check_in_turn(module, calls[0], self.config.fold_batchnorm)
            except NotCaptured:
                restore(tree)
                raise
        return module

    def descend(self, module: nn.Module, calls: list[Inputs], path: str, reason: str) -> nn.Module:
        """Quantize the children of a module that no graph holds, for a reason, and mark it; return the same module.

        Raises NotCaptured where nothing below it can be quantized.
        """
        if isinstance(module, torch.jit.ScriptModule):
            raise NotCaptured(reason)
        if not self.macs_by_module:
            try:
                self.macs_by_module = macs_by_module(module, calls[0])
                at_work = [at for at, _ in self.macs_by_module]
                with contextlib.suppress(Exception), _in_other_mode(module):
                    at_work += [at for at, _ in macs_by_module(module, calls[0])]
                self.workers = {id(module.get_submodule(at)) for at in at_work}
            except Exception as error:
                raise NotCaptured(f"{reason}; the model itself fails on these inputs, too: {error}") from error
        try:
            # Where some are quantized already, all compute in float.
            with users_own(module):
                expected = [run_once(module, *call) for call in calls]
                children = self._children(module, calls, transformed := set[str]())
        except Exception as error:
            raise NotCaptured(f"{reason}; by itself the module does not run: {error}") from error
        tree = tree_of(module)
        float_records: list[Record] = []
        placed: list[str] = []
        trees = {name: tree_of(child) for name, (child, _) in children.items()}
        for name, (child, its_calls) in children.items():
            below = _join(path, name)
            try:
                if not its_calls:
                    raise NotCaptured(_HIDDEN)
                self.quantize(child, its_calls, below)
            except NotCaptured as why:
                float_records.append(self._float(below, child, str(why)))
                continue
            if any(isinstance(m, FakeQuantizer) for m in child.modules()):
                placed.append(name)
            else:
                # Captured, and nothing of it quantized: it has its reasons, an override among them.
                float_records += [record for part in quantized_modules(child) for record in part.records]
                restore(trees[name])
        be_partial(module)
        if _fault(module, calls, expected) is not None:
            placed_children = {name: (*children[name], trees[name]) for name in placed}
            float_records += self._replace_misfits(module, placed_children, calls, expected, path)
            if (fault := _fault(module, calls, expected)) is not None:
                restore(tree)
                raise NotCaptured(f"{reason}; with its children quantized it does not run as before: {fault}")
        if not any(isinstance(m, FakeQuantizer) for m in module.modules()):
            restore(tree)
            raise NotCaptured("; ".join([reason, *(f"{r.site}: {r.reason}" for r in float_records[:1] if r.reason)]))
        if own := sum(macs for at, macs in self.macs_by_module if at == path):
            float_records.insert(0, Record(path or "forward", type(module).__name__, None, (), own, None, reason))
        recipe = Recipe(self.config, Position(path), self.user)
        info = PartialInfo(reason, tuple(float_records), recipe=recipe, transforms=bool(transformed))
        return mark_partial(module, info)

    def _replace_misfits(
        self,
        module: nn.Module,
        children: dict[str, tuple[nn.Module, list[Inputs], _Tree]],
        calls: list[Inputs],
        expected: list[Any],
        path: str,
    ) -> list[Record]:
        """Quantize the children of a child where the code around it uses more of it than its call.

        Returns records of what stays float because of that.
        """
        changed = {name: tree_of(child) for name, (child, *_) in children.items()}
        for _, _, tree in children.values():
            restore(tree)
        float_records = []
        for name, (child, its_calls, tree) in children.items():
            below = _join(path, name)
            restore(changed[name])
            if (fault := _fault(module, calls, expected)) is None:
                continue
            is_whole = graphs_of(child) is not None
            restore(tree)
            try:
                if not is_whole:
                    raise NotCaptured(f"used by the code around it otherwise than by calling it: {fault}")
                self.descend(child, its_calls, below, f"the code around it: {fault}")
                if fault := _fault(module, calls, expected):
                    raise NotCaptured(f"used by the code around it otherwise than by calling it: {fault}")
            except NotCaptured as why:
                restore(tree)
                float_records.append(self._float(below, child, str(why)))
        return float_records

    def _float(self, path: str, module: nn.Module, reason: str) -> Record:
        return Record(path, type(module).__name__, None, (), self._macs(path), None, reason)

    def _children(
        self, module: nn.Module, calls: list[Inputs], transformed: set[str]
    ) -> dict[str, tuple[nn.Module, list[Inputs]]]:
        """Return the children that multiply, by name, and their calls; of a container, its children (blocks.0).

        transformed: gets the names of those that are called inside of a transform of torch.func.

        Those that the present mode does not call, as it leaves out layers by chance, have their calls of the other one.
        """

        def working(within: str, parent: nn.Module) -> dict[str, nn.Module]:
            named = {_join(within, name): child for name, child in parent.named_children()}
            return {
                name: child for name, child in named.items() if not self.workers.isdisjoint(map(id, child.modules()))
            }

        children = working("", module)
        while True:
            found = record_calls(module, calls, children, transformed)
            if idle := {name: child for name, child in children.items() if not found[name]}:
                # The other mode may want other arguments.
                with contextlib.suppress(Exception), _in_other_mode(module):
                    found |= record_calls(module, calls, idle)
            containers = {n: parts for n in children if not found[n] and (parts := working(n, children[n]))}
            if not containers:
                return {name: (child, found[name]) for name, child in children.items()}
            for name, parts in containers.items():
                del children[name]
                children |= parts

    def count_calls(self, quantized: nn.Module) -> None:
        """Let the records of graphs that the code around them calls several times say what all calls multiply."""
        for path, module in quantized.named_modules():
            if (part := graphs_of(module)) is None or not path:
                continue
            once = sum({record.site: record.macs for record in part.records}.values())
            if (total := self._macs(path)) > once > 0:
                found = {
                    mode: [replace(record, macs=round(record.macs * total / once)) for record in rows]
                    for mode, rows in part.all_records.items()
                }
                update_graph_info(part, records=found)

    def _macs(self, path: str) -> int:
        return sum(macs for at, macs in self.macs_by_module if is_at(at, path))


def quantize_by_parts(
    model: nn.Module, example: Inputs, config: Config, user: UserRules, blocks: Iterable[nn.Module] = ()
) -> nn.Module:
    """Quantize a model, as one graph where one holds it; raise OctavError where nothing of it can be quantized.

    blocks: modules that are graphs of their own.
    """
    parts = PartsQuantizer(config, user, set(map(id, blocks)))
    if parts.blocks:
        parts.find_settings(model, example)
    quantized = parts.quantize(model, [example])
    parts.count_calls(quantized)
    if (graphs := graphs_of(quantized)) is not None:
        graphs.examples = example
        return quantized
    return mark_outermost(quantized, example, parts)


def mark_outermost(quantized: nn.Module, example: Inputs | None, parts: PartsQuantizer) -> nn.Module:
    """Let a model that runs its own Python have an example, and rows for layers that the calls at hand lead not to."""
    assert isinstance(quantized, PartialModule)
    descent, ran = quantized.octav_partial, {path for path, _ in parts.macs_by_module}
    idle = [
        Record(path, type(module).__name__, None, (), 0, None, NOT_CALLED)
        for path, module in _outside(quantized)
        if path not in ran and op_of_module(module) in CONTRACTIONS
    ]
    # They take no hooks, so what they multiply is in the row of the code around them.
    idle += [
        Record(path, "ScriptModule", None, (), 0, None, "a scripted module, without Python code to capture")
        for path, module in _outside(quantized)
        if isinstance(module, torch.jit.ScriptModule)
    ]
    return mark_partial(quantized, replace(descent, records=(*descent.records, *idle), example=example))


@contextlib.contextmanager
def _in_other_mode(module: nn.Module) -> Iterator[None]:
    with preserved_modes(module):
        mode = not module.training
        # A train() of the user's may merge weights (adapters), which putting the modes back does not undo.
        for part in module.modules():
            part.training = mode
        yield


def _outside(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Return the modules below that no graph holds, with their paths."""
    for name, child in module.named_children():
        if graphs_of(child) is None:
            yield _join(path, name), child
            if not isinstance(child, torch.jit.ScriptModule):
                yield from _outside(child, _join(path, name))


def tree_of(root: nn.Module) -> _Tree:
    """Return what quantizing changes: classes, children, hooks, and what octav_fx keeps on each module."""
    modules = [module for module in root.modules() if not isinstance(module, torch.jit.ScriptModule)]
    return [(m, type(m), dict(children_of(m)), _kept(m)) for m in modules]


def _kept(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name in _KEPT}


def restore(tree: _Tree) -> None:
    """Let modules be what they were when tree_of() was asked."""
    for module, kind, children, kept in tree:
        module.__class__ = kind
        children_of(module).clear()
        children_of(module).update(children)
        for name in _KEPT:
            vars(module).pop(name, None)
        vars(module).update(kept)


def _fault(module: nn.Module, calls: list[Inputs], expected: list[Any]) -> str | None:
    """Say how a module with quantized children, its quantizers aside, differs from the float one, or return None."""

    def results() -> list[Any]:
        # fx prints where in its generated code an error came up.
        with without_quantizers(module), contextlib.redirect_stderr(io.StringIO()):
            return [run_once(module, *call) for call in calls]

    try:
        found = results()
        fault = _difference(expected, found) if has_data(module, calls) else None
        if fault is None:
            return None
        with users_classes(module):
            again = [run_once(module, *call) for call in calls]
        # What reads the clock, or counts its calls in a closure, differs from itself.
        is_fickle = _difference(expected, again) is not None or _difference(found, results()) is not None
        return None if is_fickle else fault
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _difference(expected: list[Any], found: list[Any]) -> str | None:
    return next((detail for e, f in zip(expected, found, strict=True) if (detail := difference(e, f))), None)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def is_at(path: str, place: str) -> bool:
    """Tell whether a path is that of a place, or of something in it; "" is the place of all."""
    return not place or path == place or path.startswith(place + ".")
