"""QuantizedModule: the graphs of a module, which is their owner."""

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Final

import torch
from torch import fx, nn

from octav_fx.capture.classes import forward_of
from octav_fx.capture.dispatch import GuardedModule, is_traced
from octav_fx.capture.frozen import Derived, is_frozen, is_recorded, uses_of, with_gradients_of, with_stores_of
from octav_fx.capture.guards import GuardedGraph
from octav_fx.capture.inputs import Inputs, call_of, tensors_of
from octav_fx.capture.integer_module import IntegerModule
from octav_fx.capture.permits import permitted
from octav_fx.capture.replaced import STRUCTURE, check_unchanged, looked_at
from octav_fx.capture.symbolic.side_effects import store_flags
from octav_fx.capture.transformed import transformed
from octav_fx.compat.graphs import forget_compiled_callers, set_graph_without_code
from octav_fx.compat.modules import buffers_of, children_of, not_compiled, parameters_of, replace_children, share_parts
from octav_fx.compat.tensors import transform, transforms
from octav_fx.errors import NotCaptured, OctavError
from octav_fx.ir.records import Record, graph_info
from octav_fx.nn.fake_quantizer import QUANTIZERS, FakeQuantizer

# Gives a module what it needs for a call that no graph of it holds for: a graph more, or its own Python.
CaptureAgain = Callable[["QuantizedModule", Inputs], None]

# What a quantized module has besides what its class has.
_RESERVED: Final = (QUANTIZERS, "meta", "examples", "owner", "user_class", "recipe", "capture_again")
# The attribute of a WholeModule that holds its QuantizedModule.
GRAPHS: Final = "octav_graphs"


