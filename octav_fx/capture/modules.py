"""QuantizedModule: the graphs of a module. WholeModule: the module, of the user's class, whose forward they are."""

import copy
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import CodeType
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized

from octav_fx.capture.classes import forward_of, stand_in
from octav_fx.capture.dispatch import GuardedModule, is_traced
from octav_fx.capture.find_constants import constants_of
from octav_fx.capture.flat import flatten, unflatten
from octav_fx.capture.frozen import Derived, is_frozen, is_recorded, with_gradients_of
from octav_fx.capture.guards import GuardedGraph, Guards
from octav_fx.capture.held import hold, let_go
from octav_fx.capture.inputs import Inputs, call_of, tensors_of
from octav_fx.capture.module_state import without_history
from octav_fx.capture.permits import is_permitted, permitted
from octav_fx.capture.replaced import STRUCTURE, check_unchanged, is_changed, looked_at, remember_structure
from octav_fx.capture.symbolic.side_effects import stores
from octav_fx.capture.transformed import transformed
from octav_fx.compat.graphs import forget_compiled_callers, is_writing_onnx
from octav_fx.compat.modules import (
    buffers_of,
    children_of,
    not_compiled,
    parameters_of,
    replace_children,
    share_forward_hooks,
    share_parts,
)
from octav_fx.compat.tensors import is_sharded, pytree, transform, transforms
from octav_fx.errors import NotCaptured, OctavError
from octav_fx.ir.ops import op_of_module
from octav_fx.ir.records import Record, graph_info
from octav_fx.ir.table.contractions import CONTRACTIONS
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

    In eval mode, where every quantizer has a static clip, the first graph runs as a module that make_rule returns, made
    from the present state: see capture/frozen.py.
    """

    owner: nn.Module
    user_class: type[nn.Module]
    _own_forward: Callable[[], Callable[..., Any]]
    # The present graph as a function.
    captured: ClassVar[Callable[..., Any]]
    # From a frozen module to what it computes in eval mode. Passes are a floor above, and deploy/rule.py puts it here.
    make_rule: ClassVar[Callable[["QuantizedModule"], "IntegerModule"]]

    def __init__(
        self,
        owner: nn.Module,
        graphs: Mapping[bool, Sequence[GuardedGraph]],
        meta: Mapping[str, Any],
        recipe: Any = None,
        capture_again: CaptureAgain | None = None,
        quantizers: nn.Module | None = None,
    ) -> None:
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
        # Those that ran, while somebody wants to know.
        self._used: list[GuardedGraph] | None = None
        self.meta = dict(meta)
        if self._graphs[self.training]:
            self.graph = self._graphs[self.training][0].graph

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

    def written_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that a graph writes into: a teacher that follows, a weight that is masked."""
        names = {name for guarded in self._captured() for name in guarded.written()}
        return [p for name, p in nn.Module.named_parameters(self.owner, remove_duplicate=False) if name in names]

    def follow(self, mode: bool) -> None:
        """Show the first graph of a mode, which is that of the owner; its children have theirs."""
        self.training = mode
        if (graphs := self._graphs[mode]) and graphs[0].graph is not self.graph:
            self.graph = graphs[0].graph
        if self._rule is not None and not self._rule.is_of(self):
            self.forget()

    def recompile(self) -> Any:
        """Generate the code of the graph, and share the class that holds it with all modules of the same code.

        torch.compile asks for classes: a model of many equal blocks is compiled once. What was made of another graph is
        forgotten.
        """
        self.forget()
        self._simulates = False
        called = (str(node.target) for node in self.graph.find_nodes(op="call_module"))
        self._called_quantizers = [target for target in called if target.startswith(f"{QUANTIZERS}.")]
        self._stores = stores(self.graph)
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
        """Run a graph that holds for a call; of a frozen module the first as what it is deployed as."""
        if self._used is not None:
            self._used.append(guarded)
        is_first = not self.training and guarded is self._graphs[False][0]
        rule = self._present_rule() if is_first else None
        state = self._state_holder()
        if rule is None:
            return guarded.function()(state, *args, **kwargs)
        if is_recorded(self, (args, kwargs)):
            return with_gradients_of(functools.partial(guarded.function(), state), rule._dispatch, args, kwargs)
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
        with self.as_float(), _hidden_quantizers(self.owner):
            return self._own_forward()(self.owner, *args, **kwargs)

    def simulated_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the graph computes, frozen or not: levels, multiplied in float."""
        self._simulates = True
        try:
            return self.forward(*args, **kwargs)
        finally:
            self._simulates = False

    def _present_rule(self) -> "IntegerModule | None":
        """Return what computes the present state in eval mode; None where the graph itself does."""
        if self._simulates or not self._is_frozen():
            return None
        # Compiled code cannot ask whether it is of the present state.
        is_old = self._rule is None or (not torch.compiler.is_compiling() and not self._rule.is_of(self))
        if is_old:
            # Nor does Dynamo go through what makes it, which it would where it compiles what is called from here.
            not_compiled(self.refresh)
        assert self._rule is not None
        return self._rule.module

    def _is_frozen(self) -> bool:
        # What forward stores on the user's modules would be stored on copies.
        possible = not self.training and not self._stores
        return possible and is_frozen(self, map(self.get_submodule, self._called_quantizers), self._used_parts)

    def _used_parts(self) -> set[nn.Module]:
        """Return the modules that the present graph calls, with what is below them, and those whose state it reads."""
        called = [self.get_submodule(str(node.target)) for node in self.graph.find_nodes(op="call_module")]
        read = {str(node.target).rpartition(".")[0] for node in self.graph.find_nodes(op="get_attr")}
        return {part for module in called for part in module.modules()} | set(map(self.get_submodule, read))

    def refresh(self) -> None:
        """Make what a frozen module computes in eval mode from its present state; of any other do nothing."""
        self._rule: Derived | None = Derived(self, type(self).make_rule(self)) if self._is_frozen() else None

    def forget(self) -> None:
        """Let the next call of a frozen module make what it computes anew."""
        self._rule = None

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


class WholeModule:
    """Marks a module that graphs hold: own_class() makes its class a subclass of the user's and of this one.

    isinstance, attributes, methods, keys, hooks and the signature of forward are those of the user's class. What the
    graphs are asked for (graph, code, records, meta) is found where the user has no attribute of that name.
    """

    @property
    def _float_module(self) -> Any:
        """Return what a graph finds when it stores or reads an attribute of the outermost module."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what a graph that holds for the call computes; after modules below were replaced, one of now."""
        _check_not_onnx(self)
        graphs: QuantizedModule = vars(self)[GRAPHS]
        if is_changed(graphs.owner):
            graphs._run_look(args, kwargs)
            if GRAPHS not in vars(self):
                # It is of another class now, and runs its own Python.
                return self.forward(*args, **kwargs)
        return vars(self)[GRAPHS].forward(*args, **kwargs)

    def train(self, mode: bool = True) -> Any:
        """Set the mode as the user's class does, and take the graph of that mode where it has its own."""
        super().train(mode)  # type: ignore[misc]
        vars(self)[GRAPHS].follow(mode)
        return self

    def __repr__(self) -> str:
        # torch.onnx.export describes a model before it runs it, and would wrap an error of the run in one of its own.
        if not is_permitted():
            _check_not_onnx(self)
        return super().__repr__()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Take a parameter as the user's class does, but none of parallelize_module, whose products give parts of sums.

        Those of FSDP2 do not come this way, and are whole when the graph runs.
        """
        if param is not None and is_sharded(param):
            raise OctavError(
                f"{name} of {type(self).__name__} is sharded by tensor parallelism, which no graph runs: shard blocks "
                "by torch.distributed.fsdp.fully_shard, or make them stages of a pipeline"
            )
        super().register_parameter(name, param)  # type: ignore[misc]

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        vars(self)[GRAPHS].forget()
        # A user's class may not take all that nn.Module's takes.
        return super()._apply(*args, **kwargs)  # type: ignore[misc]

    def _load_from_state_dict(self, *args: Any) -> None:
        vars(self)[GRAPHS].forget()
        super()._load_from_state_dict(*args)  # type: ignore[misc]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            graphs = vars(self).get(GRAPHS)
            if graphs is None or not (hasattr(QuantizedModule, name) or name in vars(graphs)):
                raise
            return getattr(graphs, name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The subclass has no name to be pickled by.
        return _new, (vars(self)[GRAPHS].user_class,), self._state()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        graphs: QuantizedModule = vars(self)[GRAPHS]
        owner: Any = self
        memo.update(without_history(owner))
        copied = memo[id(self)] = _new(graphs.user_class)
        copied.__setstate__(copy.deepcopy(self._state(), memo))
        vars(copied)[GRAPHS].examples = graphs.examples
        return copied

    def _state(self) -> tuple[Any, ...]:
        """Return what the user's class says its state is, and the graphs."""
        graphs: QuantizedModule = vars(self)[GRAPHS]
        # torch refuses the state of a module with parametrizations, for its pickles; a copy may have it.
        state: Any = dict(vars(self)) if is_parametrized(self) else self.__getstate__()  # type: ignore[arg-type]
        if isinstance(state, dict):
            state = {name: value for name, value in state.items() if name != GRAPHS}
            if getattr(state.get("forward"), "__self__", None) is graphs:
                # That of as_float.
                del state["forward"]
        return (state, *graphs._parts())

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        users, *parts = state
        super().__setstate__(users)  # type: ignore[misc]
        owner: Any = self
        owner.__class__ = type(self).__mro__[2]
        quantizers = children_of(owner).pop(QUANTIZERS)
        graphs, meta, recipe, capture_again = parts
        make_whole(QuantizedModule(owner, graphs, meta, recipe, capture_again, quantizers))


