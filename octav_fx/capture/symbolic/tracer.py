"""ValueTracer: fx.Tracer whose proxies have values, whose branches leave checks, and that sees through wrappers."""

import dataclasses
import enum
import inspect
import itertools
import operator
import os
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from octav_fx.capture.hooks import as_hooks_leave, needs_calls, set_aside
from octav_fx.capture.module_state import with_tags_of
from octav_fx.capture.symbolic.clocks import Moment
from octav_fx.capture.symbolic.guards import guard_equal
from octav_fx.capture.symbolic.identity import line_that_compares, may_be_its_input
from octav_fx.capture.symbolic.objects import (
    is_built_around_proxies,
    is_of_numpy,
    is_plain_dataclass,
    rebuild,
    template_of,
    with_items,
)
from octav_fx.capture.symbolic.patches import PLAIN, plain_settings
from octav_fx.capture.symbolic.proxies import PROXIES, UNKNOWN, TrainingFlag, ValueProxy, as_key, setitem_
from octav_fx.capture.symbolic.recurrent import is_recurrent, unrolled
from octav_fx.capture.symbolic.regions import apply_function
from octav_fx.capture.symbolic.remembered import Call
from octav_fx.capture.symbolic.stand_ins import STAND_INS, Evaluation
from octav_fx.capture.symbolic.state_tensors import Place, StateTensors, holders_of_tensors, places_of_tensors
from octav_fx.capture.user_stack import TORCH, caller, user_caller
from octav_fx.compat.graphs import ENTER_AUTOCAST, EXIT_AUTOCAST
from octav_fx.compat.modules import has_backward_hooks, has_forward_hooks
from octav_fx.compat.tensors import (
    NEEDS_DATA,
    FakeTensor,
    FakeTensorMode,
    is_dense,
    make_fake_of,
    pytree,
    storage_id,
    without_mode,
)
from octav_fx.errors import OctavError
from octav_fx.ir.dataflow import holds_tensor, is_value_source
from octav_fx.ir.meta import fake, info, set_fake, update
from octav_fx.ir.ops import UserRules, in_place, is_altered, op_of_module
from octav_fx.ir.table.contractions import CONTRACTIONS

# torch.nn modules are leaves: they are what rules speak of, and their checks on shapes are torch's own business.
# These are made of other modules, some of which multiply matrices, so they are traced into.
_TRANSPARENT: Final = (
    nn.Sequential,
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)


# Decides what is computed by what it is given.
_AUTOCAST: Final = TORCH + os.path.join("amp", "autocast_mode.py")
_DETECTS_CAUSAL: Final = TORCH + os.path.join("nn", "modules", "transformer.py")


@dataclass
class _Mark:
    """A place in the graph to go back to."""

    last: fx.Node
    branches: int
    failed: int


