"""Subclasses of users' classes, which stand for them: what forward does to its class, it does to the user's.

type(self).calls += 1    counted where the float model counts
type(self)(8)            a Block that is not quantized
type(self) == Block      True for a Block that is quantized, as is {Block: ...}[type(self)]
isinstance(b, type(q))   True for each Block b, quantized or not
type(self) is Block      True in the methods of modules: those that ask for it are copied, with another type()
class W(type(q))         a subclass of Block: who keeps it for further modules, as fully_shard does, may take Blocks
q.__class__ = W          a subclass of W and of the one before, whose forward stays what W finds above it
"""

import dis
import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import nn

from octav_fx.capture.contents import is_users_class
from octav_fx.capture.products import telling_methods
from octav_fx.compat.graphs import compare_classes_by_value

# What a stand-in keeps of its own: the class that it stands for.
_USERS: Final = "octav_users_class"
# What a class has that is made of one below the user's and of a stand-in.
_BELOW: Final = "octav_below"
# The name of type() in methods that were copied.
_TYPE: Final = "octav_type"


class _Untold:
    """Keeps a user's __init_subclass__ from being called for a class that stands for one it knows.

    One that can be called is: it may wrap the forward of each subclass, as layers of transformers do to recompute it.
    """

    def __init_subclass__(cls, **_: Any) -> None:
        pass


# The methods of torch's modules, before those of a user's class that know of parts which are no longer there.
_Torchs: Final = type("_Torchs", (), {name: f for name, f in vars(nn.Module).items() if inspect.isfunction(f)})


def _as_base(kind: Any) -> tuple[type, ...]:
    """Return the last bases of a subclass of a user's class, of which its __init_subclass__ is told nothing else."""
    try:
        inspect.signature(kind.__init_subclass__).bind()
    except TypeError:
        return _Untold, kind
    except ValueError:
        # That of object has no signature.
        pass
    return (kind,)


def stand_in(
    kind: Any, marker: type, forward: Any, names: Mapping[str, Any] = types.MappingProxyType({})
) -> type[nn.Module]:
    """Return a subclass of marker and of a user's class that stands for the latter, with a forward of its own.

    names: what else it has of its own.
    """
    # A compiler counts by its code how often a function was compiled, and gives up on one that many classes have.
    forward.__code__ = forward.__code__.replace()
    own = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "forward": forward}
    # A copy would stand before the marker's method of that name, which calls the user's.
    methods = _methods(kind)
    methods |= telling_methods(kind, methods)
    methods = {name: method for name, method in methods.items() if name not in vars(marker)}
    # A class with an __eq__ of its own inherits no hash.
    names = {"__hash__": kind.__hash__, **methods, **own, **names, "__class__": property(type, _set_class)}
    metaclass: Any = type(kind)
    made: Any = _metaclass(metaclass)(kind.__name__, (marker, *_as_base(kind)), names)
    # From here on what is set is set on the user's class: ABCs set some of their own before.
    type.__setattr__(made, _USERS, kind)
    return made