def _check_not_onnx(q: object) -> None:
    """Raise OctavError where torch.onnx.export asks: its ops round nothing to a grid and hold no codes of four bits."""
    if is_writing_onnx():
        raise OctavError(
            f"torch.onnx.export knows no quantizers, and {type(q).__name__} has some: octav_fx.calibrate, "
            "octav_fx.freeze, and then octav_fx.export_onnx write this model"
        )


def make_whole(graphs: QuantizedModule) -> nn.Module:
    """Let the forward of the owner be its graphs; return the owner, which is of a subclass of its class from now on."""
    owner = graphs.owner
    called = [graphs.get_submodule(path) for path in graphs.called()]
    hold(owner, [*called, *_whole_below(owner)], filter(_multiplies, owner.modules()))
    children_of(owner)[QUANTIZERS] = children_of(graphs)[QUANTIZERS]
    share_parts(owner, graphs)
    kind: Any = type(owner)
    owner.__class__ = _whole_class(kind)
    vars(owner)[GRAPHS] = graphs
    remember_structure(owner)
    constants = constants_of(owner)
    for guarded in graphs._captured():
        guarded.hold_constants(constants)
    return owner


def make_users_own(owner: nn.Module) -> None:
    """Take make_whole() back for good."""
    graphs = vars(owner).pop(GRAPHS)
    owner.__class__ = graphs.user_class
    del children_of(owner)[QUANTIZERS]
    for module, _ in vars(owner).pop(STRUCTURE).children:
        let_go(module)


