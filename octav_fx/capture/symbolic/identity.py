"""Whether two results are one tensor, which forward may ask (y is x) and a graph cannot: strides and modes decide.

What writes in place, and what is given as the argument it was, is the same in the trace; the functions here return
their input in some calls, and in others a new tensor.
"""

import dis
import functools
import inspect
import sys
from collections.abc import Iterator, Mapping
from types import CodeType, FrameType, FunctionType
from typing import Any, Final

import torch
from torch import fx, nn

from octav_fx.capture.user_stack import is_users_code

_FUNCTIONS: Final = frozenset(
    {
        *("contiguous", "to", "type", "type_as", "cpu", "cuda", "expand", "expand_as", "reshape", "flatten"),
        *("float", "double", "half", "bfloat16", "int", "long", "bool", "resolve_conj", "resolve_neg"),
        *("dropout", "alpha_dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "rrelu"),
    }
)
_MODULES: Final = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_TRACE: Final = inspect.unwrap(fx.Tracer.trace).__code__
# Two local variables at once: of Python 3.13, and of 3.14.
_TWO: Final = ("LOAD_FAST_LOAD_FAST", "LOAD_FAST_BORROW_LOAD_FAST_BORROW")
_MATCH_CLASS: Final = dis.opmap["MATCH_CLASS"]
_IS: Final = dis.opmap["IS_OP"]
_DTYPES: Final = frozenset(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))
_LOCAL: Final = ("LOAD_FAST", "LOAD_DEREF", "LOAD_FAST_BORROW", "LOAD_FAST_CHECK", *_TWO)


def may_be_its_input(target: Any) -> bool:
    """Tell whether a function, a method by its name, or a module returns its input in some calls."""
    if isinstance(target, nn.Module):
        return isinstance(target, _MODULES)
    return (target if isinstance(target, str) else getattr(target, "__name__", "")) in _FUNCTIONS


def line_that_compares() -> str | None:
    """Return file:line of the user's code that is traced, if it compares results by `is`."""
    for code in _users_codes():
        if (line := _line_that_compares(code)) is not None:
            return f"{code.co_filename}:{line}"
    return None


def compares_objects() -> bool:
    """Tell whether the user's code that is traced asks by `is` for another object than None: for a dtype, it may be."""
    return any(map(_compares_objects, _users_codes()))


def compares_dtypes(function: FunctionType) -> bool:
    """Tell whether a function, or one that stands in it, asks by `is` for what may be a dtype: for one by its name."""
    pending = [function.__code__]
    for code in pending:
        pending += (constant for constant in code.co_consts if isinstance(constant, CodeType))
        if _IS in code.co_code[::2] and any(_is_of_dtype(name, function.__globals__) for name in _compared(code)):
            return True
    return False


def _is_of_dtype(name: str, space: Mapping[str, Any]) -> bool:
    return name in _DTYPES or "dtype" in name or isinstance(space.get(name), torch.dtype)


@functools.cache
def _compared(code: CodeType) -> tuple[str, ...]:
    """Return the names of variables and attributes that a function compares by `is` with anything but None."""
    steps = _steps(code)
    of = [steps[at - 2 : at] for at, step in enumerate(steps) if step.opname == "IS_OP"]
    named = [step for pair in of if pair[-1].opname != "LOAD_CONST" for step in pair if step.opname.startswith("LOAD_")]
    return tuple(name for s in named for name in (s.argval if isinstance(s.argval, tuple) else (str(s.argval),)))


def is_at_class_pattern(frame: FrameType) -> bool:
    """Tell whether what a function does now is to ask for a class as a pattern of `match`, which is no call."""
    return frame.f_lasti in _class_patterns(frame.f_code)


@functools.cache
def _class_patterns(code: CodeType) -> frozenset[int]:
    """Return where in a function classes are patterns."""
    steps = code.co_code[::2]
    return frozenset(2 * at for at, step in enumerate(steps) if step == _MATCH_CLASS)


def _users_codes() -> Iterator[CodeType]:
    frame: FrameType | None = sys._getframe(1)
    # Around the trace is whoever called quantize.
    while frame is not None and frame.f_code is not _TRACE:
        if is_users_code(frame.f_code):
            yield frame.f_code
        frame = frame.f_back


@functools.cache
def _compares_objects(code: CodeType) -> bool:
    steps = _steps(code)
    return any(step.opname == "IS_OP" and steps[at - 1].opname != "LOAD_CONST" for at, step in enumerate(steps))


def _steps(code: CodeType) -> list[dis.Instruction]:
    return [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "PRECALL")]


@functools.cache
def _line_that_compares(code: CodeType) -> int | None:
    """Return the line of the first `a is b` in a function that may compare results.

    One operand at least is then a local variable other than an argument that keeps what the caller gave.
    """
    steps = _steps(code)
    stored = {step.argval for step in steps if step.opname.startswith("STORE_")}
    given = {*code.co_varnames[: code.co_argcount + code.co_kwonlyargcount], *code.co_freevars} - stored
    for at, step in enumerate(steps):
        if step.opname != "IS_OP":
            continue
        operands = steps[at - 1 : at] if steps[at - 1].opname in _TWO else steps[at - 2 : at]
        names = {name for operand in operands for name in _names(operand)}
        if names and not names <= given and all(operand.opname in (*_LOCAL, "CALL") for operand in operands):
            return step.positions.lineno if step.positions is not None else None
    return None


def _names(step: dis.Instruction) -> tuple[str, ...]:
    if step.opname not in _LOCAL:
        return ()
    return step.argval if isinstance(step.argval, tuple) else (step.argval,)
