"""What user code holds while it is traced: proxies that know what the example inputs make of them."""

import functools
import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, fx, nn

from octav_fx.capture.symbolic.identity import compares_objects, is_at_class_pattern
from octav_fx.capture.symbolic.writes import set_data, write
from octav_fx.capture.user_stack import TORCH, called_by, caller, is_users, told_by, user_caller
from octav_fx.errors import OctavError
from octav_fx.ir.meta import fake

if TYPE_CHECKING:
    from octav_fx.capture.symbolic.tracer import ValueTracer

# Yes or no by how and where a tensor is held.
_OF_STORAGE: Final = frozenset({"is_nested", "is_sparse", "is_cuda", "is_cpu", "is_meta"})
# Of the engine of gradients, which a trace does without: asked, or given work, by some forwards.
_OF_AUTOGRAD: Final = frozenset(
    {
        *("requires_grad", "grad_fn", "is_leaf", "grad", "retains_grad", "register_hook", "retain_grad", "backward"),
        *("register_post_accumulate_grad_hook", "_version", "_base", "_is_view"),
    }
)

# What cuts a tensor into as many pieces as its size asks for.
_PIECES: Final = frozenset(
    {
        *("unbind", "split", "chunk", "tensor_split", "hsplit", "vsplit", "dsplit", "unsafe_split", "unsafe_chunk"),
        *("split_with_sizes", "unsafe_split_with_sizes"),
    }
)


class _Unknown:
    """The value of what cannot be known without data, such as the result of item()."""

    def __repr__(self) -> str:
        return "a value that depends on data"


UNKNOWN: Final = _Unknown()
_OF_DATA: Final = (Tensor, _Unknown)
# What has a text that a guard can ask for, or that only data could tell.
_KEYS: Final = (bool, int, float, str, torch.Size, torch.device, torch.dtype)
_WRITTEN: Final = (*_KEYS, *_OF_DATA)
_CACHED: Final = type(functools.cache(repr))
# What tells later, in the graph.
_IN_GRAPHS: Final = ("_assert",)


