"""QuantizedModule: the user's module tree, seen through a rewritten graph."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from octav_fx.capture.inputs import Inputs, tensors_of
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
    """

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
        self._modules[QUANTIZERS] = nn.Module()
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
        return self

    def float_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the float module's own forward, on the parameters and buffers of this one."""
        float_module = self._float_module
        children_of(float_module).update({name: self._modules[name] for name in children_of(float_module)})
        float_module.training = self.training
        return float_module.forward(*args, **kwargs)

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

    def __init__(
        self, root: nn.Module, graph: fx.Graph, name: str, meta: Mapping[str, Any], attributes: Mapping[str, Any]
    ) -> None:
        super().__init__(root, graph, name)
        self.meta = dict(meta)
        self.training = False
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

    def _parts(self) -> tuple[Any, ...]:
        root = nn.Module()
        share_parts(self, root)
        return root, _flatten(self.graph), type(self).__name__, self.meta, self.__dict__["octav_attributes"]

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
    root: nn.Module, rows: list[Any], name: str, meta: dict[str, Any], attributes: dict[str, Any]
) -> IntegerModule:
    module = IntegerModule(root, _unflatten(rows), name, meta, attributes)
    # A graph that reads one tensor of a module is no reason to lose the others.
    replace_children(module, children_of(root))
    return module
