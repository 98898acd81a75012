"""QuantizedModule: the user's module tree, seen through a rewritten graph."""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Final

import torch
from torch import fx, nn

from octav_fx.capture.frozen import Derived, is_frozen, is_recorded, with_gradients_of
from octav_fx.capture.inputs import Inputs
from octav_fx.compat.modules import (
    HOOK_ATTRIBUTES,
    buffers_of,
    children_of,
    not_compiled,
    parameters_of,
    replace_children,
    share_parts,
    transient_buffers_of,
)
from octav_fx.errors import NotCaptured, OctavError
from octav_fx.ir.meta import info, update
from octav_fx.ir.records import Record, graph_info
from octav_fx.nn.fake_quantizer import QUANTIZERS

# What a quantized module has besides what its class has.
_RESERVED: Final = (QUANTIZERS, "meta", "examples")


class QuantizedModule(fx.GraphModule):
    """A GraphModule over the very submodules, parameters and buffers of a float module.

    Names, ties and containers of the float module stay, so its checkpoints load and its optimizer groups hold; the
    quantizers are one more child. Where the float module's Python code branches on self.training there are two
    graphs, and train() and eval() choose. float_forward() runs the float module's own forward on the same state.

    In eval mode, where every quantizer has a static clip, forward is that of a module that make_rule returns, made from
    the present state: see capture/frozen.py.
    """

    # From a frozen module to what it computes in eval mode. Passes are a floor above, and deploy/rule.py puts it here.
    make_rule: ClassVar[Callable[["QuantizedModule"], nn.Module]]
    # What the graph computes, frozen or not: levels, multiplied in float.
    simulated_forward: Callable[..., Any]

    def __init__(self, float_module: nn.Module, graphs: Mapping[bool, fx.Graph], meta: Mapping[str, Any]) -> None:
        taken = (*children_of(float_module), *parameters_of(float_module), *buffers_of(float_module))
        if clash := [name for name in taken if name in _RESERVED or hasattr(QuantizedModule, name)]:
            raise NotCaptured(
                f"{type(float_module).__name__}.{clash[0]}: octav_fx needs that name; rename the attribute"
            )
        super().__init__(nn.Module(), fx.Graph(), type(float_module).__name__)
        # Not a registered child: the tree below both is the same one.
        self.__dict__["_float_module"] = float_module
        self._parameters = parameters_of(float_module)
        self._buffers = buffers_of(float_module)
        self._non_persistent_buffers_set = transient_buffers_of(float_module)
        # A dict of its own: the float module's forward may iterate over its children and must not meet the quantizers.
        self._modules = dict(children_of(float_module))
        self._modules[QUANTIZERS] = nn.Module().train(float_module.training)
        for name in HOOK_ATTRIBUTES:
            setattr(self, name, getattr(float_module, name))
        self.training = float_module.training
        # The inputs that quantize() was given, as (args, kwargs): what tables measure. Not pickled.
        self.examples: Inputs | None = None
        self._graphs = dict(graphs)
        for graph in self._graphs.values():
            graph.owning_module = self
        self.meta = dict(meta)
        self.graph = self._graphs[self.training]

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
        first, other = self.training, not self.training
        own = other in self._graphs and self._graphs[other] is not self._graphs[first]
        return (first, other) if own else (first,)

    def graph_of(self, mode: bool) -> fx.Graph:
        """Return the graph of a training mode. Raises OctavError if quantize() could not capture that mode."""
        if mode not in self._graphs:
            raise OctavError(f"{graph_info(self).missing}; call octav_fx.quantize with inputs that fit both modes")
        return self._graphs[mode]

    def train(self, mode: bool = True) -> "QuantizedModule":
        """Set the mode of every module, and take the graph of that mode where it has its own."""
        graph = self.graph_of(mode)
        super().train(mode)
        if graph is not self.graph:
            self.graph = graph
        if self._rule is not None and not self._rule.is_of(self):
            self.forget()
        return self

    def float_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the float module's own forward, on the parameters and buffers of this one."""
        float_module = self._float_module
        children_of(float_module).update({name: self._modules[name] for name in children_of(float_module)})
        float_module.training = self.training
        return float_module.forward(*args, **kwargs)

    def recompile(self) -> Any:
        """Make simulated_forward anew from the graph, and forward, which chooses what a frozen module computes."""
        self.forget()
        called = (str(node.target) for node in self.graph.find_nodes(op="call_module"))
        self._called_quantizers = [target for target in called if target.startswith(f"{QUANTIZERS}.")]
        code, own = super().recompile(), type(self)
        own.simulated_forward = own.forward

        @functools.wraps(own.simulated_forward)
        def forward(self: "QuantizedModule", *args: Any, **kwargs: Any) -> Any:
            rule = self._present_rule()
            if rule is None:
                return self.simulated_forward(*args, **kwargs)
            if is_recorded(self, (args, kwargs)):
                return with_gradients_of(self.simulated_forward, rule, args, kwargs)
            return rule(*args, **kwargs)

        own.forward = forward
        return code

    def _present_rule(self) -> nn.Module | None:
        """Return what computes the present state in eval mode; None where forward is that of the graph."""
        if not self._is_frozen():
            return None
        if torch.compiler.is_compiling():
            # Compiled code cannot ask whether it is of the present state.
            if self._rule is None:
                not_compiled(self.refresh)
        elif self._rule is None or not self._rule.is_of(self):
            self.refresh()
        assert self._rule is not None
        return self._rule.module

    def _is_frozen(self) -> bool:
        return not self.training and is_frozen(self, map(self.get_submodule, self._called_quantizers))

    def refresh(self) -> None:
        """Make what a frozen module computes in eval mode from its present state; of any other do nothing."""
        self._rule: Derived | None = Derived(self, type(self).make_rule(self)) if self._is_frozen() else None

    def forget(self) -> None:
        """Let the next call of a frozen module make what it computes anew."""
        self._rule = None

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        self.forget()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.forget()
        super()._load_from_state_dict(*args)

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

    def _parts(self) -> tuple[Any, ...]:
        """Return all that this module is made of, as values that copy and pickle."""
        float_module = copy.copy(self._float_module)
        float_module.__dict__ = {**vars(self._float_module)}
        replace_children(float_module, {name: m for name, m in children_of(self).items() if name != QUANTIZERS})
        float_module.training = self.training
        for name in HOOK_ATTRIBUTES:
            float_module.__dict__[name] = getattr(self, name)
        flat = {mode: _flatten(self._graphs[mode]) for mode in self.modes}
        shared = [mode for mode in self._graphs if mode not in flat]
        return float_module, flat, shared, self.meta, children_of(self)[QUANTIZERS]

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _rebuild, self._parts()

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantizedModule":
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
    flat: dict[bool, list[Any]],
    shared: list[bool],
    meta: dict[str, Any],
    quantizers: nn.Module,
) -> QuantizedModule:
    graphs = {mode: _unflatten(rows) for mode, rows in flat.items()}
    graphs.update({mode: graphs[not mode] for mode in shared})
    module = QuantizedModule(float_module, graphs, meta)
    children_of(module)[QUANTIZERS] = quantizers
    return module