class _Matched:
    """What `case Tensor():` asks is of the class of the value; all else that asks, of torch's C++ too, a proxy."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type_of(self) if is_at_class_pattern(sys._getframe(1)) else type(self)


class ValueProxy(_Matched, fx.Proxy):
    """A proxy that answers what Python asks of a value: truth, length, iteration, index."""

    tracer: "ValueTracer"

    @property
    def value(self) -> Any:
        """Return what the example inputs make of this: a fake tensor, a number, a shape, UNKNOWN.

        Where the user's code asks an object for its own attribute of that name, that.
        """
        value = fake(self.node)
        if not isinstance(value, Tensor) and hasattr(value, "value") and is_users(sys._getframe(1)):
            return self.__getattr__("value")
        return value

    def __getattr__(self, name: str) -> Any:
        value = self.value
        if isinstance(value, Mapping):
            match name:
                case "values":
                    return lambda: [self[key] for key in value]
                case "items":
                    return lambda: [(key, self[key]) for key in value]
                case "get":
                    return lambda key, default=None: self[key] if key in value else default
        if isinstance(value, Tensor) and name == "ndim":
            # Arguments of the same kind have as many.
            return value.ndim
        if isinstance(value, Tensor) and name in _OF_STORAGE:
            # torch's own modules ask only to choose a fast path.
            is_torchs = caller().startswith(TORCH)
            return getattr(value, name) if is_torchs else self.tracer.decide(AttributeProxy(self, name), bool)
        is_asked = isinstance(value, Tensor) and name == "dtype" and is_users(sys._getframe(1))
        if is_asked and (compares_objects() or self.tracer.compares_dtypes):
            # x.dtype is torch.bfloat16: what stands for a dtype is none.
            return self.tracer.decide(AttributeProxy(self, name), torch.dtype)
        if isinstance(value, Tensor) and name in _OF_AUTOGRAD:
            return self._of_autograd(name)
        if isinstance(value, torch.device) and name == "type":
            # Regions of autocast take nothing but a str.
            return self.tracer.decide(AttributeProxy(self, name), str)
        if self._is_given() and name in getattr(value, "_fields", ()):
            # What is None or a number in a named tuple is so for Python, as it is in a plain one.
            return self[value._fields.index(name)]
        if value is not UNKNOWN and not hasattr(value, name):
            raise AttributeError(f"{type(value).__name__!r} object has no attribute {name!r}")
        return (ShapeProxy if isinstance(value, Tensor) and name == "shape" else AttributeProxy)(self, name)

    def _of_autograd(self, name: str) -> Any:
        if caller().startswith(TORCH):
            # torch's own modules ask only to choose an inference fast path, which hides the operands.
            return getattr(self.value, name)
        is_read = self._is_given() or self.node.op == "get_attr"
        if name == "requires_grad" and is_read:
            return self.tracer.decide(AttributeProxy(self, name), bool)
        raise OctavError(f"{user_caller()}: forward asks for {name} of a tensor, which a graph does not know")

    @property
    def keys(self) -> Any:
        """Return what gives the keys of a dict, which fx asks the tracer for; an object may hold keys of its own."""
        value = self.value
        if isinstance(value, Mapping):
            return lambda: list(value)
        return self.__getattr__("keys") if hasattr(value, "keys") else super().keys

    def _is_given(self) -> bool:
        """Tell whether this is an argument of forward or a part of one, whose kind is guarded."""
        node = self.node
        while node.target is operator.getitem:
            node = node.args[0]  # type: ignore[assignment]
        return node.op == "placeholder"

    def count_pieces(self) -> None:
        """Guard the number of pieces of a tensor, where that is what Python goes through."""
        target = self.node.target
        if (target if isinstance(target, str) else getattr(target, "__name__", "")) in _PIECES:
            self.tracer.count(self)

    def __getitem__(self, index: Any) -> Any:
        value = self.value
        if isinstance(value, (Mapping, tuple, list)) and self._is_given() and not isinstance(index, fx.Proxy):
            item = value[index]
            if item is None or isinstance(item, (bool, int, float, str)):
                return item
            return self.tracer.given_once(
                self.tracer.create_proxy("call_function", operator.getitem, (self, index), {})
            )
        return self.tracer.create_proxy("call_function", operator.getitem, (self, index), {})

    def __bool__(self) -> bool:
        return bool(self.tracer.decide(self, bool))

    def __index__(self) -> int:
        return int(self.tracer.decide(self, int))

    __int__ = __index__

    def __float__(self) -> float:
        return float(self.tracer.decide(self, float))

    def __repr__(self) -> str:
        return self._text(sys._getframe(1), repr)

    def __str__(self) -> str:
        return self._text(sys._getframe(1), str)

    def __format__(self, form: str) -> str:
        return self._text(sys._getframe(1), lambda value: format(value, form))

    def _text(self, frame: FrameType, written: Callable[[Any], str]) -> str:
        """Return the text of a number or a shape, which may be a key: that of the example, under a guard."""
        kind = next((k for k in _WRITTEN if isinstance(self.value, k)), None)
        if kind is None or not is_users(frame):
            return super().__repr__()
        if (teller := told_by(frame)) is None:
            self.tracer.decide(self, str if kind in _OF_DATA else kind)
        # A graph would say of another size that it is the example's.
        return super().__repr__() if kind in _OF_DATA or teller in _IN_GRAPHS else written(self.value)

    def __len__(self) -> int:
        return int(self.tracer.create_proxy("call_function", len, (self,), {}))

    def __iter__(self) -> Iterator[Any]:
        value = self.value
        if isinstance(value, Mapping):
            return iter(list(value))
        if isinstance(value, (tuple, list)):
            self.count_pieces()
            return (self[i] for i in range(len(value)))
        if isinstance(value, Tensor):
            return (self[i] for i in range(len(self)))
        return super().__iter__()

    def __round__(self, *digits: Any) -> Any:
        return self.tracer.create_proxy("call_function", round, (self, *digits), {})

    def __divmod__(self, divisor: Any) -> Any:
        return self.tracer.create_proxy("call_function", divmod, (self, divisor), {})

    def __copy__(self) -> Any:
        if isinstance(self.value, Tensor):
            raise OctavError(f"{user_caller()}: forward copies a tensor by copy.copy, which leaves its history out")
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.clone() if isinstance(self.value, Tensor) else self

    def __contains__(self, item: Any) -> bool:
        return item in self.value if isinstance(self.value, Mapping) else any(item is x or item == x for x in self)

    def __setitem__(self, index: Any, item: Any) -> None:
        self.tracer.create_proxy("call_function", setitem_, (self, index, item), {})

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data":
            set_data(self, value)
        elif name in ("grad", "requires_grad"):
            raise OctavError(f"{user_caller()}: forward sets {name} of a tensor, which a graph cannot hold")
        else:
            super().__setattr__(name, value)

    def __eq__(self, other: object) -> Any:
        if self.tracer.is_traced and isinstance(self.value, _KEYS):
            # Keys of a dict that forward has filled, as it is put back.
            return self.value == as_key(other)
        return super().__eq__(other)

    def __hash__(self) -> int:
        """Return that of a number or a kind under a guard, as dicts and sets compare; of all else the identity."""
        kind, frame = next((k for k in _KEYS if isinstance(self.value, k)), None), sys._getframe(1)
        if kind is None:
            return object.__hash__(self)
        if is_users(frame):
            function = called_by(frame)
            if isinstance(getattr(function, "__func__", function), _CACHED):
                # What remembers its results computes one more, which then holds for each size.
                return object.__hash__(self)
            self.tracer.decide(self, kind)
        return hash(self.value)

    # NumPy leaves operators with a number of its own to the proxy, as it does with a tensor.
    __array_priority__ = 1000


def _augmented(name: str) -> Any:
    in_place, apart = getattr(operator, f"i{name}"), getattr(operator, f"__{name}__")

    def assign(self: ValueProxy, other: Any) -> Any:
        is_tensor = isinstance(self.value, Tensor)
        return write(self.tracer, in_place, apart, self, other) if is_tensor else apart(self, other)

    return assign


# Tensors have no __imatmul__.
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"):
    setattr(ValueProxy, f"__i{_name}__", _augmented(_name))


class AttributeProxy(ValueProxy):
    """x.attribute: a method call if it is called, else a getattr node made on first use."""

    def __init__(self, owner: ValueProxy, name: str) -> None:
        self.__dict__.update(tracer=owner.tracer, _owner=owner, _name=name, _made=None)

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        """Return the getattr node, made on first use: most attributes are methods about to be called."""
        if self.__dict__["_made"] is None:
            made = self.tracer.create_proxy(
                "call_function", getattr, (self.__dict__["_owner"], self.__dict__["_name"]), {}
            )
            self.__dict__["_made"] = made.node
        return self.__dict__["_made"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Make the node of the method call."""
        return self.tracer.create_proxy("call_method", self.__dict__["_name"], (self.__dict__["_owner"], *args), kwargs)


