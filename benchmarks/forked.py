"""A measurement in a process of its own that inherits what is imported: importing takes longer than most models."""

import math
import multiprocessing
import resource
import signal
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import Any

Column = tuple[str, Any]

# Seconds of the clock for one of CPU time, which other processes of the machine take from it.
_PATIENCE = 5


def columns(measure: Callable[..., Iterable[Column]], argument: Any, limit: float) -> dict[str, Any]:
    """The columns that measure(argument) yields in limit seconds of CPU time; "stopped" says why some are missing."""
    # Of one that only waits.
    deadline = time.monotonic() + _PATIENCE * limit
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_send, args=(measure, argument, limit, sender))
    process.start()
    # The child has its own end; with this one open there would be no end of file.
    sender.close()
    found: dict[str, Any] = {}
    try:
        while receiver.poll(max(0.0, deadline - time.monotonic())):
            name, value = receiver.recv()
            found[name] = value
        found["stopped"] = f"waits after {_last(found)}"
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGXCPU:
            found["stopped"] = f"over {limit:g} s after {_last(found)}"
        elif process.exitcode:
            found["stopped"] = f"exit {process.exitcode} after {_last(found)}"
    finally:
        process.kill()
        process.join()
        receiver.close()
    return found


def _last(found: dict[str, Any]) -> str:
    return next(reversed(found), "the start")


def _send(measure: Callable[..., Iterable[Column]], argument: Any, limit: float, sender: Connection) -> None:
    # What the parent has used does not count.
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit), resource.RLIM_INFINITY))
    for column in measure(argument):
        sender.send(column)
    sender.close()