def _whole_below(owner: nn.Module) -> list[nn.Module]:
    return [module for module in owner.modules() if graphs_of(module) is not None]


def _multiplies(module: nn.Module) -> bool:
    """Tell whether forward of a module reads a matrix: one of torch's layers, or one of the user's classes."""
    if op_of_module(module) is not None:
        return op_of_module(module) in CONTRACTIONS
    is_torchs = type(module).__module__.startswith("torch.nn")
    return not is_torchs and any(p is not None and p.dim() > 1 for p in parameters_of(module).values())


@contextmanager
def users_own(root: nn.Module, but: nn.Module | None = None) -> Iterator[None]:
    """Make every module in root what it was before quantize() inside: of the user's class, without quantizers.

    but: one that stays as it is.
    """
    held = {module: graphs_of(module) for module in root.modules() if module is not but}
    whole = {module: graphs for module, graphs in held.items() if graphs is not None}
    kinds, quantizers = {module: type(module) for module in whole}, {}
    for module, graphs in whole.items():
        module.__class__ = graphs.user_class
        quantizers[module] = children_of(module).pop(QUANTIZERS)
        del vars(module)[GRAPHS]
    try:
        with permitted():
            yield
    finally:
        for module, graphs in whole.items():
            module.__class__ = kinds[module]
            children_of(module)[QUANTIZERS] = quantizers[module]
            vars(module)[GRAPHS] = graphs


@contextmanager
def _hidden_quantizers(owner: nn.Module) -> Iterator[None]:
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


# Of a container, which must not count the quantizers among its children.
_CONTAINER_METHODS: Final = ("__len__", "__getitem__", "__iter__", "__contains__", "__reversed__")
_CONTAINER_CHANGES: Final = ("__setitem__", "__delitem__", "append", "insert", "extend", "pop", "clear")


@functools.cache
def _whole_class(kind: Any) -> type[nn.Module]:
    """Return the subclass of a user's class for modules that graphs hold."""

    @functools.wraps(kind.forward)
    def forward(self: WholeModule, *args: Any, **kwargs: Any) -> Any:
        return WholeModule.forward(self, *args, **kwargs)

    names = {name: _unseen(getattr(kind, name)) for name in _CONTAINER_METHODS if hasattr(kind, name)}
    names |= {name: _shared(_unseen(getattr(kind, name))) for name in _CONTAINER_CHANGES if hasattr(kind, name)}
    return stand_in(kind, WholeModule, forward, names)


def code_around(kind: Any) -> CodeType:
    """Return the code that runs first where the forward of a user's class is graphs.

    It is the user's where the class wraps the forward of each subclass, as the layers of transformers do.
    """
    code: CodeType = _whole_class(kind).forward.__code__
    return code