@functools.cache
def as_users(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function to which type(x) is the user's class where x is of a class that stands for it.

    Of one that does not compare what type() returns by `is`, itself. In type(x).forward it is the class that x is of:
    one that wraps the forward of each class below it asks so whether it is the outermost.
    """
    if not isinstance(function, types.FunctionType):
        return function
    # Those that stand inside of it have code of their own, and wrappers call what they wrap.
    code, steps = function.__code__, list(dis.get_instructions(function))
    # The lowest bit of the argument tells that it is called.
    calls = [
        step
        for at, step in enumerate(steps)
        if step.opname == "LOAD_GLOBAL" and step.argval == "type" and step.arg is not None and step.arg & 1
        if not _reads_attribute(steps[at:])
    ]
    place = len(code.co_names) << 1 | 1
    if not calls or all(s.opname != "IS_OP" for s in steps) or place > 255 or "type" in function.__globals__:
        return function
    changed = bytearray(code.co_code)
    for step in calls:
        changed[step.offset + 1] = place
    function.__globals__[_TYPE] = _type
    code = code.replace(co_code=bytes(changed), co_names=(*code.co_names, _TYPE))
    made = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(made, function)


def _reads_attribute(steps: list[dis.Instruction]) -> bool:
    """Tell whether what the first call of these gives is asked for an attribute."""
    call = next((at for at, step in enumerate(steps) if step.opname == "CALL"), len(steps))
    return any(step.opname == "LOAD_ATTR" for step in steps[call + 1 : call + 2])


def forward_of(kind: Any) -> Callable[[], Callable[..., Any]]:
    """Return what returns the forward of a user's class, as as_users() makes it; one that is set later, as it is.

    A compiler follows it, and does not meet as_users().
    """
    known, own = kind.forward, as_users(kind.forward)

    def found() -> Callable[..., Any]:
        now: Callable[..., Any] = kind.forward
        return own if now is known else now

    return found


def users_class(kind: type) -> type:
    """Return the user's class that a class stands for: one below that of quantize(), if others have set one."""
    found: type = vars(kind).get(_USERS, kind)
    return found


def converted_class(own: Any, kind: Any, names: Mapping[str, Any]) -> type:
    """Return a subclass of own, the class of one module, which stands for a user's class that own is not below of.

    isinstance() finds the user's class in it, type() where methods ask for it by `is`, and methods that own and torch's
    modules do not have. names: what it has of its own.
    """
    names = {**names, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    # Of that name here: what sets a forward or a call of its own sets it on this class, not on the user's.
    names = {"forward": own.forward, "__call__": own.__call__, **names, "__hash__": kind.__hash__}
    metaclass: Any = type(kind)
    made: Any = _metaclass(metaclass)(own.__name__, (own, _Torchs, *_as_base(kind)), names)
    type.__setattr__(made, _USERS, kind)
    return made


def highest_stand_in(kind: type) -> Any:
    """Return the stand-in that stand_in() made, of a class that is that one or below it."""
    return _stand_ins(kind)[-1]


def _stand_ins(kind: type) -> list[Any]:
    """Return a class and those above it that stand for others, the nearest first."""
    return [above for above in type.__dict__["__mro__"].__get__(kind) if _USERS in vars(above)]


def _type(*args: Any, **kwargs: Any) -> type:
    return users_class(type(*args, **kwargs))


def _methods(kind: type) -> dict[str, Any]:
    """Return the methods of a user's class and of those above it that ask for classes, made to find the user's."""
    names = dict.fromkeys(name for above in kind.__mro__ if is_users_class(above) for name in vars(above))
    held = {name: inspect.getattr_static(kind, name) for name in names}
    methods = {name: value for name, value in held.items() if isinstance(value, types.FunctionType)}
    return {name: made for name, value in methods.items() if (made := as_users(value)) is not value}


class _ByIdentity(tuple[type, ...]):
    """An __mro__ in which a class is looked for by identity: a stand-in, which comes first, is equal to the user's."""

    def index(self, kind: Any, *_: Any) -> int:
        """Return the place of a class, from where on a compiler looks for what super() finds."""
        return [*map(id, self)].index(id(kind))


def _set_class(module: Any, kind: type) -> None:
    made = _stand_ins(type(module))[0]
    users = vars(made)[_USERS]
    # Back to the user's, or to another that stands for it, is past this.
    is_below = kind is not users and issubclass(kind, users) and not isinstance(kind, type(made))
    object.__dict__["__class__"].__set__(module, _below(kind, made) if is_below else kind)


@functools.cache
def _below(kind: Any, made: Any) -> Any:
    """Return a subclass of both, which stands for kind, a class below the user's of made."""
    own = {_BELOW: True, "__module__": kind.__module__, "__qualname__": kind.__qualname__, "__hash__": kind.__hash__}
    below: Any = type(made)(kind.__name__, (kind, made), own)
    type.__setattr__(below, _USERS, kind)
    return below


@functools.cache
def _metaclass(above: Any) -> Any:
    def new(meta: Any, name: str, bases: tuple[Any, ...], names: dict[str, Any], **rest: Any) -> Any:
        if _BELOW not in names and any(users_class(base) is not base for base in bases):
            names = {"__module__": bases[0].__module__, **names}
            return above.__new__(above, name, tuple(map(users_class, bases)), names, **rest)
        return above.__new__(meta, name, bases, names, **rest)

    def set_(cls: Any, name: str, value: Any) -> None:
        above.__setattr__(cls if name in vars(cls) else users_class(cls), name, value)

    def delete(cls: Any, name: str) -> None:
        above.__delattr__(cls if name in vars(cls) else users_class(cls), name)

    def equal(cls: Any, other: object) -> bool:
        return other is cls or users_class(cls) is users_class(other) if isinstance(other, type) else False

    def hashed(cls: Any) -> int:
        compare_classes_by_value()
        return above.__hash__(users_class(cls))

    def order(cls: Any) -> Any:
        return _ByIdentity(type.__dict__["__mro__"].__get__(cls))

    def call(cls: Any, *args: Any, **kwargs: Any) -> Any:
        # A module that begins is the user's own; quantize() makes the others past this.
        return above.__call__(users_class(cls), *args, **kwargs)

    # Not by those of above: an ABC asks each class below it, which would ask that ABC.
    def has_instance(cls: Any, x: Any) -> bool:
        return type.__instancecheck__(users_class(cls), x)

    def has_subclass(cls: Any, kind: type) -> bool:
        return type.__subclasscheck__(users_class(cls), kind)

    def signature(cls: Any) -> inspect.Signature:
        if users_class(cls) is cls:
            raise AttributeError("__signature__")
        # Without it that of call() would be found.
        return inspect.signature(users_class(cls))

    methods: dict[str, Any] = {"__setattr__": set_, "__delattr__": delete, "__eq__": equal, "__hash__": hashed}
    methods |= {"__new__": new, "__call__": call, "__mro__": property(order), "__signature__": property(signature)}
    methods |= {"__instancecheck__": has_instance, "__subclasscheck__": has_subclass}
    return type(above.__name__, (above,), methods)
