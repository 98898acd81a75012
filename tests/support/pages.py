"""Running the pages of the documentation: what their code prints has to be what stands below it.

    ```python          runs; blocks of a page share one namespace
    ```text            right behind it: what it prints
    ```console         lines "$ octav-fx ..." run, and what they print stands below each

"..." stands for anything, as in doctest. python -m tests.support.pages FILE... writes what is printed into the pages.
"""

import contextlib
import doctest
import io
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octav_fx.__main__ import main as octav_fx_command

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))

_FENCE = re.compile(r"^```(python|text|console)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Printed:
    """What stands in a page, from start to end of its text, and what was printed."""

    start: int
    end: int
    expected: str
    found: str

    @property
    def agrees(self) -> bool:
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        return doctest.OutputChecker().check_output(self.expected, self.found, flags)


def run(text: str) -> list[Printed]:
    """Run the code of a page, from top to bottom."""
    namespace: dict[str, Any] = {"__name__": "page"}
    results: list[Printed] = []
    printed, behind = "", -1
    for fence in _FENCE.finditer(text):
        kind, body = fence[1], fence[2]
        if kind == "python":
            printed, behind = _output(lambda body=body: exec(compile(body, "page", "exec"), namespace)), fence.end()
        elif kind == "text" and text[behind : fence.start()].strip() == "" and behind >= 0:
            results.append(Printed(fence.start(2), fence.end(2), body, printed))
            behind = -1
        elif kind == "console":
            results += _console(fence.start(2), body)
    return results


def _console(start: int, body: str) -> list[Printed]:
    results = []
    for part in re.finditer(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", body, re.MULTILINE):
        words = shlex.split(part[1])
        if words[0] == "octav-fx":
            found = _output(lambda words=words: octav_fx_command(words[1:]))
            results.append(Printed(start + part.start(2), start + part.end(2), part[2], found))
    return results


def _output(action: Any) -> str:
    output = io.StringIO()
    # What a command tells of its progress depends on the machine.
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(io.StringIO()):
        action()
    return "\n".join(line.rstrip() for line in output.getvalue().strip("\n").splitlines()) + "\n"


def main() -> None:
    for path in map(Path, sys.argv[1:]):
        text = path.read_text()
        for printed in reversed(run(text)):
            if not printed.agrees:
                text = text[: printed.start] + printed.found + text[printed.end :]
        path.write_text(text)


if __name__ == "__main__":
    main()