class SequenceProxy(ValueProxy):
    """That of a tuple or a list, which `match` takes for one by its class."""


class MappingProxy(ValueProxy):
    """That of a dict, which `match` takes for one by its class."""


class ShapeProxy(AttributeProxy):
    """x.shape, which `match` takes for a tuple by its class."""


Sequence.register(SequenceProxy)
Sequence.register(ShapeProxy)
Mapping.register(MappingProxy)

PROXIES: Final = (ValueProxy, AttributeProxy, SequenceProxy, MappingProxy, ShapeProxy)


def proxy_of_value(node: fx.Node, tracer: "ValueTracer") -> ValueProxy:
    """Make a proxy of the class that the value of a node asks for."""
    value = fake(node)
    kind = SequenceProxy if isinstance(value, (tuple, list)) else ValueProxy
    return (MappingProxy if isinstance(value, Mapping) else kind)(node, tracer)


def type_of(x: Any) -> type:
    """Return the class of a value, for a proxy that of what it stands for."""
    if type(x) not in PROXIES or x.value is UNKNOWN:
        return type(x)
    if isinstance(x.value, Tensor):
        return nn.Parameter if isinstance(x.value, nn.Parameter) else Tensor
    return type(x.value)


def as_key(key: Any) -> Any:
    """Return a key of a dict as it is in the float model: guards hold for the proxies in it."""
    if type(key) is tuple:
        return tuple(map(as_key, key))
    return key.value if type(key) in PROXIES and isinstance(key.value, _KEYS) else key


def setitem_(target: Any, index: Any, item: Any) -> Any:
    """Set target[index] = item and return target: later readers of the target follow it in the graph."""
    target[index] = item
    return target


fx.node.has_side_effect(setitem_)


class TrainingFlag:
    """Stands for module.training while tracing: an operation that takes it gets a node that reads it at run time."""

    def __init__(self, tracer: "ValueTracer", target: str, value: bool) -> None:
        self.tracer, self.target, self.value = tracer, target, value

    def __fx_create_arg__(self, tracer: "ValueTracer") -> fx.Node:
        return tracer.create_node("get_attr", self.target, (), {})

    def __eq__(self, other: object) -> bool:
        return bool(self) == other

    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        if caller().startswith(TORCH):
            # torch's own modules ask only to choose an inference fast path, which hides the operands.
            return True
        self.tracer.branched_on.append(self.target)
        return self.value
