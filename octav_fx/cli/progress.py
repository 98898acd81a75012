"""Telling what takes long: on standard error, so that what a command prints can be piped."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

# Seconds until a stage is mentioned.
PATIENCE: Final = 2.0
_SPINNER: Final = "|/-\\"


@contextmanager
def stage(title: str, patience: float = PATIENCE) -> Iterator[None]:
    """Name what is going on inside once it has taken patience seconds; in a terminal with the time, until it ends."""
    ended = threading.Event()
    teller = threading.Thread(target=_tell, args=(title, patience, ended), daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()


def _tell(title: str, patience: float, ended: threading.Event) -> None:
    start = time.monotonic()
    if ended.wait(patience):
        return
    if not sys.stderr.isatty():
        print(f"octav-fx: {title} ...", file=sys.stderr, flush=True)
        return
    turns = 0
    while not ended.wait(0.25):
        turn, seconds = _SPINNER[turns % len(_SPINNER)], time.monotonic() - start
        print(f"\r{turn} {title}, {seconds:.0f} s", end="", file=sys.stderr, flush=True)
        turns += 1
    # The line is for what comes next.
    print("\r\x1b[K", end="", file=sys.stderr, flush=True)
