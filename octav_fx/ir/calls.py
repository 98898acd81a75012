"""Arguments of an op's call by the names of its schema: passes neither count positions nor know defaults.

Of quantize(x, clip, 4, True, None), say, clip is arguments_of(node).clip, and ceiling, which was not given, is None.
Only calls of torch.ops have a schema; those of Python functions and of methods have none.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx

from octav_fx.compat.tensors import OpOverload, schema_of
from octav_fx.errors import OctavError
from octav_fx.ir.edits import insert_aten


class Arguments(Mapping[str, Any]):
    """The arguments of one call, defaults included, in the order of the schema: call.clip or call["clip"]."""

    __slots__ = ("_call", "_values")

    def __init__(self, call: str, values: dict[str, Any]) -> None:
        self._call, self._values = call, values

    def __getitem__(self, name: str) -> Any:
        if name not in self._values:
            raise OctavError(f"{self._call} takes {', '.join(self._values)}, there is no {name!r}")
        return self._values[name]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            # Protocols of Python, copying for one, ask for names that nobody has.
            raise AttributeError(name)
        return self[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def arguments_of(node: fx.Node) -> Arguments:
    """Return the arguments of a call of an op. Raises OctavError for another node, and for a call that does not fit."""
    target = _overload(node.target, str(node))
    positional, keywords = _schema(target)
    if len(node.args) > len(positional):
        raise OctavError(f"{node}: {target} takes {len(positional)} arguments by position, not {len(node.args)}")
    given = {**dict(zip(positional, node.args, strict=False)), **node.kwargs}
    defaults = positional | keywords
    if unknown := [name for name in given if name not in defaults]:
        raise OctavError(f"{node}: {target} takes {', '.join(defaults)}, there is no {unknown[0]!r}")
    values = {name: given.get(name, default) for name, default in defaults.items()}
    if missing := [name for name, value in values.items() if value is _REQUIRED]:
        raise OctavError(f"{node}: {target} is called without {', '.join(missing)}")
    return Arguments(f"{node}: {target}", values)


def update_arguments(node: fx.Node, **changes: Any) -> None:
    """Give other values to some arguments of a call, in place; its fake value stays as it is.

    Raises OctavError for a name that the op does not have.
    """
    call = arguments_of(node)
    for name in changes:
        call[name]
    node.args, node.kwargs = _placed(_overload(node.target, str(node)), {**call, **changes})


def insert_call(graph: fx.Graph, target: OpOverload, *given: Mapping[str, Any], **changes: Any) -> fx.Node:
    """Insert a call of an op with those of the given arguments that its schema names; later ones come first.

    So dequantize gets from a call of quantize whatever describes the grid. Raises OctavError for a change that the op
    has no name for, and for an argument that is missing.
    """
    positional, keywords = _schema(target)
    names = positional | keywords
    if unknown := [name for name in changes if name not in names]:
        raise OctavError(f"{target} takes {', '.join(names)}, there is no {unknown[0]!r}")
    merged: dict[str, Any] = {}
    for source in (*given, changes):
        merged |= {name: value for name, value in source.items() if name in names}
    values = {name: merged.get(name, default) for name, default in names.items()}
    if missing := [name for name, value in values.items() if value is _REQUIRED]:
        raise OctavError(f"{target} cannot be called without {', '.join(missing)}")
    args, kwargs = _placed(target, values)
    return insert_aten(graph, target, *args, **kwargs)


_REQUIRED = object()


@functools.cache
def _schema(target: OpOverload) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the positional and the keyword-only arguments of an op, each by name with its default."""
    arguments = schema_of(target).arguments
    named = [(a.name, a.default_value if a.has_default_value() else _REQUIRED, a.kwarg_only) for a in arguments]
    positional = {name: default for name, default, only in named if not only}
    return positional, {name: default for name, default, only in named if only}


def _overload(target: Any, call: str) -> OpOverload:
    if not isinstance(target, OpOverload):
        raise OctavError(f"{call}: {target} is no op of torch.ops, its arguments have no names")
    return target


def _placed(target: OpOverload, values: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positions and keywords for the values; keywords at their default are left out."""
    positional, keywords = _schema(target)
    kwargs = {name: values[name] for name, default in keywords.items() if not _is_default(values[name], default)}
    return tuple(values[name] for name in positional), kwargs


def _is_default(value: Any, default: Any) -> bool:
    return value is default or (type(value) is type(default) and bool(value == default))
