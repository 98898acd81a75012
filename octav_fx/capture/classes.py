"""Subclasses of users' classes, which stand for them: what forward does to its class, it does to the user's.

type(self).calls += 1    counted where the float model counts
type(self)(8)            a Block that is not quantized
type(self) == Block      True for a Block that is quantized, as is {Block: ...}[type(self)]
"""

import functools
import types
from collections.abc import Mapping
from typing import Any, Final

from torch import nn

# What a stand-in keeps of its own: the class that it stands for.
_USERS: Final = "octav_users_class"


def stand_in(
    kind: Any, marker: type, forward: Any, names: Mapping[str, Any] = types.MappingProxyType({})
) -> type[nn.Module]:
    """Return a subclass of marker and of a user's class that stands for the latter, with a forward of its own.

    names: what else it has of its own.
    """
    # A compiler counts by its code how often a function was compiled, and gives up on one that many classes have.
    forward.__code__ = forward.__code__.replace()
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "forward": forward, **names}
    metaclass: Any = type(kind)
    made: Any = _metaclass(metaclass)(kind.__name__, (marker, kind), names)
    # From here on what is set is set on the user's class: ABCs set some of their own before.
    type.__setattr__(made, _USERS, kind)
    return made


@functools.cache
def _metaclass(above: Any) -> Any:
    def users(cls: Any) -> Any:
        return vars(cls).get(_USERS, cls)

    def set_(cls: Any, name: str, value: Any) -> None:
        above.__setattr__(cls if name in vars(cls) else users(cls), name, value)

    def delete(cls: Any, name: str) -> None:
        above.__delattr__(cls if name in vars(cls) else users(cls), name)

    def equal(cls: Any, other: object) -> bool:
        return other is cls or users(cls) is users(other) if isinstance(other, type) else False

    def hashed(cls: Any) -> int:
        return above.__hash__(users(cls))

    def call(cls: Any, *args: Any, **kwargs: Any) -> Any:
        # A module that begins is the user's own; quantize() makes the others past this.
        return above.__call__(users(cls), *args, **kwargs)

    methods = {"__setattr__": set_, "__delattr__": delete, "__eq__": equal, "__hash__": hashed, "__call__": call}
    return type(above.__name__, (above,), methods)
