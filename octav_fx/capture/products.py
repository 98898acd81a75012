"""Methods besides forward that multiply tensors: nothing of what they multiply is quantized, which they say.

def encode(self, x): return x @ self.w    float on a model in one graph, and in blocks, where layers in it are quantized
"""

import dis
import functools
import sys
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch

from octav_fx.capture.code_names import names_in
from octav_fx.capture.contents import is_users_class
from octav_fx.capture.permits import is_permitted
from octav_fx.capture.user_stack import is_users_code
from octav_fx.compat.modules import CALL_CODE
from octav_fx.ir.table.contractions import CONTRACTIONS

_TARGETS: Final = tuple(target for op in CONTRACTIONS for target in (op.target, *op.functions))
_METHODS: Final = frozenset(name for op in CONTRACTIONS for name in op.methods)
_NAMES: Final = _METHODS | {name for target in _TARGETS if (name := getattr(target, "__name__", ""))}
# Stands for what a method is called on, which holds layers by any name.
_SELF: Final = object()
_BINARY: Final = dis.opmap["BINARY_OP"]
_FORWARD: Final = "forward"


def telling_methods(kind: type, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the methods of a user's class that multiply tensors, made to say so where no module is being called.

    own: those of them that the class is to have in other words.
    """
    methods = {name: own.get(name, method) for name, method in _methods(kind).items() if _multiplies(kind, name)}
    return {name: _telling(kind, name, method) for name, method in methods.items()}


def _telling(kind: type, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    told = list[bool]()

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and not told and not is_permitted() and not _is_called():
            told.append(True)
            warnings.warn(
                f"{kind.__name__}.{name} multiplies tensors by itself (line {_multiplies(kind, name)}), in float: "
                "octav_fx quantizes what forward multiplies, and layers; put it into forward, or into a module of its "
                "own",
                stacklevel=2,
            )
        return method(self, *args, **kwargs)

    return call


def _is_called() -> bool:
    """Tell whether a module is being called, or its forward is: what that multiplies has rows."""
    frame = sys._getframe(2).f_back
    while frame is not None and frame.f_code is not CALL_CODE and frame.f_code.co_name != _FORWARD:
        frame = frame.f_back
    return frame is not None


@functools.cache
def _methods(kind: type) -> dict[str, types.FunctionType]:
    """Return the methods of a user's class and of those above it, but forward and what Python itself calls."""
    held: dict[str, Any] = {}
    for above in filter(is_users_class, reversed(kind.__mro__)):
        held |= vars(above)
    plain = {name: value for name, value in held.items() if isinstance(value, types.FunctionType)}
    return {name: value for name, value in plain.items() if name != _FORWARD and name[:2] != "__"}


@functools.cache
def _multiplies(kind: type, name: str) -> int | None:
    """Return the line of a product in a method, or in a function that it names; other methods say it themselves."""
    method = _methods(kind)[name]
    lines = (_product(function, function.__code__) for function in (method, *_functions(method)))
    return next((line for line in lines if line is not None), None)


def _functions(function: types.FunctionType) -> list[types.FunctionType]:
    """Return the functions of the user's that a function names."""
    found = (function.__globals__.get(name) for name in names_in(function.__code__))
    return [value for value in found if isinstance(value, types.FunctionType) and is_users_code(value.__code__)]


@functools.cache
def _product(function: types.FunctionType, code: types.CodeType) -> int | None:
    """Return the line of the first product of tensors in the code of a function, or of one that stands in it."""
    if _BINARY in code.co_code[::2] or not _NAMES.isdisjoint(code.co_names):
        held: Any = None
        for step in dis.get_instructions(code):
            is_product = step.opname == "BINARY_OP" and step.argrepr in ("@", "@=")
            match step.opname:
                case "LOAD_GLOBAL":
                    held = function.__globals__.get(step.argval)
                case "LOAD_ATTR" | "LOAD_METHOD":
                    # F.linear, and x.mm(y); self.linear is a layer.
                    is_product = held is not _SELF and not _is_file(held) and step.argval in _METHODS
                    held = getattr(held, step.argval, None) if _is_file(held) else None
                case _:
                    held = _SELF if step.opname.startswith("LOAD_FAST") and step.argval == "self" else None
            if is_product or any(held is target for target in _TARGETS):
                return step.positions.lineno if step.positions is not None else code.co_firstlineno
    within = (_product(function, constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return next((line for line in within if line is not None), None)


def _is_file(value: Any) -> bool:
    return isinstance(value, types.ModuleType)
