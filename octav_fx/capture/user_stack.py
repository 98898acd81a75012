"""Where in the user's files the Python interpreter is."""

import ast
import functools
import itertools
import linecache
import os
import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Final

import torch

TORCH: Final = str(Path(torch.__file__).parent) + os.sep
# What takes text for a reader.
_TELLERS: Final = frozenset(
    {
        *("print", "warn", "debug", "info", "warning", "warning_once", "warn_once", "error", "exception", "critical"),
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


def is_told(frame: FrameType) -> bool:
    """Tell whether what a frame computes now is for a reader: in a call of print(), of a logger, or in a raise."""
    position = next(itertools.islice(frame.f_code.co_positions(), frame.f_lasti // 2, None))
    line, _, column, _ = position
    if line is None or column is None:
        return False
    return any(start <= (line, column) < end for start, end in _places_of_told(frame.f_code.co_filename))


@functools.cache
def _places_of_told(file: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return where in a file text for a reader is made: begin and end, as line and column."""
    try:
        nodes = [*ast.walk(ast.parse("".join(linecache.getlines(file))))]
    except (SyntaxError, ValueError):
        return []
    told = [
        node
        for node in nodes
        if isinstance(node, ast.Raise) or (isinstance(node, ast.Call) and _name_of(node.func) in _TELLERS)
    ]
    return [((n.lineno, n.col_offset), (n.end_lineno or 0, n.end_col_offset or 0)) for n in told]


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