def _unseen(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of a container that does not see the quantizers."""

    @functools.wraps(method)
    def call(self: nn.Module, *args: Any) -> Any:
        with _hidden_quantizers(self):
            found = method(self, *args)
            return iter(list(found)) if method.__name__ in ("__iter__", "__reversed__") else found

    return call


def _shared(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of a container after which its graphs have what it has: in a new dict, where it deletes."""

    @functools.wraps(method)
    def call(self: nn.Module, *args: Any) -> Any:
        found = method(self, *args)
        share_parts(self, vars(self)[GRAPHS])
        return found

    return call


def _new(kind: Any) -> Any:
    """Return a module of the subclass for a user's class, without anything in it yet."""
    # Past __new__ of the user's class: that of a GraphModule makes one more class.
    return object.__new__(_whole_class(kind))


class IntegerModule(GuardedModule):
    """A GraphModule that holds what its graph reads and no more, and that copies and pickles without being traced."""

    def __init__(
        self,
        root: nn.Module,
        graph: fx.Graph,
        name: str,
        meta: Mapping[str, Any],
        attributes: Mapping[str, Any],
        guards: Guards | None = None,
    ) -> None:
        super().__init__(root, graph, name)
        self.meta = dict(meta)
        self.training = False
        self._guards = guards
        self._guarded = GuardedGraph(self.graph, guards)
        self.recompile()
        # Plain ones of the float module (num_experts), which code around it may read.
        self.__dict__["octav_attributes"] = dict(attributes)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph. A gradient through it would be zero: asking for one raises OctavError."""
        result = super().__call__(*args, **kwargs)
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not given or not torch.is_grad_enabled():
            return result
        return pytree.tree_map(lambda y: WithoutGradient.apply(y, *given) if _is_floating(y) else y, result)

    def remember_outline(self, owner: nn.Module) -> None:
        """Let code around read of a layer whose weight is codes now what does not depend on its values."""
        outline = _outline(owner)
        parts = {**parameters_of(outline), **children_of(outline)}
        self.__dict__["octav_attributes"] |= {name: part for name, part in parts.items() if not hasattr(self, name)}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in (known := self.__dict__.get("octav_attributes", {})):
                raise
            return known[name]

    def _captured(self) -> Sequence[GuardedGraph]:
        return [self._guarded] if "_guarded" in self.__dict__ else []

    def _dispatch(self, *args: Any, **kwargs: Any) -> Any:
        if not is_traced(args):
            self._check(args, kwargs)
        return self._guarded.function()(self, *args, **kwargs)

    def check_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raise OctavError for a call that the graph does not hold for: torch.export runs the graph past forward."""
        try:
            bound = inspect.signature(self.forward).bind(*args, **kwargs)
        except TypeError as error:
            raise OctavError(f"the inputs do not fit {type(self).__name__}.forward: {error}") from error
        bound.apply_defaults()
        self._check(bound.args, bound.kwargs)

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (fault := self._guarded.broken(self, args, kwargs)) is not None:
            raise OctavError(
                f"{fault}: a converted model holds for calls of one kind, the example of octav_fx.quantize or what "
                "octav_fx.calibrate ran instead: calibrate with batches like this call alone, freeze, and convert again"
            )

    def _parts(self) -> tuple[Any, ...]:
        root = nn.Module()
        share_parts(self, root)
        share_forward_hooks(self, root)
        attributes = self.__dict__["octav_attributes"]
        return root, flatten(self.graph), type(self).__name__, self.meta, attributes, self._guards

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _rebuild_integer, self._parts()

    def __deepcopy__(self, memo: dict[int, Any]) -> "IntegerModule":
        copied = _rebuild_integer(*copy.deepcopy(self._parts(), memo))
        memo[id(self)] = copied
        return copied


def _outline(module: nn.Module) -> nn.Module:
    """Return a module of the names, shapes and types of the parameters of another one, on the meta device."""
    outline = nn.Module()
    for name, parameter in parameters_of(module).items():
        made = None if parameter is None else nn.Parameter(torch.empty_like(parameter, device="meta"), False)
        outline.register_parameter(name, made)
    for name, child in children_of(module).items():
        if child is not None and name != QUANTIZERS and not isinstance(child, torch.jit.ScriptModule):
            outline.add_module(name, _outline(child))
    return outline


class WithoutGradient(torch.autograd.Function):
    """y [...], and whatever it was computed from by integers -> y, whose gradient nobody knows."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *given: Tensor) -> Tensor:
        """Return y."""
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Raise OctavError."""
        raise OctavError("a converted model multiplies integers and has no gradient: take it in the frozen one")


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _rebuild_integer(
    root: nn.Module,
    rows: list[Any],
    name: str,
    meta: dict[str, Any],
    attributes: dict[str, Any],
    guards: Guards | None,
) -> IntegerModule:
    module = IntegerModule(root, unflatten(rows), name, meta, attributes, guards)
    # A graph that reads one tensor of a module is no reason to lose the others.
    replace_children(module, children_of(root))
    share_forward_hooks(root, module)
    return module
