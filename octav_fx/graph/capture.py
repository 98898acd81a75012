"""Capture by symbolic tracing with values: each proxy knows what the example inputs make of it.

Values are fake tensors (shapes and dtypes, no data), so sizes stay symbolic in the graph, while a branch on a size
takes the side that the example inputs take and leaves a check behind. That traces what plain fx.Tracer cannot:
attention with shape checks, loops over a list of features, functions hidden behind fx.wrap.
"""

import contextlib
import inspect
import itertools
import logging
import operator
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from octav_fx.errors import OctavError
from octav_fx.graph.macs import MacCounter
from octav_fx.graph.specialize import check_captured

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
# What these make belongs to one call of forward: made at capture, it would keep what was drawn or written then.
_FACTORIES: Final = (
    *("arange", "empty", "eye", "full", "linspace", "logspace", "ones", "zeros", "tril_indices", "triu_indices"),
    *("rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "tensor", "as_tensor"),
)
# These want the number itself, or a dtype, and refuse a proxy for it.
_OF_PROXY: Final = ("finfo", "iinfo")
# Facts about a tensor that no input of the same kind changes.
_STATIC_ATTRIBUTES: Final = frozenset(
    {"ndim", "layout", "requires_grad", "is_nested", "is_sparse", "is_cuda", "is_meta"}
)
_TORCH: Final = str(Path(torch.__file__).parent) + os.sep
_HERE: Final = str(Path(__file__).parent.parent) + os.sep
_PLAIN: Final = (type(None), bool, int, float, str, torch.dtype, torch.device)
_LITERAL: Final = (*_PLAIN, complex, torch.layout, torch.memory_format, torch.Generator)


class _Unknown:
    """The value of what cannot be known without data, such as the result of item()."""

    def __repr__(self) -> str:
        return "a value that depends on data"


UNKNOWN: Final = _Unknown()


@dataclass(frozen=True, slots=True)
class Capture:
    """A traced graph. Its nodes carry meta["value"] (fake) and meta["macs"]."""

    graph: fx.Graph
    # Modules whose Python code branches on self.training: the graph holds for one mode only.
    depends_on_training: tuple[str, ...]
    # What the user has to know about this capture.
    notes: tuple[str, ...]


def capture(root: nn.Module, arguments: Mapping[str, Any]) -> Capture:
    """Trace root.forward for these arguments by name; root is in the mode to be captured.

    Tensor constants that forward makes on the way become non-persistent buffers of root. Raises OctavError with the
    user's file and line where the Python code needs data to go on.
    """
    tracer = _Tracer(arguments)
    modes = {module: module.training for module in root.modules()}
    before = set(root.__dict__)
    try:
        for name, module in root.named_modules():
            # A plain attribute to nn.Module as well; only the tracer sees a flag instead of a bool.
            module.__dict__["training"] = _TrainingFlag(tracer, f"{name}.training".lstrip("."), module.training)
        with _symbolic_torch(tracer), _symbolic_isinstance(root), _quiet():
            graph = tracer.trace(root)
    except OctavError:
        raise
    except Exception as error:
        raise OctavError(f"capture stopped at {_user_line(error)}: {type(error).__name__}: {error}") from error
    finally:
        for module, training in modes.items():
            module.__dict__["training"] = training
    for name in set(root.__dict__) - before:
        if isinstance(constant := root.__dict__[name], Tensor):
            delattr(root, name)
            root.register_buffer(name, constant, persistent=False)
    _remove_unused(graph)
    for node in graph.nodes:
        # fx.wrap marks what its wrapper returned, which after inlining is any node; generated code would wrap that.
        node.meta.pop("is_wrapped", None)
    return Capture(graph, tuple(dict.fromkeys(tracer.branched_on)), tuple(tracer.notes))


class _ValueProxy(fx.Proxy):
    """A proxy that answers what Python asks of a value: truth, length, iteration, index."""

    tracer: "_Tracer"

    @property
    def value(self) -> Any:
        return self.node.meta["value"]

    def __getattr__(self, name: str) -> Any:
        value = self.value
        if isinstance(value, Mapping):
            match name:
                case "keys":
                    return lambda: list(value)
                case "values":
                    return lambda: [self[key] for key in value]
                case "items":
                    return lambda: [(key, self[key]) for key in value]
        if isinstance(value, Tensor) and name in _STATIC_ATTRIBUTES:
            return getattr(value, name)
        if value is not UNKNOWN and not hasattr(value, name):
            raise AttributeError(f"{type(value).__name__!r} object has no attribute {name!r}")
        return _AttributeProxy(self, name)

    def __getitem__(self, index: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.getitem, (self, index), {})

    def __bool__(self) -> bool:
        return bool(self.tracer.decide(self, bool))

    def __index__(self) -> int:
        return int(self.tracer.decide(self, int))

    __int__ = __index__

    def __float__(self) -> float:
        return float(self.tracer.decide(self, float))

    def __len__(self) -> int:
        return int(self.tracer.create_proxy("call_function", len, (self,), {}))

    def __iter__(self) -> Iterator[Any]:
        value = self.value
        if isinstance(value, Mapping):
            return iter(list(value))
        if isinstance(value, (tuple, list)):
            return (self[i] for i in range(len(value)))
        if isinstance(value, Tensor):
            return (self[i] for i in range(len(self)))
        return super().__iter__()

    def __round__(self, *digits: Any) -> Any:
        return self.tracer.create_proxy("call_function", round, (self, *digits), {})

    def __divmod__(self, divisor: Any) -> Any:
        return self.tracer.create_proxy("call_function", divmod, (self, divisor), {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.clone() if isinstance(self.value, Tensor) else self

    def __contains__(self, item: Any) -> bool:
        return item in self.value if isinstance(self.value, Mapping) else any(item is x or item == x for x in self)

    def __setitem__(self, index: Any, item: Any) -> None:
        self.tracer.create_proxy("call_function", _setitem, (self, index, item), {})

    # fx.Proxy defines __eq__; a proxy is still hashed by identity.
    __hash__ = object.__hash__


class _AttributeProxy(_ValueProxy):
    """x.attribute: a method call if it is called, else a getattr node made on first use."""

    def __init__(self, owner: _ValueProxy, name: str) -> None:
        self.__dict__.update(tracer=owner.tracer, owner=owner, name=name, made=None)

    @property
    def node(self) -> fx.Node:  # type: ignore[override]  # made on first use
        if self.__dict__["made"] is None:
            made = self.tracer.create_proxy(
                "call_function", getattr, (self.__dict__["owner"], self.__dict__["name"]), {}
            )
            self.__dict__["made"] = made.node
        return self.__dict__["made"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tracer.create_proxy("call_method", self.__dict__["name"], (self.__dict__["owner"], *args), kwargs)


_PROXIES: Final = (_ValueProxy, _AttributeProxy)


def _setitem(target: Any, index: Any, item: Any) -> Any:
    """target[index] = item, as a call that returns target: later readers of the target follow it in the graph."""
    target[index] = item
    return target


fx.node.has_side_effect(_setitem)


class _TrainingFlag:
    """Stands for module.training while tracing: an operation that takes it gets a node that reads it at run time."""

    def __init__(self, tracer: "_Tracer", target: str, value: bool) -> None:
        self.tracer, self.target, self.value = tracer, target, value

    def __fx_create_arg__(self, tracer: "_Tracer") -> fx.Node:
        return tracer.create_node("get_attr", self.target, (), {})

    def __bool__(self) -> bool:
        if _caller().startswith(_TORCH):
            # torch's own modules ask only to choose an inference fast path, which hides the operands.
            return True
        self.tracer.branched_on.append(self.target)
        return self.value


@dataclass
class _Mark:
    """A place in the graph to go back to."""

    last: fx.Node
    branches: int


@dataclass(eq=False)
class _Tracer(fx.Tracer):
    arguments: Mapping[str, Any]
    branched_on: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checked: set[tuple[fx.Node, Any]] = field(default_factory=set)
    evaluating: bool = False
    proxy_buffer_attributes = True

    def __post_init__(self) -> None:
        super().__init__()
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.attributes: dict[int, str] = {}
        self.attribute_nodes: dict[str, fx.Node] = {}

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        # The first name of a tied tensor is its name: readers of either read one node.
        named = [*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)]
        for name, tensor in reversed(named):
            self.attributes[id(tensor)] = name
        return super().trace(root)

    def proxy(self, node: fx.Node) -> _ValueProxy:
        return _ValueProxy(node, self)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        root_fn, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        return root_fn, [self._concrete(arg) if isinstance(arg, _ValueProxy) else arg for arg in args]

    def _concrete(self, proxy: _ValueProxy) -> Any:
        """A placeholder without tensors in it is a Python value that code branches on, None above all."""
        value = proxy.value
        if not isinstance(value, _PLAIN):
            return proxy
        self._check(proxy.node, value, f"argument {proxy.node.target}")
        return value

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None
    ) -> fx.Node:
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        if kind != "output":
            node.meta["value"], node.meta["macs"] = self._evaluate(node)
        return node

    def create_arg(self, a: Any) -> Any:
        if type(a) in _PROXIES:
            return a.node
        if isinstance(a, Tensor) and id(a) in self.attributes:
            return self._attribute(self.attributes[id(a)]).node
        return super().create_arg(a)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> Any:
        if kind == "call_function" and target is F.multi_head_attention_forward:
            return self._inline_attention(args, kwargs)
        if kind == "call_function" and _is_user_function(target):
            return self._inline(target, args, kwargs)
        return super().create_proxy(kind, target, args, kwargs, *rest, **named)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if not self.evaluating and isinstance(attr_val, Tensor) and id(attr_val) in self.attributes:
            return self._attribute(self.attributes[id(attr_val)])
        return attr_val

    def _attribute(self, name: str) -> _ValueProxy:
        if name not in self.attribute_nodes:
            self.attribute_nodes[name] = self.create_node("get_attr", name, (), {})
        return self.proxy(self.attribute_nodes[name])

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, torch.jit.ScriptModule):
            return True
        return type(m).forward.__module__.startswith("torch.nn") and not isinstance(m, _TRANSPARENT)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.evaluating or m not in (self.submodule_paths or ()):
            # A module made inside forward has no name to call it by; its forward is traced through.
            return forward(*args, **kwargs)
        mark, path = self._mark(), self.path_of_module(m)
        if (m._forward_hooks or m._forward_pre_hooks) and not self.is_leaf_module(m, path):
            self.notes.append(f"{path}: hooks were traced once; what they do besides computing tensors is not repeated")
        result = super().call_module(m, forward, args, kwargs)
        if _is_stateless(m) and self._is_random(mark):
            self._go_back(mark)
            return super().create_proxy("call_module", path, args, kwargs)
        return result

    def _inline(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Trace through a function that its author hid with fx.wrap; keep the call where that is not possible."""
        mark = self._mark()
        try:
            result = function(*args, **kwargs)
            if type(result) in _PROXIES and not self._is_random(mark):
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
        elif isinstance(flag := bound.arguments["training"], _TrainingFlag):
            self.branched_on.append(flag.target)
            bound.arguments["training"] = flag.value
        return inner(*bound.args, **bound.kwargs)

    def _mark(self) -> _Mark:
        return _Mark(next(iter(reversed(self.graph.nodes))), len(self.branched_on))

    def _is_random(self, mark: _Mark) -> bool:
        """Whether what was traced since then is an on/off of training (stochastic depth) and multiplies nothing."""
        return len(self.branched_on) > mark.branches and not any(node.meta["macs"] for node in self._since(mark))

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
        self.attribute_nodes = {name: node for name, node in self.attribute_nodes.items() if node not in set(nodes)}
        self.checked = {(node, expected) for node, expected in self.checked if node not in set(nodes)}
        del self.branched_on[mark.branches :]

    def decide(self, proxy: _ValueProxy, kind: type) -> Any:
        """The Python value of a proxy, remembered as a fact of this graph."""
        value, where = proxy.value, _caller()
        if value is UNKNOWN or isinstance(value, Tensor):
            raise OctavError(
                f"{where}: forward needs {kind.__name__}({proxy.node.name}), which depends on the data in a tensor; "
                "a graph cannot follow that. Compute it outside of forward, or quantize the submodules around it"
            )
        if not where.startswith(_TORCH):
            # torch's own code asks to validate arguments or to choose a fast path; both stay right without a check.
            self._check(proxy.node, kind(value), where)
        return value

    def _check(self, node: fx.Node, expected: Any, where: str) -> None:
        if (node, expected) not in self.checked:
            self.checked.add((node, expected))
            self.create_node("call_function", check_captured, (node, expected, where), {})

    def _evaluate(self, node: fx.Node) -> tuple[Any, int]:
        """What a node computes on fake tensors, and the multiply-accumulates it takes."""
        outer, self.evaluating = self.evaluating, True
        try:
            return self._evaluate_inside(node)
        finally:
            self.evaluating = outer

    def _evaluate_inside(self, node: fx.Node) -> tuple[Any, int]:
        if node.op == "placeholder":
            value = self.arguments[str(node.target).lstrip("*")]
            return pytree.tree_map_only(Tensor, self.fake_mode.from_tensor, value), 0
        if node.op == "get_attr":
            value = self.root
            for atom in str(node.target).split("."):
                value = getattr(value, atom)
            value = value.value if isinstance(value, _TrainingFlag) else value
            return (self.fake_mode.from_tensor(value) if isinstance(value, Tensor) else value), 0
        args, kwargs = _mutable(fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["value"]))
        if any(value is UNKNOWN for value in pytree.tree_leaves((args, kwargs))):
            return UNKNOWN, 0
        try:
            with _plain_training(self._called(node)), self.fake_mode, torch.no_grad(), MacCounter() as counter:
                value = self._call(node, args, kwargs)
            return value, counter.macs
        except (DataDependentOutputException, DynamicOutputShapeException):
            return UNKNOWN, 0

    def _called(self, node: fx.Node) -> nn.Module | None:
        return self.root.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        match node.op:
            case "call_function":
                # A check holds by construction here, and _setitem on fake values of shapes only.
                assert callable(node.target)
                return None if node.target is check_captured else node.target(*args, **kwargs)
            case "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            case _:
                module = self._called(node)
                assert module is not None
                # With fake state: FakeTensorMode would count num_batches_tracked up for real.
                state = dict(itertools.chain(module.named_parameters(), module.named_buffers()))
                fake: dict[str, Tensor] = {name: self.fake_mode.from_tensor(tensor) for name, tensor in state.items()}
                return torch.func.functional_call(module, fake, args, kwargs)


def _mutable(argument: Any) -> Any:
    """Lists and dicts of a node are immutable; a function may write into what it is given."""
    if isinstance(argument, list):
        return [_mutable(item) for item in argument]
    if isinstance(argument, dict):
        return {key: _mutable(item) for key, item in argument.items()}
    return tuple(map(_mutable, argument)) if type(argument) is tuple else argument


def _is_user_function(target: Any) -> bool:
    if not isinstance(target, types.FunctionType) or target in (check_captured, _setitem):
        return False
    return (target.__module__ or "torch").partition(".")[0] not in ("torch", "math", "operator", "builtins")


def _is_stateless(module: nn.Module) -> bool:
    return not any(True for held in (module.children(), module.parameters(), module.buffers()) for _ in held)


@contextlib.contextmanager
def _plain_training(module: nn.Module | None) -> Iterator[None]:
    """Real bools while a leaf module is evaluated: compiled functions take nothing else."""
    flags = {} if module is None else {m: m.__dict__["training"] for m in module.modules()}
    for m, flag in flags.items():
        m.__dict__["training"] = bool(getattr(flag, "value", flag))
    try:
        yield
    finally:
        for m, flag in flags.items():
            m.__dict__["training"] = flag


@contextlib.contextmanager
def _symbolic_torch(tracer: _Tracer) -> Iterator[None]:
    """Functions of torch that refuse proxies, or that must run anew with the graph, as nodes while tracing."""

    def factory(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            leaves = pytree.tree_leaves((args, kwargs))
            if tracer.evaluating or not all(isinstance(leaf, _LITERAL) or type(leaf) in _PROXIES for leaf in leaves):
                return original(*args, **kwargs)
            return tracer.create_proxy("call_function", original, args, kwargs)

        return call

    def of_proxy(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if any(type(arg) in _PROXIES for arg in args):
                return tracer.create_proxy("call_function", original, args, {})
            return original(*args)

        return call

    def is_tensor(x: Any) -> bool:
        return isinstance(x.value if type(x) in _PROXIES else x, Tensor)

    originals = {name: getattr(torch, name) for name in (*_FACTORIES, *_OF_PROXY, "is_tensor")}
    patched = {name: factory(originals[name]) for name in _FACTORIES}
    patched |= {name: of_proxy(originals[name]) for name in _OF_PROXY}
    patched["is_tensor"] = is_tensor
    try:
        for name, function in patched.items():
            setattr(torch, name, function)
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Shape errors reach the user as one OctavError; torch would log a traceback of each besides."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = disabled


@contextlib.contextmanager
def _symbolic_isinstance(root: nn.Module) -> Iterator[None]:
    """isinstance(x, Tensor) is True of a proxy for a tensor, in the files where the modules' forward methods are.

    Shadowed in those files rather than answered by the proxy: torch's C++ would take such a proxy for a tensor.
    """

    def symbolic(x: Any, kinds: Any) -> bool:
        return isinstance(x, kinds) or (type(x) in _PROXIES and isinstance(x.value, kinds))

    files = {id(names): names for m in root.modules() if not _is_torch(names := type(m).forward.__globals__)}
    shadowed = [names for names in files.values() if "isinstance" not in names]
    try:
        for names in shadowed:
            names["isinstance"] = symbolic
        yield
    finally:
        for names in shadowed:
            del names["isinstance"]


def _is_torch(names: Mapping[str, Any]) -> bool:
    return str(names.get("__name__")).partition(".")[0] == "torch"


def _remove_unused(graph: fx.Graph) -> None:
    """Shape arithmetic and attributes that only a branch needed. Nothing that touches tensors: it could be in place."""
    for node in reversed(graph.nodes):
        if node.users or node.op in ("placeholder", "output", "call_module") or node.target is check_captured:
            continue
        if node.op == "get_attr" or not any(
            isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(node.meta["value"])
        ):
            graph.erase_node(node)


def _caller() -> str:
    """file:line of the nearest frame outside of fx and this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_code.co_filename
        if not name.startswith((_HERE, _TORCH + "fx")):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def _user_line(error: BaseException) -> str:
    """file:line of the innermost frame of a traceback that is the user's code."""
    line = "?"
    trace = error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if not name.startswith((_HERE, _TORCH)):
            line = f"{name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return line