class _Ref(str):
    """The name of a node, in place of the node: fx nodes link to their neighbours, too deep for pickle."""

    __slots__ = ()


def _flatten(graph: fx.Graph) -> list[Any]:
    def refer(argument: Any) -> Any:
        return fx.node.map_arg(argument, lambda node: _Ref(node.name))

    return [
        (node.op, node.target, refer(node.args), refer(node.kwargs), node.name, info(node).site) for node in graph.nodes
    ]


def _unflatten(rows: list[Any]) -> fx.Graph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}

    def resolve(argument: Any) -> Any:
        return fx.node.map_aggregate(argument, lambda leaf: nodes[leaf] if isinstance(leaf, _Ref) else leaf)

    for op, target, args, kwargs, name, site in rows:
        nodes[name] = graph.create_node(op, target, resolve(args), resolve(kwargs), name)
        if site is not None:
            update(nodes[name], site=site)
    return graph


class IntegerModule(fx.GraphModule):
    """A GraphModule that holds what its graph reads and no more, and that copies and pickles without being traced."""

    def __init__(self, root: nn.Module, graph: fx.Graph, name: str, meta: Mapping[str, Any]) -> None:
        super().__init__(root, graph, name)
        self.meta = dict(meta)
        self.training = False

    def _parts(self) -> tuple[Any, ...]:
        root = nn.Module()
        share_parts(self, root)
        return root, _flatten(self.graph), type(self).__name__, self.meta

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _rebuild_integer, self._parts()

    def __deepcopy__(self, memo: dict[int, Any]) -> "IntegerModule":
        copied = _rebuild_integer(*copy.deepcopy(self._parts(), memo))
        memo[id(self)] = copied
        return copied


def _rebuild_integer(root: nn.Module, rows: list[Any], name: str, meta: dict[str, Any]) -> IntegerModule:
    module = IntegerModule(root, _unflatten(rows), name, meta)
    # A graph that reads one tensor of a module is no reason to lose the others.
    replace_children(module, children_of(root))
    return module