@dataclass(eq=False)
class ValueTracer(fx.Tracer):
    """One trace. What it overrides of fx.Tracer and why is said at each method."""

    # Example values by argument name.
    arguments: Mapping[str, Any]
    # Modes that Python code asked for, and what else the user has to know.
    branched_on: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    # Dicts that forward fills with what parameters and buffers alone decide: a graph computes that in each call.
    caches: set[tuple[nn.Module, str]] = field(default_factory=set)
    # Constants of the graph, by the names under which it reads them.
    made: dict[str, Any] = field(default_factory=dict)
    # Attributes that forward sets.
    stored: list[str] = field(default_factory=list)
    # Those of them that it read first, and sets to a tensor of another shape: a table for another length.
    resized: list[str] = field(default_factory=list)
    checked: set[tuple[fx.Node, str]] = field(default_factory=set)
    # What has the value of a node since forward wrote into it.
    latest: dict[fx.Node, fx.Node] = field(default_factory=dict)
    # Whether what a node computes would get a gradient.
    gradients: dict[fx.Node, bool] = field(default_factory=dict)
    # Errors of what was called, each with its file and line.
    failed: list[str] = field(default_factory=list)
    # What code recomputes a part of forward, or has hooks on what it saves for backward; what and where.
    around: dict[types.CodeType, str] = field(default_factory=dict)
    # Modules with hooks that have to run in each call.
    hooked: list[str] = field(default_factory=list)
    user: UserRules = field(default_factory=UserRules)
    evaluating: bool = False
    # Whether forward has returned.
    is_traced: bool = False
    # Read by fx: buffers become proxies, not constants.
    proxy_buffer_attributes = True

    def __post_init__(self) -> None:
        # Functions with a rule are calls in the graph, not what they do.
        self.rules = {rule.target: rule for rule in self.user.ops}
        super().__init__(autowrap_functions=tuple(f for f in self.rules if isinstance(f, types.FunctionType)))
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.state_tensors = StateTensors(self)
        self.places: dict[int, Place] = {}
        # What holds them, by name: forward may set it to something else before a node is made that reads it.
        self.first_values: dict[str, Any] = {}
        self.attribute_nodes: dict[Place, fx.Node] = {}
        # Modules that were called, by path, and fake tensors for their parameters and buffers, one for each kind.
        self.called: dict[str, nn.Module] = {}
        self.blanks: dict[Any, Tensor] = {}
        # Fake tensors for the memory of those that the graph reads; None for memory that the fake mode knows.
        self.memories: dict[int, Tensor | None] = {}
        # What stands for a tensor among the arguments, by the identity of its value: code may ask whether two are one.
        self.given: dict[int, ValueProxy] = {}
        # Tensors of modules that forward read before it set them, by module and name.
        self.read_first: set[tuple[nn.Module, str]] = set()

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        """Learn first where the tensors of the modules are; readers of a tied one read one node."""
        self.places, self.first_values = places_of_tensors(root), holders_of_tensors(root)
        with self.state_tensors:
            graph = super().trace(root)
        self.is_traced = True
        return graph

    def proxy(self, node: fx.Node) -> ValueProxy:
        """Make a proxy that has a value."""
        return ValueProxy(node, self)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Make a placeholder for each parameter of forward, and a Python value where it has no tensors."""
        # Decorators hide the parameters, and fx itself patches the code of the outermost, which has none of them.
        parameters = list(inspect.signature(inspect.unwrap(root_fn)).parameters.values())[1:]
        self._check_signature(parameters)
        takes_keywords = _has(inspect.signature(root_fn, follow_wrapped=False).parameters.values(), "VAR_KEYWORD")
        by_keyword = takes_keywords and not _has(parameters, "VAR_POSITIONAL")

        def call(root: nn.Module, *values: Any) -> Any:
            positional: list[Any] = []
            keywords: dict[str, Any] = {}
            for parameter, value in zip(parameters, values, strict=True):
                match parameter.kind.name:
                    case "VAR_POSITIONAL":
                        positional.extend(value)
                    case "VAR_KEYWORD":
                        keywords |= self._further_keywords(value)
                    case "POSITIONAL_ONLY":
                        positional.append(value)
                    case "POSITIONAL_OR_KEYWORD" if not by_keyword:
                        positional.append(value)
                    case _:
                        keywords[parameter.name] = value
            function = unrolled if self._is_unrolled(root) else root_fn
            return function(root, *positional, **keywords)

        return call, [self.root, *map(self._placeholder, parameters)]

    def _placeholder(self, parameter: inspect.Parameter) -> Any:
        stars = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}.get(parameter.kind.name, "")
        has_default = not stars and parameter.default is not parameter.empty
        if has_default and not all(
            isinstance(leaf, (*PLAIN, enum.Enum, types.FunctionType)) for leaf in pytree.tree_leaves(parameter.default)
        ):
            raise OctavError(f"the default of {parameter.name} holds more than plain values: make it None")
        default = (parameter.default,) if has_default else ()
        annotation = parameter.annotation
        # Written into the generated code, where only names of torch and of Python are sure to be found.
        is_known = isinstance(annotation, type) and annotation.__module__.partition(".")[0] in ("torch", "builtins")
        proxy = self.create_proxy(
            "placeholder",
            stars + parameter.name,
            default,
            {},
            type_expr=annotation if is_known and annotation is not parameter.empty else None,
        )
        return proxy if stars else self.given_once(self._concrete(proxy))

    def given_once(self, given: Any) -> Any:
        """Return what stands for an argument, or for a part of one: for the same tensor the same."""
        is_tensor = type(given) in PROXIES and isinstance(given.value, Tensor)
        return self.given.setdefault(id(given.value), given) if is_tensor else given

    def _further_keywords(self, collected: Any) -> dict[str, Any]:
        """Return what **kwargs held in the example call: a guard of all arguments speaks of the same keywords later."""
        return {key: self.given_once(self._concrete(collected[key])) for key in collected.value}

    @staticmethod
    def _check_signature(parameters: list[inspect.Parameter]) -> None:
        """Refuse keyword-only parameters behind *args: fx writes them before it, where positional ones would land."""
        collected = [p.name for p in parameters if p.kind is p.VAR_POSITIONAL]
        keyword_only = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        if collected and keyword_only:
            raise OctavError(
                f"forward(*{collected[0]}, {keyword_only[0]}=...) cannot be captured: keyword-only parameters after "
                f"*{collected[0]}: take {keyword_only[0]} out, or give it a default before *{collected[0]}"
            )

    @staticmethod
    def _concrete(given: Any) -> Any:
        """Return the Python value of an argument without tensors, since code branches on it, on None above all."""
        return given.value if type(given) in PROXIES and _is_plain(given.value) else given

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None
    ) -> fx.Node:
        """Make a node, with what it computes for the example inputs."""
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        if kind != "output":
            value, macs = self._evaluate(node)
            set_fake(node, value)
            is_new = value is UNKNOWN and not any(fake(source) is UNKNOWN for source in node.all_input_nodes)
            update(
                node,
                macs=macs,
                is_leaf=isinstance(self._called(node), self.user.leaves),
                unknown_since=user_caller() if is_new else None,
            )
        return node

    def create_arg(self, a: Any) -> Any:
        """Find the tensors of modules by identity."""
        if type(a) in PROXIES:
            return self._latest(a.node)
        if type(a) is dict:
            return super().create_arg({as_key(key): value for key, value in a.items()})
        if type(a) is OrderedDict:
            # fx would make a plain dict of it.
            pairs = [(key, self.create_arg(value)) for key, value in a.items()]
            return self.create_node("call_function", OrderedDict, (pairs,), {})
        if self.is_state(a):
            return self.proxy_of(a).node
        if is_built_around_proxies(a):
            return self._made_again(a) if is_plain_dataclass(a) else self._rebuilt(a)
        if type(a) is Moment:
            raise OctavError(f"{user_caller()}: forward computes with the clock, which is another one in each call")
        if is_of_numpy(a, "generic"):
            a = a.item()
        if isinstance(a, FakeTensor) and a.fake_mode is self.fake_mode:
            raise OctavError(f"{user_caller()}: forward computes with what a hook of a layer has kept of its call")
        if isinstance(a, torch.Generator):
            raise OctavError(f"{user_caller()}: forward draws from a torch.Generator, which a graph does not hold")
        if isinstance(a, torch.device) and "device" in self.arguments:
            # In generated code the name of the argument hides that of the class.
            return self.create_node("call_function", torch.device, (str(a),), {})
        if is_of_numpy(a, "ndarray"):
            return self.constant(a).node
        return super().create_arg(a)

    def _made_again(self, a: Any) -> fx.Node:
        """Make a dataclass by its fields in each call: what Dynamo follows best, and what a reader expects."""
        fields = {f.name: self.create_arg(getattr(a, f.name)) for f in dataclasses.fields(a) if f.init}
        return self.create_node("call_function", type(a), (), fields)

    def constant(self, value: Any) -> ValueProxy:
        """Keep an object that graphs cannot hold as an attribute of root, and return its proxy."""
        # Not by getattr and setattr, which stand for what forward reads and writes.
        held = vars(self.root)
        name = next(f"octav_object_{i}" for i in itertools.count() if f"octav_object_{i}" not in held)
        held[name] = value
        return self.proxy(self.create_node("get_attr", name, (), {}))

    def _rebuilt(self, a: Any) -> fx.Node:
        """Copy an object with tensors in it (a cache) anew in each call of the graph."""
        skeleton, proxies = template_of(a)
        nodes = [proxy.node for proxy in proxies]
        built = self.create_node("call_function", rebuild, (self.constant(skeleton).node, nodes), {})
        if not isinstance(a, dict):
            return built
        return self.create_node("call_function", with_items, (built, self.create_arg(dict(a))), {})

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> Any:
        """Trace through calls of wrapped functions."""
        if kind == "call_function" and target is F.multi_head_attention_forward:
            return self._inline_attention(args, kwargs)
        if kind == "call_function" and target in self.rules:
            # Rules speak of positions.
            bound = inspect.signature(target).bind(*args, **kwargs) if inspect.isfunction(target) else None
            args, kwargs = (args, kwargs) if bound is None else (bound.args, bound.kwargs)
            proxy = super().create_proxy(kind, target, args, kwargs)
            update(proxy.node, op=self.rules[target])
            return proxy
        if kind == "call_function" and _is_user_function(target):
            return self._inline(target, args, kwargs)
        called = self._module(target) if kind == "call_module" else target
        if may_be_its_input(called) and (line := line_that_compares()) is not None:
            raise OctavError(f"{line}: forward asks whether two results are one tensor, which no graph knows")
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **named)
        return proxy if torch.is_grad_enabled() else self._without_gradient(proxy)

    def _without_gradient(self, proxy: Any) -> Any:
        """Detach what is computed under no_grad: a graph has no modes."""
        node, value = proxy.node, proxy.value
        if isinstance(value, tuple) and holds_tensor(node) and self._has_gradient(node):
            proxy.count_pieces()
            items = [proxy[i] for i in range(len(value))]
            is_named = hasattr(value, "_fields")
            return type(value)(*items) if is_named else type(value)(items)
        if not (isinstance(value, Tensor) and value.is_floating_point() and self._has_gradient(node)):
            return proxy
        if self._writes(node):
            return self._written_past_autograd(proxy)
        return super().create_proxy("call_method", "detach", (proxy,), {})

    def _latest(self, node: fx.Node) -> fx.Node:
        while node in self.latest:
            node = self.latest[node]
        return node

    def write(self, in_place: Any, apart: Any, target: ValueProxy, other: Any) -> Any:
        """Compute target (op)= other: apart from its memory where every name of that memory can read the result."""
        names = self._names_of_memory(self._latest(target.node))
        if torch.is_grad_enabled() and names is not None:
            result = apart(target, other)
            if (result.value.dtype, result.value.shape) == (target.value.dtype, target.value.shape):
                self.latest.update(dict.fromkeys(names, result.node))
                return target
            self.graph.erase_node(result.node)
        result = self.create_proxy("call_function", in_place, (target, other), {})
        return result if torch.is_grad_enabled() else target

    def _names_of_memory(self, node: fx.Node) -> list[fx.Node] | None:
        """Return the nodes of the same memory; None where one is a part or another view of it, or is not the graph's.

        Whoever holds one of them, by whatever name, can then be given another node in its place.
        """
        value = fake(node)
        storage, found = storage_id(value), []
        for n in self.graph.nodes:
            leaves = [leaf for leaf in pytree.tree_leaves(fake(n)) if isinstance(leaf, Tensor)]
            shared = [leaf for leaf in leaves if storage_id(leaf) == storage]
            if not shared or n in self.latest:
                continue
            alike = fake(n) is shared[0] and (shared[0].shape, shared[0].stride()) == (value.shape, value.stride())
            if not alike or n.op in ("placeholder", "get_attr"):
                return None
            found.append(n)
        return found

    def is_same_memory(self, node: fx.Node, tensor: Tensor | None) -> bool:
        """Tell whether a node is a tensor of a module, or is all of its memory."""
        place, value = self.places.get(id(tensor)), fake(node)
        if place is None or place not in self.attribute_nodes or not isinstance(value, Tensor):
            return False
        own = fake(self.attribute_nodes[place])
        return bool(own.shape == value.shape and storage_id(own) == storage_id(value))

    def set_data(self, target: ValueProxy, value: Any) -> None:
        """Write a value into target.data, which was assigned to it."""
        own, new = target.value, value.value if type(value) in PROXIES else value
        are_tensors = isinstance(own, Tensor) and isinstance(new, Tensor)
        if not are_tensors or (own.shape, own.dtype) != (new.shape, new.dtype):
            raise OctavError(f"{user_caller()}: forward sets data of a tensor to another kind of value")
        if type(value) not in PROXIES or storage_id(own) != storage_id(new):
            target.data.copy_(value)

    def _written_past_autograd(self, proxy: Any) -> Any:
        """Let a write under no_grad take part in no gradient; that it happened is counted, and backward sees that."""
        node = proxy.node
        target = node.args[0] if node.args else None
        for source in [source for source in node.all_input_nodes if self._has_gradient(source)]:
            with self.graph.inserting_before(node):
                past = super().create_proxy("call_method", "detach", (self.proxy(source),), {})
            node.replace_input_with(source, past.node)
        self.gradients.pop(node, None)
        return self.proxy(target) if isinstance(target, fx.Node) and fake(target) is fake(node) else proxy

    def _has_gradient(self, node: fx.Node) -> bool:
        if node not in self.gradients:
            is_cut = not holds_tensor(node) or (node.op == "call_method" and node.target == "detach")
            self.gradients[node] = not is_cut and (
                is_value_source(node, self.root) or any(map(self._has_gradient, node.all_input_nodes))
            )
        return self.gradients[node]

    def _writes(self, node: fx.Node) -> bool:
        called = self._called(node)
        return in_place(node) if called is None else bool(getattr(called, "inplace", False))

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Make a get_attr node of self.weight in forward, and of a buffer, which plain fx bakes into its readers."""
        return self.proxy_of(attr_val) if not self.evaluating and self.is_state(attr_val) else attr_val

    def is_state(self, value: Any) -> bool:
        """Tell whether a value is a tensor that the modules have held since before the trace."""
        return isinstance(value, Tensor) and id(value) in self.places

    def proxy_of(self, tensor: Tensor) -> ValueProxy:
        """Return a proxy for a tensor of a module, which the graph reads from there in each call."""
        place = name, keys = self.places[id(tensor)]
        if place not in self.attribute_nodes:
            node = self.create_node("get_attr", name, (), {})
            for key in keys:
                node = self.create_node("call_function", operator.getitem, (node, key), {})
            self.attribute_nodes[place] = node
        return self.proxy(self.attribute_nodes[place])

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Tell whether a module is torch's, or a subclass that keeps its forward."""
        if isinstance(m, torch.jit.ScriptModule):
            raise OctavError(
                f"{module_qualified_name} is a scripted module, without Python code to trace: use the original"
            )
        return isinstance(m, self.user.leaves) or is_torch_leaf(m)

    def _is_rewritten(self, m: nn.Module) -> bool:
        return op_of_module(m) in CONTRACTIONS and not isinstance(m, self.user.leaves)

    def _is_unrolled(self, m: nn.Module) -> bool:
        return self.user.unrolls and is_recurrent(m) and not has_forward_hooks(m)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a module; stochastic depth stays a call, since traced through it would be on or off for good."""
        if self.evaluating or m not in (self.submodule_paths or ()):
            # A module made inside forward has no name to call it by; its forward is traced through.
            return forward(*args, **kwargs)
        if self._is_unrolled(m):
            return unrolled(m, *args, **kwargs)
        mark, path = self._mark(), self.path_of_module(m)
        # Rewritten to a function call, a layer runs the hooks around its forward, and none of its backward.
        if needs_calls(m) and (not self.is_leaf_module(m, path) or (has_backward_hooks(m) and self._is_rewritten(m))):
            return self._call_hooked(m, forward, args, kwargs)
        result = super().call_module(m, forward, args, kwargs)
        if _is_stateless(m) and self._is_random(mark):
            self._go_back(mark)
            return super().create_proxy("call_module", path, args, kwargs)
        return result

    def _call_hooked(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Trace through a module past its hooks, which have to run in each call: this graph is not to."""
        self.hooked.append(self.path_of_module(m))
        may_change = has_forward_hooks(m)

        def left(value: Any) -> Any:
            is_changed = may_change and type(value) in PROXIES and isinstance(value.value, Tensor)
            return self.create_proxy("call_function", as_hooks_leave, (value,), {}) if is_changed else value

        args, kwargs = pytree.tree_map(left, (args, kwargs))
        with set_aside(m):
            return pytree.tree_map(left, super().call_module(m, forward, args, kwargs))

    def _inline(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Trace through a function that its author hid with fx.wrap; keep the call where that is not possible."""
        mark = self._mark()
        try:
            result = function(*args, **kwargs)
            if type(result) in PROXIES and not self._is_random(mark):
                return result
        except Exception:
            # It was wrapped for a reason, whatever that is. The call stays, and what it multiplies is a float row.
            pass
        self._go_back(mark)
        return super().create_proxy("call_function", function, args, kwargs)

    def _inline_attention(self, args: Any, kwargs: Any) -> Any:
        """Run torch's own Python code of multi_head_attention_forward on proxies, past its dispatch to them."""
        source = F.multi_head_attention_forward
        names = {**vars(F), "has_torch_function": lambda operands: False}
        inner = types.FunctionType(source.__code__, names, source.__name__, source.__defaults__)
        bound = inspect.signature(source).bind(*args, **kwargs)
        bound.apply_defaults()
        if bound.arguments["dropout_p"] == 0:
            bound.arguments["training"] = False
        elif isinstance(flag := bound.arguments["training"], TrainingFlag):
            self.branched_on.append(flag.target)
            bound.arguments["training"] = flag.value
        return inner(*bound.args, **bound.kwargs)

    def _mark(self) -> _Mark:
        return _Mark(next(iter(reversed(self.graph.nodes))), len(self.branched_on), len(self.failed))

    def _is_random(self, mark: _Mark) -> bool:
        """Tell whether what was traced since then is a switch of training (stochastic depth) and multiplies nothing."""
        return len(self.branched_on) > mark.branches and not any(info(node).macs for node in self._since(mark))

    def _since(self, mark: _Mark) -> list[fx.Node]:
        nodes = []
        node = mark.last.next
        while node.op != "root":
            nodes.append(node)
            node = node.next
        return nodes

    def _go_back(self, mark: _Mark) -> None:
        nodes = self._since(mark)
        for node in reversed(nodes):
            self.graph.erase_node(node)
        self.attribute_nodes = {place: node for place, node in self.attribute_nodes.items() if node not in set(nodes)}
        self.latest = {node: new for node, new in self.latest.items() if new not in nodes}
        del self.failed[mark.failed :]
        self.checked = {(node, expected) for node, expected in self.checked if node not in nodes}
        del self.branched_on[mark.branches :]

    def decide(self, proxy: ValueProxy, kind: type) -> Any:
        """Return the Python value of a proxy, and remember it as a fact of this graph."""
        value, where = proxy.value, caller()
        if kind is bool and isinstance(value, Tensor) and where.startswith(_DETECTS_CAUSAL):
            # nn.Transformer looks whether a mask happens to be causal, to leave it out. Not known is right, too.
            return False
        if value is UNKNOWN or isinstance(value, Tensor):
            raise OctavError(
                f"{user_caller()}: forward needs {kind.__name__}({proxy.node.name}), which depends on the data in a "
                "tensor; a graph cannot follow that. Compute it outside of forward, or quantize the modules around it"
            )
        if kind is not bool or not where.startswith(TORCH) or where.startswith(_AUTOCAST):
            # torch's own code branches to validate arguments or to choose a fast path: both stay right without a check.
            if isinstance(value, kind):
                self._check(proxy.node, value, where)
            else:
                self._check(self.create_node("call_function", kind, (proxy.node,), {}), kind(value), where)
        return value

    def count(self, pieces: ValueProxy) -> None:
        """Guard the number of pieces of a tensor that Python goes through."""
        self._check(self.create_node("call_function", len, (pieces.node,), {}), len(pieces.value), caller())

    def _check(self, node: fx.Node, expected: Any, where: str) -> None:
        if (key := (node, repr(expected))) not in self.checked:
            self.checked.add(key)
            self.create_node("call_function", guard_equal, (node, self.create_arg(expected), where), {})

    def _evaluate(self, node: fx.Node) -> tuple[Any, int]:
        """Return what a node computes on fake tensors, and the multiply-accumulates it takes."""
        outer, self.evaluating = self.evaluating, True
        try:
            return self._evaluate_inside(node)
        except (RuntimeError, IndexError, ValueError) as error:
            # Other errors are those of types, which guards ask for.
            self.failed.append(f"{user_caller()}: {type(error).__name__}: {error}")
            raise
        finally:
            self.evaluating = outer

    def _evaluate_inside(self, node: fx.Node) -> tuple[Any, int]:
        if node.op == "placeholder":
            value = self.arguments[str(node.target).lstrip("*")]
            return pytree.tree_map_only(Tensor, lambda t: with_tags_of(t, self.fake_mode.from_tensor(t)), value), 0
        if node.op == "get_attr":
            value = self.first_values.get(str(node.target), self.root)
            for atom in () if value is not self.root else str(node.target).split("."):
                value = getattr(value, atom)
            value = value.value if isinstance(value, TrainingFlag) else value
            return (self._fake(value) if isinstance(value, Tensor) else value), 0
        args, kwargs = _mutable(fx.node.map_arg((node.args, node.kwargs), fake))
        leaves = pytree.tree_leaves((args, kwargs))
        if any(value is UNKNOWN for value in leaves):
            return UNKNOWN, 0
        if node.target is getattr or (_is_pythons(node.target) and not any(isinstance(v, Tensor) for v in leaves)):
            # Arithmetic on sizes, of which there is much, is spared what follows.
            return self._call(node, args, kwargs), 0
        try:
            with (
                # It does nothing while values are computed, and takes its time.
                without_mode(self.state_tensors),
                plain_settings(layer := self._called(node)),
                torch.no_grad(),
            ):
                call = Call(node, layer, args, kwargs)
                if (known := call.known(self.fake_mode)) is not None:
                    return known
                with self.fake_mode, Evaluation() as counter:
                    value = self._call(node, args, kwargs)
                call.remember(value, counter.macs, self.blanks.values())
            return value, counter.macs
        except NEEDS_DATA:
            return UNKNOWN, 0

    def _called(self, node: fx.Node) -> nn.Module | None:
        if node.op != "call_module":
            return None
        return self._module(str(node.target))

    def _module(self, path: str) -> nn.Module:
        if path not in self.called:
            self.called[path] = self.root.get_submodule(path)
        return self.called[path]

    def _call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        match node.op:
            case "call_function":
                assert callable(node.target)
                return (
                    None if node.target in _NOT_EVALUATED else STAND_INS.get(node.target, node.target)(*args, **kwargs)
                )
            case "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            case _:
                module = self._module(str(node.target))
                # With fake state: FakeTensorMode would count num_batches_tracked up for real.
                state = itertools.chain(module.named_parameters(), module.named_buffers())
                blank = {name: self._blank(tensor) for name, tensor in state}
                return torch.func.functional_call(module, blank, args, kwargs)

    def _fake(self, tensor: Tensor) -> Tensor:
        """Return a fake tensor for one of a module; those that share memory do so, too."""
        # Its own mode does nothing here, and takes its time.
        with without_mode(self.state_tensors):
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
                return self.fake_mode.from_tensor(tensor)
            memory = storage_id(tensor)
            if memory not in self.memories and is_dense(tensor):
                self.memories[memory] = made = make_fake_of(self.fake_mode, tensor)
                return made
            known = self.memories.setdefault(memory, None)
            return self.fake_mode.from_tensor(tensor) if known is None else make_fake_of(self.fake_mode, tensor, known)

    def _blank(self, tensor: Tensor) -> Tensor:
        """Return a fake tensor for one of a leaf module; all of one shape are the same, as making them takes long."""
        is_plain = tensor.layout is torch.strided and type(tensor) in (Tensor, nn.Parameter)
        key = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device) if is_plain else id(tensor)
        if key not in self.blanks:
            own = make_fake_of if is_dense(tensor) else FakeTensorMode.from_tensor
            self.blanks[key] = own(self.fake_mode, tensor)
        return self.blanks[key]


