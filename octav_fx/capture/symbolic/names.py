"""Names of Python's own that ask what a value is, answered for what a proxy stands for.

Shadowed in the files of the user and of libraries, rather than answered by the proxy: torch's C++ would take a proxy
that claims to be a tensor for one.
"""

import builtins
import contextlib
import sys
import types
from collections.abc import Iterator
from typing import Any, Final

from torch import Tensor, nn

from octav_fx.capture.symbolic.proxies import PROXIES, AttributeProxy, type_of

# Files whose code is traced: none of Python's own or of those that trace and compute, but these of torch.
_NOT_TRACED: Final = frozenset({*sys.stdlib_module_names, "torch", "octav_fx", "numpy", "sympy", "networkx"})
_TRACED: Final = ("torch.nn.", "torch.distributions.", "torch.functional")


@contextlib.contextmanager
def symbolic_names(root: nn.Module) -> Iterator[None]:
    """Answer isinstance(x, Tensor), type(x), callable(x) and len(x) of a proxy, in every file that is traced.

    Python has the length that an object gives made a plain int; a tensor's is as free as x.shape[0].
    """
    shadows = {"isinstance": _isinstance, "callable": _callable, "type": _Type, "len": _len}
    placed = [(names, name) for names in _traced_files(root) for name in shadows if name not in names]
    try:
        for names, name in placed:
            names[name] = shadows[name]
        yield
    finally:
        for names, name in placed:
            del names[name]


def _traced_files(root: nn.Module) -> list[dict[str, Any]]:
    """Return the global names of each file: of what is imported, and of forward methods that nothing imported."""
    forwards = (getattr(type(module), "forward", None) for module in root.modules())
    found = [forward.__globals__ for forward in forwards if builtins.isinstance(forward, types.FunctionType)]
    for name, module in list(sys.modules.items()):
        is_traced = name == "__main__" or name.partition(".")[0] not in _NOT_TRACED or name.startswith(_TRACED)
        if is_traced and builtins.isinstance(module, types.ModuleType):
            found.append(vars(module))
    return list({id(names): names for names in found}.values())


def _isinstance(x: Any, kinds: Any) -> bool:
    return isinstance(x, kinds) or (type(x) in PROXIES and isinstance(x.value, kinds))


def _callable(x: Any) -> bool:
    if type(x) is AttributeProxy:
        return callable(getattr(vars(x)["_owner"].value, vars(x)["_name"], None))
    return callable(x.value if type(x) in PROXIES else x)


def _len(x: Any) -> Any:
    if type(x) in PROXIES and isinstance(x.value, Tensor):
        return x.tracer.create_proxy("call_function", len, (x,), {})
    return len(x)


class _Shadow(type):
    """What is called in place of type, and is what type is to isinstance and issubclass."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Return the type of one argument, or make a class of three."""
        return type(*args, **kwargs) if len(args) != 1 else type_of(args[0])

    def __instancecheck__(cls, x: Any) -> bool:
        """Tell whether x is a class."""
        return isinstance(x, type)

    def __subclasscheck__(cls, kind: type) -> bool:
        """Tell whether a class makes classes."""
        return issubclass(kind, type)


class _Type(type, metaclass=_Shadow):
    """Stands for type."""
