"""QuantizedModule: the user's module tree, seen through a rewritten graph."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from octav_fx.capture.dispatch import GuardedModule, is_traced
from octav_fx.capture.flat import flatten, unflatten
from octav_fx.capture.guards import GuardedGraph, Guards
from octav_fx.capture.inputs import Inputs, call_of, tensors_of
from octav_fx.capture.module_state import without_history
from octav_fx.compat.modules import (
    HOOK_ATTRIBUTES,
    buffers_of,
    children_of,
    parameters_of,
    replace_children,
    share_parts,
    transient_buffers_of,
)
from octav_fx.compat.tensors import pytree
from octav_fx.errors import NotCaptured, OctavError
from octav_fx.ir.records import Record, graph_info
from octav_fx.nn.fake_quantizer import QUANTIZERS

# Gives a module what it needs for a call that no graph of it holds for: a graph more, or its own Python.
CaptureAgain = Callable[["QuantizedModule", Inputs], None]

# What a quantized module has besides what its class has.
_RESERVED: Final = (QUANTIZERS, "meta", "examples")


class QuantizedModule(GuardedModule):
    """A GraphModule over the very submodules, parameters and buffers of a float module.

    Names, ties and containers of the float module stay, so its checkpoints load and its optimizer groups hold; the
    quantizers are one more child. Each graph holds under guards: forward runs the first that holds for its inputs, and
    where none does, captures one more. Where the float module's Python code branches on self.training each mode has its
    own. float_forward() runs the float module's own forward on the same state.
    """

    def __init__(
        self,
        float_module: nn.Module,
        graphs: Mapping[bool, Sequence[GuardedGraph]],
        meta: Mapping[str, Any],
        recipe: Any = None,
        capture_again: CaptureAgain | None = None,
    ) -> None:
        taken = (*children_of(float_module), *parameters_of(float_module), *buffers_of(float_module))
        if clash := [name for name in taken if name in _RESERVED or hasattr(QuantizedModule, name)]:
            raise NotCaptured(
                f"{type(float_module).__name__}.{clash[0]}: octav_fx needs that name; rename the attribute"
            )
        super().__init__(nn.Module(), fx.Graph(), type(float_module).__name__)
        self._parameters = parameters_of(float_module)
        self._buffers = buffers_of(float_module)
        self._non_persistent_buffers_set = transient_buffers_of(float_module)
        # A dict of its own: the float module's forward may iterate over its children and must not meet the quantizers.
        self._modules = dict(children_of(float_module))
        self._modules[QUANTIZERS] = nn.Module()
        for name in HOOK_ATTRIBUTES:
            setattr(self, name, getattr(float_module, name))
        self.training = float_module.training
        # The inputs that quantize() was given, as (args, kwargs): what tables measure. Not pickled.
        self.examples: Inputs | None = None
        # For each mode the graphs that were captured so far; the first is the one that quantize() made.
        self._graphs = {mode: list(graphs.get(mode, ())) for mode in (True, False)}
        for guarded in (*self._graphs[True], *self._graphs[False]):
            guarded.graph.owning_module = self
        # What further graphs are made with, and what makes them; what runs where none can be made, for each mode.
        self.recipe, self.capture_again = recipe, capture_again
        self._own_python: dict[bool, Callable[..., Any]] = {}
        self.meta = dict(meta)
        if self._graphs[self.training]:
            self.graph = self._graphs[self.training][0].graph
        # Not a registered child: the tree below both is the same one. From now on it gets what users set.
        self.__dict__["_float_module"] = float_module

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

    def train(self, mode: bool = True) -> "QuantizedModule":
        """Set the mode of every module, and show the graph of that mode where it has its own."""
        super().train(mode)
        if (graphs := self._graphs[mode]) and graphs[0].graph is not self.graph:
            self.graph = graphs[0].graph
        return self

    def _captured(self) -> Sequence[GuardedGraph]:
        return [guarded for graphs in self.__dict__.get("_graphs", {}).values() for guarded in graphs]

    def _dispatch(self, *args: Any, **kwargs: Any) -> Any:
        graphs = self._graphs[self.training]
        if is_traced(args):
            return graphs[0].function()(self, *args, **kwargs)
        for guarded in graphs:
            if guarded.broken(self, args, kwargs) is None:
                return guarded.function()(self, *args, **kwargs)
        if (own := self._own_python.get(self.training)) is not None:
            return own(*args, **kwargs)
        return self._run_new(args, kwargs)

    def run_own_python(self, function: Callable[..., Any]) -> None:
        """Let a function of the arguments run from now on, in the present mode, where no graph holds."""
        self._own_python[self.training] = function

    @torch.compiler.disable(reason="octav_fx captures a new graph for these inputs; the next such call is compiled")
    def _run_new(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.capture_again is None:
            raise OctavError(f"{type(self).__name__} has no graph for this call: {self.why_not(args, kwargs)}")
        for guarded in self._graphs[self.training]:
            # A compiled call may still lead here after the graph for it was made.
            if guarded.broken(self, args, kwargs) is None:
                return guarded.function()(self, *args, **kwargs)
        self.capture_again(self, call_of(self._float_module, args, kwargs))
        return self._dispatch(*args, **kwargs)

    def why_not(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Say which guard of the first graph of the present mode does not hold for a call."""
        graphs = self._graphs[self.training]
        return str(graphs[0].broken(self, args, kwargs)) if graphs else str(graph_info(self).missing)

    def float_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the float module's own forward, on the parameters and buffers of this one."""
        return self.float_module().forward(*args, **kwargs)

    def float_module(self) -> nn.Module:
        """Return the float module, in the mode of this one and with its children."""
        float_module: nn.Module = self._float_module
        children_of(float_module).update({name: self._modules[name] for name in children_of(float_module)})
        float_module.training = self.training
        return float_module

    @contextmanager
    def as_float(self) -> Iterator[None]:
        """Let calls run float_forward inside."""
        outer = self.__dict__.get("forward")
        self.__dict__["forward"] = self.float_forward
        try:
            yield
        finally:
            self.__dict__.pop("forward")
            if outer is not None:
                self.__dict__["forward"] = outer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Plain attributes of the float module (config, num_classes). Not its methods: they would run in float.
            value = vars(self.__dict__.get("_float_module", self)).get(name, self)
            if value is self or callable(value):
                raise
            return value

    def __setattr__(self, name: str, value: Any) -> None:
        float_module = self.__dict__.get("_float_module")
        is_plain = not isinstance(value, (nn.Module, nn.Parameter))
        if float_module is None or not is_plain or name in self.__dict__ or hasattr(type(self), name):
            super().__setattr__(name, value)
        else:
            # Where forward reads it, and guards look.
            setattr(float_module, name, value)

    @property
    def plain_attributes(self) -> dict[str, Any]:
        """Return what the float module holds besides parts, tensors and what can be called, by name."""
        held = vars(self._float_module).items()
        return {
            name: value
            for name, value in held
            if name[:1] != "_" and name != "training" and not callable(value) and not tensors_of(value)
        }

    def _parts(self) -> tuple[Any, ...]:
        """Return all that this module is made of, as values that copy and pickle."""
        # Past copy.copy, which modules with parametrizations refuse.
        kind: Any = type(self._float_module)
        float_module = kind.__new__(kind)
        float_module.__dict__ = {**vars(self._float_module)}
        replace_children(float_module, {name: m for name, m in children_of(self).items() if name != QUANTIZERS})
        float_module.training = self.training
        for name in HOOK_ATTRIBUTES:
            float_module.__dict__[name] = getattr(self, name)
        further = (self.recipe, self.capture_again)
        return float_module, self._graphs, self.meta, further, children_of(self)[QUANTIZERS]

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _rebuild, self._parts()

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantizedModule":
        memo.update(without_history(self))
        copied = _rebuild(*copy.deepcopy(self._parts(), memo))
        copied.examples = self.examples
        memo[id(self)] = copied
        return copied