def is_torch_leaf(m: nn.Module) -> bool:
    """Tell whether a module is torch's own, forward and all, and not made of others."""
    # That of generated code has no module.
    own = (type(m).forward.__module__ or "").startswith("torch.nn") and not isinstance(m, _TRANSPARENT)
    return own and not is_altered(m)


# A check holds by construction, and regions have been entered by the code that is traced.
_NOT_EVALUATED: Final = (guard_equal, ENTER_AUTOCAST, EXIT_AUTOCAST)


def _is_pythons(target: Any) -> bool:
    return getattr(target, "__module__", None) in ("_operator", "builtins", "math")


def _mutable(argument: Any) -> Any:
    """Return arguments of a node with lists and dicts that a function may write into; those of fx are immutable."""
    if isinstance(argument, list):
        return [_mutable(item) for item in argument]
    if isinstance(argument, dict):
        return {key: _mutable(item) for key, item in argument.items()}
    return tuple(map(_mutable, argument)) if type(argument) is tuple else argument


def _is_plain(value: Any) -> bool:
    return isinstance(value, (*PLAIN, range, enum.Enum)) or (type(value) is tuple and all(map(_is_plain, value)))


def _is_user_function(target: Any) -> bool:
    if not isinstance(target, types.FunctionType) or target in _OURS:
        return False
    return (target.__module__ or "torch").partition(".")[0] not in ("torch", "math", "operator", "builtins")


_OURS: Final = (guard_equal, setitem_, rebuild, with_items, apply_function, as_hooks_leave)


def _has(parameters: Iterable[inspect.Parameter], kind: str) -> bool:
    return any(parameter.kind.name == kind for parameter in parameters)


def _is_stateless(module: nn.Module) -> bool:
    return not any(True for held in (module.children(), module.parameters(), module.buffers()) for _ in held)
