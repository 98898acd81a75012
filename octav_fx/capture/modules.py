"""QuantizedModule: the user's module tree, seen through a rewritten graph."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from torch import fx, nn

from octav_fx.capture.inputs import Inputs
from octav_fx.errors import NotCaptured, OctavError
from octav_fx.nn.fake_quantizer import QUANTIZERS

# What a quantized module has besides what its class has.
_RESERVED: Final = (QUANTIZERS, "meta", "examples")

_HOOKS: Final = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks"),
    *("_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks"),
    *("_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)


class QuantizedModule(fx.GraphModule):
    """A GraphModule over the very submodules, parameters and buffers of a float module.

    Names, ties and containers of the float module stay, so its checkpoints load and its optimizer groups hold; the
    quantizers are one more child. Where the float module's Python code branches on self.training there are two
    graphs, and train() and eval() choose. float_forward() runs the float module's own forward on the same state.
    """

    def __init__(self, float_module: nn.Module, graphs: Mapping[bool, fx.Graph], meta: Mapping[str, Any]) -> None:
        taken = (*float_module._modules, *float_module._parameters, *float_module._buffers)
        if clash := [name for name in taken if name in _RESERVED or hasattr(QuantizedModule, name)]:
            raise NotCaptured(
                f"{type(float_module).__name__}.{clash[0]}: octav_fx needs that name; rename the attribute"
            )
        super().__init__(nn.Module(), fx.Graph(), type(float_module).__name__)
        # Not a registered child: the tree below both is the same one.
        self.__dict__["_float_module"] = float_module
        self._parameters = float_module._parameters
        self._buffers = float_module._buffers
        self._non_persistent_buffers_set = float_module._non_persistent_buffers_set
        # A dict of its own: the float module's forward may iterate over its children and must not meet the quantizers.
        self._modules = dict(float_module._modules)
        self._modules[QUANTIZERS] = nn.Module()
        for name in _HOOKS:
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
    def records(self) -> list[Any]:
        """What became of each operand, in the graph of the present mode: Records."""
        return list(self.all_records[self.training])

    @property
    def all_records(self) -> Mapping[bool, list[Any]]:
        """The records of each mode."""
        return self.meta["octav"]["records"]

    @property
    def modes(self) -> tuple[bool, ...]:
        """The training modes that have a graph of their own, the present one first."""
        first, other = self.training, not self.training
        own = other in self._graphs and self._graphs[other] is not self._graphs[first]
        return (first, other) if own else (first,)

    def graph_of(self, mode: bool) -> fx.Graph:
        """The graph of a training mode. Raises OctavError if quantize() could not capture that mode."""
        if mode not in self._graphs:
            raise OctavError(f"{self.meta['octav']['missing']}; call octav_fx.quantize with inputs that fit both modes")
        return self._graphs[mode]

    def train(self, mode: bool = True) -> "QuantizedModule":
        """Set the mode of every module, and take the graph of that mode where it has its own."""
        graph = self.graph_of(mode)
        super().train(mode)
        if graph is not self.graph:
            self.graph = graph
        return self

    def float_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The float module's own forward, on the parameters and buffers of this one."""
        float_module = self._float_module
        float_module._modules.update({name: self._modules[name] for name in float_module._modules})
        float_module.training = self.training
        return float_module.forward(*args, **kwargs)

    @contextmanager
    def as_float(self) -> Iterator[None]:
        """Calls run float_forward inside."""
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
        """All that this module is made of, as values that copy and pickle."""
        float_module = copy.copy(self._float_module)
        float_module.__dict__ = {**vars(self._float_module)}
        float_module._modules = {name: module for name, module in self._modules.items() if name != QUANTIZERS}
        float_module.training = self.training
        for name in _HOOKS:
            float_module.__dict__[name] = getattr(self, name)
        flat = {mode: _flatten(self._graphs[mode]) for mode in self.modes}
        shared = [mode for mode in self._graphs if mode not in flat]
        return float_module, flat, shared, self.meta, self._modules[QUANTIZERS]

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _rebuild, self._parts()

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantizedModule":
        copied = _rebuild(*copy.deepcopy(self._parts(), memo))
        copied.examples = self.examples
        memo[id(self)] = copied
        return copied


def quantized_modules(q: nn.Module) -> list[QuantizedModule]:
    """The modules in q that quantize() returned, q itself included. Raises OctavError if there is none."""
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
    module._modules[QUANTIZERS] = quantizers
    return module


class _Ref(str):
    """The name of a node, in place of the node: fx nodes link to their neighbours, too deep for pickle."""

    __slots__ = ()


def _flatten(graph: fx.Graph) -> list[Any]:
    def refer(argument: Any) -> Any:
        return fx.node.map_arg(argument, lambda node: _Ref(node.name))

    keep = ("site",)
    return [
        (
            node.op,
            node.target,
            refer(node.args),
            refer(node.kwargs),
            node.name,
            {k: node.meta[k] for k in keep if k in node.meta},
        )
        for node in graph.nodes
    ]


def _unflatten(rows: list[Any]) -> fx.Graph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}

    def resolve(argument: Any) -> Any:
        return fx.node.map_aggregate(argument, lambda leaf: nodes[leaf] if isinstance(leaf, _Ref) else leaf)

    for op, target, args, kwargs, name, meta in rows:
        nodes[name] = graph.create_node(op, target, resolve(args), resolve(kwargs), name)
        nodes[name].meta.update(meta)
    return graph


class IntegerModule(fx.GraphModule):
    """A GraphModule that holds what its graph reads and no more, and that copies and pickles without being traced."""

    def __init__(self, root: nn.Module, graph: fx.Graph, name: str, meta: Mapping[str, Any]) -> None:
        super().__init__(root, graph, name)
        self.meta = dict(meta)
        self.training = False

    def _parts(self) -> tuple[Any, ...]:
        root = nn.Module()
        root._modules, root._parameters, root._buffers = self._modules, self._parameters, self._buffers
        root._non_persistent_buffers_set = self._non_persistent_buffers_set
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
    module._modules = root._modules
    return module
