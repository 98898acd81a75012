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


def rows(arguments: list[str], seconds: float, take: Callable[[dict[str, Any]], None]) -> str | None:
    """Hand every line of JSON that `python -m ARGUMENTS` prints to take; return why it stopped early, or None."""
    begun = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            # Its own group: compilers that it started must end with it.
            start_new_session=True,
        )
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=_read, args=(process, lines), daemon=True).start()
        try:
            while (line := lines.get(timeout=max(0.0, seconds - (time.monotonic() - begun)))) is not None:
                if line.startswith("{"):
                    take(json.loads(line))
        except queue.Empty:
            return f"over {seconds:.0f} s"
        finally:
            _end(process)
        if process.returncode == 0:
            return None
        errors.seek(0)
        said = [text for text in errors.read().splitlines() if text.strip()]
        return f"exit {process.returncode}: {said[-1] if said else ''}"


def _read(process: subprocess.Popen[str], lines: "queue.SimpleQueue[str | None]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    process.wait()
    lines.put(None)


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
