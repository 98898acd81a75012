"""Where in the user's files the Python interpreter is."""

import os
import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Final

import torch

TORCH: Final = str(Path(torch.__file__).parent) + os.sep
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
