"""Where in the user's files the Python interpreter is."""

import ast
import functools
import itertools
import linecache
import os
import sys
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any, Final

import torch
from torch import nn

from octav_fx.capture.contents import CLOSED

TORCH: Final = str(Path(torch.__file__).parent) + os.sep
# What takes text for a reader.
_TELLERS: Final = frozenset(
    {
        *("warn", "debug", "info", "warning", "warning_once", "warn_once", "error", "exception", "critical"),
        *("log", "_assert", "_check"),
    }
)
_HERE: Final = str(Path(__file__).parent.parent) + os.sep


def caller() -> str:
    """Return file:line of the nearest frame outside of fx and this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_code.co_filename
        if not name.startswith((_HERE, TORCH + "fx")):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def is_users(frame: FrameType) -> bool:
    """Tell whether a frame runs neither torch's code nor ours."""
    return is_users_code(frame.f_code)


def is_users_code(code: CodeType) -> bool:
    """Tell whether code is neither torch's nor ours."""
    return not code.co_filename.startswith((_HERE, TORCH))


def user_frame() -> FrameType:
    """Return the nearest frame that is the user's code."""
    frame = sys._getframe(1)
    while frame.f_back is not None and not is_users(frame):
        frame = frame.f_back
    return frame


def user_caller() -> str:
    """Return file:line of the nearest frame that is the user's code."""
    frame = user_frame()
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def told_by(frame: FrameType) -> str | None:
    """Return what tells a reader what a frame computes now: "print", "raise", the name of what logs; else None.

    Not in a raise that the function itself may catch, nor in a call of the user's own functions.
    """
    line, _, column, _ = _position(frame)
    if line is None or column is None:
        return None
    for n in _tellers(frame.f_code.co_filename):
        if (n.lineno, n.col_offset) <= (line, column) < (n.end_lineno, n.end_col_offset):
            if isinstance(n, ast.Raise):
                return "raise"
            if not _is_users_function(_found(n.func, frame)):
                return _name_of(n.func)
    return None


def _is_users_function(function: Any) -> bool:
    if isinstance(owner := getattr(function, "__self__", None), nn.Module):
        return True
    is_free = isinstance(function, FunctionType) and owner is None
    return is_free and (function.__module__ or "").partition(".")[0] not in CLOSED


def called_by(frame: FrameType) -> Any:
    """Return the function that a frame calls now, if that stands under a name; else None."""
    call = _calls(frame.f_code.co_filename).get(_position(frame))
    return None if call is None else _found(call.func, frame)


def _found(expression: ast.expr, frame: FrameType) -> Any:
    match expression:
        case ast.Name(id=name):
            return frame.f_locals.get(name, frame.f_globals.get(name))
        case ast.Attribute(value=holder, attr=name):
            return getattr(_found(holder, frame), name, None)
    return None


def _position(frame: FrameType) -> tuple[int | None, int | None, int | None, int | None]:
    """Return where in its file the present instruction of a frame stands: line, last line, column, last column."""
    return next(itertools.islice(frame.f_code.co_positions(), frame.f_lasti // 2, None))


@functools.cache
def _nodes(file: str) -> list[ast.AST]:
    try:
        return [*ast.walk(ast.parse("".join(linecache.getlines(file))))]
    except (SyntaxError, ValueError):
        return []


@functools.cache
def _tellers(file: str) -> list[Any]:
    """Return what does nothing but tell in a file: where nobody takes its result, log() may be that of math, too."""
    nodes = _nodes(file)
    caught = {n for tried in nodes if isinstance(tried, ast.Try) for part in tried.body for n in ast.walk(part)}
    raised = [n for n in nodes if isinstance(n, ast.Raise) and n not in caught]
    printed = [n for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "print"]
    calls = [n.value for n in nodes if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)]
    return [*raised, *printed, *(call for call in calls if _name_of(call.func) in _TELLERS)]


@functools.cache
def _calls(file: str) -> dict[Any, ast.Call]:
    calls = (n for n in _nodes(file) if isinstance(n, ast.Call))
    return {(n.lineno, n.end_lineno, n.col_offset, n.end_col_offset): n for n in calls}


def _name_of(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def user_line(error: BaseException) -> str:
    """Return file:line of the innermost frame of a traceback that is the user's code."""
    line = "?"
    trace = error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if not name.startswith((_HERE, TORCH)):
            line = f"{name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return line