class QuantizedModule(GuardedModule):
    """The graphs of a module, its owner, over the very children, parameters and buffers of it.

    Names, ties and containers of the owner stay, so its checkpoints load and its optimizer groups hold; the quantizers
    are one more child, of both once make_whole() was called. Each graph holds under guards: forward runs the first that
    holds for its inputs, and where none does, captures one more. Where the owner's Python code branches on
    self.training each mode has its own. float_forward() runs the owner's own forward on the same state.

    In eval mode a graph whose quantizers have static clips runs as a module that make_rule returns, made from the
    present state: see capture/frozen.py.
    """

    owner: nn.Module
    user_class: type[nn.Module]
    _own_forward: Callable[[], Callable[..., Any]]
    # The present graph as a function.
    captured: ClassVar[Callable[..., Any]]
    # From a frozen module, and the index of a graph of eval mode, to what that computes. Passes are a floor above, and
    # deploy/rule.py puts it here.
    make_rule: ClassVar[Callable[["QuantizedModule", int], IntegerModule]]

    def __init__(
        self,
        owner: nn.Module,
        graphs: Mapping[bool, Sequence[GuardedGraph]],
        meta: Mapping[str, Any],
        recipe: Any = None,
        capture_again: CaptureAgain | None = None,
        quantizers: nn.Module | None = None,
        *,
        is_rewritten: bool = True,
    ) -> None:
        """Hold the graphs of an owner. Where they are still to be rewritten, recompile() has to follow."""
        taken = (*children_of(owner), *parameters_of(owner), *buffers_of(owner))
        if clash := [name for name in taken if name in _RESERVED or hasattr(QuantizedModule, name)]:
            raise NotCaptured(f"{type(owner).__name__}.{clash[0]}: octav_fx needs that name; rename the attribute")
        # Not registered children: the tree below both is the same one.
        self.__dict__["owner"], self.__dict__["user_class"] = owner, type(owner)
        self.__dict__["_own_forward"] = forward_of(type(owner))
        super().__init__(nn.Module(), fx.Graph(), type(owner).__name__)
        share_parts(owner, self)
        quantizers = nn.Module().train(owner.training) if quantizers is None else quantizers
        replace_children(self, {**children_of(owner), QUANTIZERS: quantizers})
        self.training = owner.training
        # The inputs that quantize() was given, as (args, kwargs): what tables measure. Not pickled.
        self.examples: Inputs | None = None
        # For each mode the graphs that were captured so far; the first is the one that quantize() made.
        self._graphs = {mode: list(graphs.get(mode, ())) for mode in (True, False)}
        for guarded in (*self._graphs[True], *self._graphs[False]):
            guarded.graph.owning_module = self
        # What further graphs are made with, and what makes them; what runs where none can be made, for each mode.
        self.recipe, self.capture_again = recipe, capture_again
        self._own_python: dict[bool, Callable[..., Any]] = {}
        # Whether the code stays that of the present graph where the mode changes.
        self._keeps_code = False
        # Those that ran, while somebody wants to know.
        self._used: list[GuardedGraph] | None = None
        self.meta = dict(meta)
        if self._graphs[self.training]:
            present = self._graphs[self.training][0].graph
            if is_rewritten:
                self.graph = present
            else:
                set_graph_without_code(self, present)

    @property
    def _float_module(self) -> nn.Module:
        """Return what a graph finds when it stores or reads an attribute of the outermost module."""
        return self.owner

    @property
    def records(self) -> list[Record]:
        """Return what became of each operand, in the graph of the present mode: Records."""
        return list(self.all_records[self.training])

    @property
    def all_records(self) -> Mapping[bool, list[Record]]:
        """Return the records of each mode."""
        return graph_info(self).records

    @property
    def modes(self) -> tuple[bool, ...]:
        """Return the training modes that have a graph of their own, the present one first."""
        present, other = self.training, not self.training
        if not self._graphs[other]:
            return (present,)
        own = not self._graphs[present] or self._graphs[other][0] is not self._graphs[present][0]
        return (present, other) if own else (present,)

    def graph_of(self, mode: bool) -> fx.Graph:
        """Return the first graph of a training mode. Raises OctavError if quantize() could not capture that mode."""
        if not self._graphs[mode]:
            raise OctavError(f"{graph_info(self).missing}: call the model in that mode, with inputs that fit it")
        return self._graphs[mode][0].graph

    def graphs_of(self, mode: bool) -> list[GuardedGraph]:
        """Return all graphs that were captured for a training mode, the list itself."""
        return self._graphs[mode]

    def called(self) -> list[str]:
        """Return the paths of the modules that graphs call."""
        return [str(node.target) for guarded in self._captured() for node in guarded.graph.find_nodes(op="call_module")]

    def constants_changed(self) -> bool:
        """Tell whether a graph holds no more for a global, or a layer as it was set."""
        return any(guarded.change_of_constants() is not None for guarded in self._captured())

    def written_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that a graph writes into: a teacher that follows, a weight that is masked."""
        names = {name for guarded in self._captured() for name in guarded.written()}
        return [p for name, p in nn.Module.named_parameters(self.owner, remove_duplicate=False) if name in names]

    def follow(self, mode: bool) -> None:
        """Show the first graph of a mode, which is that of the owner; its children have theirs."""
        self.training = mode
        is_other = bool(graphs := self._graphs[mode]) and graphs[0].graph is not self.graph
        if is_other and not self._keeps_code:
            self.graph = graphs[0].graph
        if any(guarded.derived is not None and not guarded.derived.is_of(self) for guarded in graphs):
            self.forget()

    @contextmanager
    def keeping_code(self) -> Iterator[None]:
        """Let modes change inside, and change back, without the code for each, which takes as long as a forward."""
        self._keeps_code = True
        try:
            yield
        finally:
            self._keeps_code = False

    def recompile(self) -> Any:
        """Generate the code of the graph, and share the class that holds it with all modules of the same code.

        torch.compile asks for classes: a model of many equal blocks is compiled once. What was made of another graph is
        forgotten.
        """
        self.forget()
        self._simulates = False
        for guarded in self._captured():
            guarded.uses = uses_of(guarded.graph)
        name = type(self).__name__
        # What is written into a class that others have would be theirs, too.
        self.__class__ = type(name, (QuantizedModule,), {})
        code = super().recompile()
        present = [guarded for guarded in self._captured() if guarded.graph is self.graph]
        objects = tuple(sorted((global_name, id(value)) for global_name, value in code.globals.items()))
        shared = _SHARED.setdefault((name, code.src, objects, bool(present)), type(self))
        if present:
            if shared is type(self):
                shared.captured = present[0].function()
            present[0].set_function(shared.captured)
        self.__class__ = shared
        return code

    def _state_holder(self) -> nn.Module:
        """Return what graphs and guards read: the owner, whose names are the user's, once it has the quantizers."""
        return self.owner if graphs_of(self.owner) is self else self

    def _captured(self) -> Sequence[GuardedGraph]:
        return [guarded for graphs in self.__dict__.get("_graphs", {}).values() for guarded in graphs]

    def _dispatch(self, *args: Any, **kwargs: Any) -> Any:
        if is_traced(args):
            return self._graphs[self.training][0].function()(self._state_holder(), *args, **kwargs)
        if (guarded := self.holding(args, kwargs)) is not None:
            if torch.compiler.is_compiling():
                return self._run(guarded, args, kwargs)
            if transform() is not None:
                return self._run_transformed(guarded, args, kwargs)
            return self._run_or_capture(guarded, args, kwargs)
        if (own := self._own_python.get(self.training)) is not None:
            return own(*args, **kwargs)
        return self._run_new(args, kwargs)

    def _run_transformed(self, guarded: GuardedGraph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a graph inside of transforms of torch.func. Raises OctavError where quantizers have no rule for them."""
        quantizers = [m for m in children_of(self)[QUANTIZERS].modules() if isinstance(m, FakeQuantizer)]  # type: ignore[union-attr]
        kinds = transforms()
        if not quantizers or (kinds == {"Vmap"} and all(m.clip is not None for m in quantizers)):
            return self._run(guarded, args, kwargs)
        if kinds - {"Grad", "Vmap"} or any(m.learned is not None or m.settings.sync for m in quantizers):
            raise OctavError(
                f"{self.user_class.__name__}: of torch.func's transforms quantizers have rules for Grad and Vmap, and "
                f"none where clips are learned or synchronized; here {' and '.join(sorted(kinds))} run: take gradients "
                "by torch.autograd, or use octav_fx.float_mode(q)"
            )
        with transformed(quantizers):
            return guarded.function()(self._state_holder(), *args, **kwargs)

    def holding(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, deeply: bool = True) -> GuardedGraph | None:
        """Return the first graph of the present mode that holds for a call, as far as asked; None where none does."""
        state = self._state_holder()
        for guarded in self._graphs[self.training]:
            if guarded.broken(state, args, kwargs, deeply=deeply) is None:
                return guarded
        return None

    @contextmanager
    def led_by_used(self) -> Iterator[None]:
        """Let the graph that runs most often inside be the first of eval mode, unless that runs, too."""
        self._used = []
        try:
            yield
        finally:
            used, self._used = self._used, None
        graphs = self._graphs[False]
        if used and graphs and not any(ran is graphs[0] for ran in used):
            graphs.sort(key=lambda guarded: -sum(ran is guarded for ran in used))
            self.follow(self.training)

    def _run(self, guarded: GuardedGraph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a graph that holds for a call; of a frozen module as what it is deployed as."""
        if self._used is not None:
            self._used.append(guarded)
        rule = self._present_rule(guarded)
        state = self._state_holder()
        if rule is None:
            return guarded.function()(state, *args, **kwargs)
        if is_recorded(self, (args, kwargs)):
            return with_gradients_of(functools.partial(guarded.function(), state), rule._dispatch, args, kwargs)
        if guarded.uses.stored:
            return with_stores_of(functools.partial(guarded.function(), state), rule._dispatch, args, kwargs)
        store_flags(self.owner, guarded.uses.flags)
        return rule._dispatch(*args, **kwargs)

    def _run_or_capture(self, guarded: GuardedGraph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a graph. Where it fails and forward does not, which may catch the error, get what forward needs."""
        try:
            return self._run(guarded, args, kwargs)
        except (OctavError, torch.OutOfMemoryError):
            raise
        except (AssertionError, RuntimeError, IndexError, ValueError, TypeError, AttributeError) as error:
            # Others, such as what ends a recomputation early, are for those around the call.
            if self.capture_again is None:
                raise
            reason = f"the graph fails: {error}"
        with guarded.refused(args, kwargs, reason):
            return self._run_new(args, kwargs)

    def run_own_python(self, function: Callable[..., Any]) -> None:
        """Let a function of the arguments run from now on, in the present mode, where no graph holds."""
        self._own_python[self.training] = function

    @torch.compiler.disable(reason="octav_fx captures a new graph for these inputs; the next such call is compiled")
    def _run_new(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # A compiled call may still lead here after the graph for it was made.
        if self.holding(args, kwargs) is None:
            self.run_capture_again(args, kwargs)
            # Code that was compiled around this call would never look for the graph: by itself it holds as it is.
            forget_compiled_callers()
        return self._dispatch(*args, **kwargs)

    @torch.compiler.disable(reason="octav_fx captures what modules below were replaced by; the next call is compiled")
    def _run_look(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if looked_at(self.owner):
            self.run_capture_again(args, kwargs)

    def run_capture_again(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Get what is needed for a call. Raises OctavError where there is nothing to get it from."""
        if self.capture_again is None:
            raise OctavError(f"{type(self).__name__} has no graph for this call: {self.why_not(args, kwargs)}")
        self.capture_again(self, call_of(self.owner, args, kwargs))

    def why_not(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Say which guard of the first graph of the present mode does not hold for a call."""
        graphs = self._graphs[self.training]
        return str(graphs[0].broken(self._state_holder(), args, kwargs)) if graphs else str(graph_info(self).missing)

    def float_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the owner's own forward: it may iterate over its children, and must not meet the quantizers.

        Where it calls itself, for the images of a batch with labels, that is float, too.
        """
        with self.as_float(), hidden_quantizers(self.owner):
            return self._own_forward()(self.owner, *args, **kwargs)

    def simulated_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the graph computes, frozen or not: levels, multiplied in float."""
        self._simulates = True
        try:
            return self.forward(*args, **kwargs)
        finally:
            self._simulates = False

    def _present_rule(self, guarded: GuardedGraph) -> IntegerModule | None:
        """Return what computes a graph's results from the present state; None where the graph itself does."""
        if self._simulates or not self._is_frozen(guarded):
            return None
        # Compiled code cannot ask whether it is of the present state.
        asks, derived = not torch.compiler.is_compiling(), guarded.derived
        # Nor does Dynamo go through what is called from here, which it would, function by function, where it leaves
        # this one to Python because it breaks a graph.
        is_gone = derived is None or not derived.has_numbers_of(self.owner)
        if is_gone or (asks and not not_compiled(functools.partial(derived.is_of, self))):
            not_compiled(functools.partial(self._derive, guarded))
        rule: IntegerModule = guarded.derived.module
        return rule

    def _is_frozen(self, guarded: GuardedGraph) -> bool:
        if self.training:
            return False
        if guarded.uses is None:
            guarded.uses = uses_of(guarded.graph)
        return is_frozen(self, guarded.uses)

    def _derive(self, guarded: GuardedGraph) -> None:
        graphs = self._graphs[False]
        made = type(self).make_rule(self, graphs.index(guarded))
        if guarded is not graphs[0] and (first := graphs[0].derived) is not None:
            first.module.share_equal(made)
        guarded.derived = Derived(self, self.owner, guarded.uses, made)

    def refresh(self) -> None:
        """Make what a frozen module computes in eval mode from its present state; of any other do nothing."""
        self.forget()
        for guarded in self._graphs[False]:
            if self._is_frozen(guarded):
                self._derive(guarded)

    def forget(self) -> None:
        """Let the next call of a frozen module make what it computes anew."""
        for guarded in self._captured():
            guarded.derived = None

    def forget_state(self) -> None:
        """Let the next call ask anew what holds, too: parameters may have another dtype."""
        self.forget()
        for guarded in (*self._graphs[True], *self._graphs[False]):
            if guarded.guards is not None:
                guarded.guards.forget()

    @contextmanager
    def as_float(self) -> Iterator[None]:
        """Let calls of the owner run float_forward inside."""
        held = vars(self.owner)
        outer = held.get("forward")
        held["forward"] = self.float_forward
        try:
            with permitted():
                yield
        finally:
            held.pop("forward")
            if outer is not None:
                held["forward"] = outer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Objects that the graph reads, which capture has put there.
            held = vars(self.__dict__.get("owner", self))
            if name not in held:
                raise
            return held[name]

    @property
    def plain_attributes(self) -> dict[str, Any]:
        """Return what the owner holds besides parts, tensors and what can be called, by name."""
        ours = ("training", GRAPHS, STRUCTURE)
        held = {name: value for name, value in vars(self.owner).items() if name[:1] != "_" and name not in ours}
        return {name: value for name, value in held.items() if not callable(value) and not tensors_of(value)}

    def _parts(self) -> tuple[Any, ...]:
        """Return what this is made of besides the owner, as values that copy and pickle."""
        return self._graphs, self.meta, self.recipe, self.capture_again


# By code: names in it may stand for other objects elsewhere.
_SHARED: Final = weakref.WeakValueDictionary[Any, type[QuantizedModule]]()


@contextmanager
def hidden_quantizers(owner: nn.Module) -> Iterator[None]:
    """Let a module have the children inside that its class gave it."""
    quantizers = children_of(owner).pop(QUANTIZERS, None)
    try:
        yield
    finally:
        if quantizers is not None:
            children_of(owner)[QUANTIZERS] = quantizers


def graphs_of(module: nn.Module) -> QuantizedModule | None:
    """Return the graphs of a WholeModule; None for any other module."""
    return vars(module).get(GRAPHS)


def quantized_modules(q: nn.Module) -> list[QuantizedModule]:
    """Return the graphs in q, whose owners quantize() has made whole.

    Raises OctavError if there is none, and where modules were replaced that no graph knows yet.
    """
    if not (found := graphs_in(q)):
        raise OctavError(f"{type(q).__name__} holds no module that octav_fx.quantize returned")
    check_unchanged(q)
    return found


def graphs_in(q: nn.Module) -> list[QuantizedModule]:
    """Return the graphs in q, if there are any, and whatever became of their modules since."""
    return [graphs for module in q.modules() if (graphs := graphs_of(module)) is not None]
