"""What a long quantize() is doing: a line on a terminal, beyond two seconds."""

import importlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

# So long nothing is shown, in seconds.
_DELAY: Final = 2.0
_present: ContextVar[Any] = ContextVar("progress", default=None)


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Show the steps inside on stderr where that is a terminal: a bar of tqdm where it is installed, else a line."""
    try:
        # disable=None: nothing is shown where stderr is no terminal.
        bar = importlib.import_module("tqdm").tqdm(desc=what, delay=_DELAY, disable=None, leave=False, unit=" steps")
    except ModuleNotFoundError:
        bar = _Line(what)
    token = _present.set(bar)
    try:
        yield
    finally:
        _present.reset(token)
        bar.close()


def step(doing: str, path: str) -> None:
    """Say what is done next, and to which module."""
    if (bar := _present.get()) is not None:
        bar.set_postfix_str(f"{doing} {path or 'the model'}", refresh=False)
        bar.update()


class _Line:
    """What is shown without tqdm."""

    def __init__(self, what: str) -> None:
        self.what, self.started, self.doing, self.width = what, time.monotonic(), "", 0

    def set_postfix_str(self, doing: str, refresh: bool) -> None:
        """Say what is done next."""
        self.doing = doing

    def update(self) -> None:
        """Write the line again."""
        seconds = time.monotonic() - self.started
        if seconds >= _DELAY and sys.stderr.isatty():
            self._write(f"{self.what}: {seconds:.0f} s, {self.doing}")

    def close(self) -> None:
        """Take the line away."""
        if self.width:
            self._write("")

    def _write(self, text: str) -> None:
        sys.stderr.write(f"\r{text:<{self.width}}\r")
        sys.stderr.flush()
        self.width = len(text)