def quantized_modules(q: nn.Module) -> list[QuantizedModule]:
    """Return the modules in q that quantize() returned, q itself included. Raises OctavError if there is none."""
    found = [module for module in q.modules() if isinstance(module, QuantizedModule)]
    if not found:
        raise OctavError(f"{type(q).__name__} holds no module that octav_fx.quantize returned")
    return found


def _rebuild(
    float_module: nn.Module,
    graphs: dict[bool, list[GuardedGraph]],
    meta: dict[str, Any],
    further: tuple[Any, CaptureAgain | None],
    quantizers: nn.Module,
) -> QuantizedModule:
    module = QuantizedModule(float_module, graphs, meta, *further)
    children_of(module)[QUANTIZERS] = quantizers
    return module


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
        if not is_traced(args) and (fault := self._guarded.broken(self, args, kwargs)) is not None:
            raise OctavError(
                f"{fault}: a converted model holds for calls like the example of octav_fx.quantize alone; quantize "
                "with an example like this call, load the state into that and convert it"
            )
        return self._guarded.function()(self, *args, **kwargs)

    def _parts(self) -> tuple[Any, ...]:
        root = nn.Module()
        share_parts(self, root)
        attributes = self.__dict__["octav_attributes"]
        return root, flatten(self.graph), type(self).__name__, self.meta, attributes, self._guards

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _rebuild_integer, self._parts()

    def __deepcopy__(self, memo: dict[int, Any]) -> "IntegerModule":
        copied = _rebuild_integer(*copy.deepcopy(self._parts(), memo))
        memo[id(self)] = copied
        return copied


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
    return module
