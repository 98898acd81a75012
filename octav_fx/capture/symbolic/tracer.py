"""ValueTracer: fx.Tracer whose proxies have values, whose branches leave checks, and that sees through wrappers."""

import dataclasses
import enum
import functools
import inspect
import itertools
import operator
import os
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from octav_fx.capture.find_constants import functions_of
from octav_fx.capture.hooks import as_hooks_leave, needs_calls, set_aside
from octav_fx.capture.symbolic.attention import inlined_attention
from octav_fx.capture.symbolic.clocks import Moment
from octav_fx.capture.symbolic.guards import guard_equal
from octav_fx.capture.symbolic.identity import compares_dtypes, line_that_compares, may_be_its_input
from octav_fx.capture.symbolic.marks import Mark
from octav_fx.capture.symbolic.objects import (
    is_built_around_proxies,
    is_of_numpy,
    is_plain_dataclass,
    rebuild,
    template_of,
    with_items,
)
from octav_fx.capture.symbolic.patches import PLAIN
from octav_fx.capture.symbolic.proxies import PROXIES, UNKNOWN, ValueProxy, as_key, proxy_of_value, setitem_
from octav_fx.capture.symbolic.recurrent import is_recurrent, unrolled
from octav_fx.capture.symbolic.regions import apply_function
from octav_fx.capture.symbolic.signature import as_call, parameters_of, takes_by_keyword
from octav_fx.capture.symbolic.state_tensors import Place, StateTensors, holders_of_tensors, places_of_tensors
from octav_fx.capture.symbolic.values import Values
from octav_fx.capture.symbolic.without_gradient import without_gradient
from octav_fx.capture.user_stack import TORCH, caller, user_caller
from octav_fx.compat.modules import has_backward_hooks, has_forward_hooks
from octav_fx.compat.tensors import (
    FakeTensor,
    FakeTensorMode,
    pytree,
)
from octav_fx.errors import OctavError
from octav_fx.ir.meta import fake, set_fake, update
from octav_fx.ir.ops import UserRules, is_altered, op_of_module
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
    # Paths of plain numbers on modules that the graph is to read in each call.
    numbers: frozenset[str] = frozenset()
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
    # The function with a gradient of its own that is being evaluated.
    applied: str | None = None
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
        self.attribute_nodes: dict[Place, fx.Node] = {}
        # What stands for a tensor among the arguments, by the identity of its value: code may ask whether two are one.
        self.given: dict[int, ValueProxy] = {}
        # Tensors of modules that forward read before it set them, by module and name.
        self.read_first: set[tuple[nn.Module, str]] = set()
        # Attributes that it set before it read them, if it did.
        self.set_first: set[tuple[nn.Module, str]] = set()

    @functools.cached_property
    def compares_dtypes(self) -> bool:
        """Tell whether a function that forward may call asks by `is` for a dtype, which it may be given."""
        return any(map(compares_dtypes, functions_of(self.root)))

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        """Learn first where the tensors of the modules are; readers of a tied one read one node."""
        self.places = places_of_tensors(root)
        self.values = Values(root, self.arguments, self.fake_mode, self.state_tensors, holders_of_tensors(root))
        with self.state_tensors:
            graph = super().trace(root)
        self.is_traced = True
        return graph

    def proxy(self, node: fx.Node) -> ValueProxy:
        """Make a proxy that has a value."""
        return proxy_of_value(node, self)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Make a placeholder for each parameter of forward, and a Python value where it has no tensors."""
        parameters = parameters_of(root_fn)
        by_keyword = takes_by_keyword(root_fn, parameters)

        def call(root: nn.Module, *values: Any) -> Any:
            pairs = zip(parameters, values, strict=True)
            given = [self._further_keywords(v) if p.kind is p.VAR_KEYWORD else v for p, v in pairs]
            positional, keywords = as_call(parameters, given, by_keyword)
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
                is_leaf=isinstance(self.values.called(node), self.user.leaves),
                unknown_since=user_caller() if is_new else None,
            )
        return node

    def create_arg(self, a: Any) -> Any:
        """Find the tensors of modules by identity."""
        if type(a) in PROXIES:
            return self.latest_of(a.node)
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
            return inlined_attention(self, args, kwargs)
        if kind == "call_function" and target in self.rules:
            # Rules speak of positions.
            bound = inspect.signature(target).bind(*args, **kwargs) if inspect.isfunction(target) else None
            args, kwargs = (args, kwargs) if bound is None else (bound.args, bound.kwargs)
            proxy = super().create_proxy(kind, target, args, kwargs)
            update(proxy.node, op=self.rules[target])
            return proxy
        if kind == "call_function" and _is_user_function(target):
            return self._inline(target, args, kwargs)
        called = self.values.module(target) if kind == "call_module" else target
        if may_be_its_input(called) and (line := line_that_compares()) is not None:
            raise OctavError(f"{line}: forward asks whether two results are one tensor, which no graph knows")
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **named)
        return proxy if torch.is_grad_enabled() else without_gradient(self, proxy)

    def detached(self, proxy: Any) -> Any:
        """Call detach, whatever the gradient mode is."""
        return super().create_proxy("call_method", "detach", (proxy,), {})

    def latest_of(self, node: fx.Node) -> fx.Node:
        """Return what has the value of a node by now."""
        while node in self.latest:
            node = self.latest[node]
        return node

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

    def number(self, path: str) -> ValueProxy:
        """Return a proxy for a plain number on a module, which the graph reads from there in each call."""
        place = (path, ())
        if place not in self.attribute_nodes:
            self.attribute_nodes[place] = self.create_node("get_attr", path, (), {})
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
        is_known = m in (self.submodule_paths or ())
        if self.applied is not None and is_known and any(op_of_module(part) in CONTRACTIONS for part in m.modules()):
            raise OctavError(
                f"{user_caller()}: {self.applied} has a gradient of its own and calls {self.path_of_module(m)}, which "
                "a graph would not see"
            )
        if self.evaluating or not is_known:
            # A module made inside forward has no name to call it by; its forward is traced through.
            return forward(*args, **kwargs)
        if self._is_unrolled(m):
            return unrolled(m, *args, **kwargs)
        mark, path = Mark.of(self), self.path_of_module(m)
        # Rewritten to a function call, a layer runs the hooks around its forward, and none of its backward.
        if needs_calls(m) and (not self.is_leaf_module(m, path) or (has_backward_hooks(m) and self._is_rewritten(m))):
            return self._call_hooked(m, forward, args, kwargs)
        result = super().call_module(m, forward, args, kwargs)
        if _is_stateless(m) and mark.is_random(self):
            mark.go_back(self)
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
        mark = Mark.of(self)
        try:
            result = function(*args, **kwargs)
            if type(result) in PROXIES and not mark.is_random(self):
                return result
        except Exception:
            # It was wrapped for a reason, whatever that is. The call stays, and what it multiplies is a float row.
            pass
        mark.go_back(self)
        return super().create_proxy("call_function", function, args, kwargs)

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
        outer, self.evaluating = (self.evaluating, self.applied), True
        if node.target is apply_function and isinstance(kept := node.args[0], fx.Node):
            self.applied = fake(kept).function.__name__
        try:
            return self.values.of(node)
        except (RuntimeError, IndexError, ValueError) as error:
            # Other errors are those of types, which guards ask for.
            self.failed.append(f"{user_caller()}: {type(error).__name__}: {error}")
            raise
        finally:
            self.evaluating, self.applied = outer


def is_torch_leaf(m: nn.Module) -> bool:
    """Tell whether a module is torch's own, forward and all, and not made of others."""
    # That of generated code has no module.
    own = (type(m).forward.__module__ or "").startswith("torch.nn") and not isinstance(m, _TRANSPARENT)
    return own and not is_altered(m)


def _is_plain(value: Any) -> bool:
    return isinstance(value, (*PLAIN, range, enum.Enum)) or (type(value) is tuple and all(map(_is_plain, value)))


def _is_user_function(target: Any) -> bool:
    if not isinstance(target, types.FunctionType) or target in _OURS:
        return False
    return (target.__module__ or "torch").partition(".")[0] not in ("torch", "math", "operator", "builtins")


_OURS: Final = (guard_equal, setitem_, rebuild, with_items, apply_function, as_hooks_leave)


def _is_stateless(module: nn.Module) -> bool:
    return not any(True for held in (module.children(), module.parameters(), module.buffers()) for _ in held)
