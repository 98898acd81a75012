"""A process with a limit of time, whose lines are read as they come: what it had found by then is not lost."""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

# What a process prints that is prepared; it goes on when it gets a line.
READY = "ready"


class Worker:
    """`python -m ARGUMENTS`, which prints a line of JSON for each row."""

    def __init__(self, arguments: list[str]) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed by end
        self._process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            # Its own group: compilers that it started must end with it.
            start_new_session=True,
        )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def rows(self, seconds: float, take: Callable[[dict[str, Any]], None]) -> str | None:
        """Hand every row to take; return why it stopped early, or None. The process has ended then."""
        begun = time.monotonic()
        try:
            while (line := self._line(seconds - (time.monotonic() - begun))) is not None:
                if line.startswith("{"):
                    take(json.loads(line))
        except queue.Empty:
            return f"over {seconds:.0f} s"
        finally:
            self.end()
        if self._process.returncode == 0:
            return None
        self._errors.seek(0)
        said = [text for text in self._errors.read().splitlines() if text.strip()]
        return f"exit {self._process.returncode}: {said[-1] if said else ''}"

    def wait(self, seconds: float) -> None:
        """Wait until the process is ready, or has ended, or for so many seconds."""
        begun = time.monotonic()
        try:
            while (line := self._line(seconds - (time.monotonic() - begun))) is not None:
                if line.strip() == READY:
                    return
            self._lines.put(None)
        except queue.Empty:
            return

    def go_on(self) -> None:
        """Let a process go on that is ready."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            # It has ended; rows() says why.
            return

    def _line(self, seconds: float) -> str | None:
        return self._lines.get(timeout=max(0.0, seconds))

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._process.wait()
        self._lines.put(None)

    def end(self) -> None:
        """End the process, and what it started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
