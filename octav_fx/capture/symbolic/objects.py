"""Objects that forward builds around tensors: a cache, a dataclass, a library's own kind of output.

A graph holds tensors, tuples, lists and dicts. Any other object is kept once, with holes where it holds tensors of the
graph, and copied on each call with the tensors of that call in them.
"""

import collections
import copy
import dataclasses
import sys
import types
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor, fx, nn

# What graphs hold by themselves, or what holds no tensor of a graph that forward has put there.
_PLAIN: Final = (
    Tensor,
    nn.Module,
    fx.Tracer,
    type,
    types.FunctionType,
    types.ModuleType,
    str,
    bytes,
    int,
    float,
    complex,
)
_CONTAINERS: Final = (tuple, list, dict, set, frozenset, slice, range, collections.OrderedDict)


class Slot:
    """Where a tensor of the graph goes."""


@dataclass(frozen=True, slots=True)
class ObjectTemplate:
    """An object without its tensors, and the holes in it, in the order in which rebuild takes the tensors."""

    body: Any
    slots: tuple[Slot, ...]


def is_object(a: Any) -> bool:
    """Tell whether a is an object of some other kind than graphs hold."""
    return not (a is None or isinstance(a, (fx.Proxy, *_PLAIN)) or type(a) in _CONTAINERS or hasattr(a, "_fields"))


def is_of_numpy(a: Any, kind: str) -> bool:
    """Tell whether a is one of NumPy's numbers ("generic") or arrays ("ndarray"), where anybody has imported it."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(a, getattr(numpy, kind))


def is_built_around_proxies(a: Any) -> bool:
    """Tell whether a is such an object, with tensors of the graph in it."""
    return is_object(a) and bool(proxies_in(a))


def is_plain_dataclass(a: Any) -> bool:
    """Tell whether a is what its fields make, and of a class that generated code can name."""
    kind: Any = type(a)
    made_by_fields = dataclasses.is_dataclass(kind) and "__init__" in vars(kind) and kind.__dataclass_params__.init  # type: ignore[union-attr]
    named = getattr(sys.modules.get(kind.__module__), kind.__qualname__, None) is kind
    return bool(made_by_fields and named and set(getattr(a, "__dict__", ())) <= {f.name for f in dataclasses.fields(a)})


def template_of(a: Any) -> tuple[ObjectTemplate, list[fx.Proxy]]:
    """Return a template with a slot for each proxy in an object, and the proxies."""
    proxies = list({id(proxy): proxy for proxy in proxies_in(a)}.values())
    slots = tuple(Slot() for _ in proxies)
    body = copy.deepcopy(a, {id(proxy): hole for proxy, hole in zip(proxies, slots, strict=True)})
    return ObjectTemplate(body, slots), proxies


def rebuild(skeleton: ObjectTemplate, tensors: list[Any]) -> Any:
    """Copy the object of a template, with these tensors in its slots."""
    return copy.deepcopy(skeleton.body, {id(h): tensor for h, tensor in zip(skeleton.slots, tensors, strict=True)})


def with_items(built: dict[Any, Any], items: dict[Any, Any]) -> dict[Any, Any]:
    """Put items into a dict and return it: Dynamo copies dicts of a user's class without what is in them."""
    for key, value in items.items():
        dict.__setitem__(built, key, value)
    return built


def proxies_in(a: Any, seen: set[int] | None = None) -> list[fx.Proxy]:
    """Find the proxies in an object, however deep. seen: what has been looked at, by identity."""
    seen = set() if seen is None else seen
    if isinstance(a, fx.Proxy):
        return [a]
    if a is None or isinstance(a, _PLAIN) or id(a) in seen:
        return []
    seen.add(id(a))
    is_iterable = isinstance(a, (tuple, list, set, frozenset, collections.deque))
    held = list(a.values()) if isinstance(a, dict) else list(a) if is_iterable else []
    held += vars(a).values() if hasattr(a, "__dict__") else []
    held += [getattr(a, name) for cls in type(a).__mro__ for name in _slots(cls) if hasattr(a, name)]
    return [proxy for item in held for proxy in proxies_in(item, seen)]


def _slots(cls: type) -> tuple[str, ...]:
    slots = vars(cls).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)
