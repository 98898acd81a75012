"""OCTAV_FX_DUMP=folder: each run of passes as text files, the graph before and after each pass, for people to compare.

    folder/000/00-canonicalize.before.txt
    folder/000/00-canonicalize.after.txt
    folder/000/summary.txt                    a line for each pass, and below it its edits

A run takes the next free number, so that several processes may write into one folder.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import fx

from octav_fx.ir.edits import Edit
from octav_fx.ir.printer import graph_text


class Dump:
    """The files of one run."""

    def __init__(self, folder: Path) -> None:
        self._folder = _numbered(folder)
        self._count = 0

    @contextmanager
    def of(self, name: str, graph: fx.Graph) -> Iterator[list[Edit]]:
        """Write the graph before and after what happens inside; the caller adds the pass's edits to the list."""
        stem = f"{self._count:02d}-{name}"
        self._count += 1
        (self._folder / f"{stem}.before.txt").write_text(graph_text(graph) + "\n")
        edits: list[Edit] = []
        outcome, start = "failed", time.perf_counter()
        try:
            yield edits
            outcome = f"{len(edits)} edits"
        finally:
            milliseconds = (time.perf_counter() - start) * 1000
            (self._folder / f"{stem}.after.txt").write_text(graph_text(graph) + "\n")
            with (self._folder / "summary.txt").open("a") as summary:
                summary.write(f"{stem:<32} {milliseconds:9.1f} ms  {outcome}\n{_table(edits)}")


def requested() -> Dump | None:
    """Return where the next run is written to, if the environment names a folder."""
    folder = os.environ.get("OCTAV_FX_DUMP")
    return Dump(Path(folder)) if folder else None


def _numbered(folder: Path) -> Path:
    """Make the first subfolder whose number is free."""
    folder.mkdir(parents=True, exist_ok=True)
    number = sum(1 for entry in folder.iterdir() if entry.name.isdigit())
    while True:
        try:
            (path := folder / f"{number:03d}").mkdir()
            return path
        except FileExistsError:
            number += 1


def _table(edits: Sequence[Edit]) -> str:
    """Return a line for each edit: node, operand, verb, detail."""
    return "".join(f"    {edit.node:<32} {edit.operand or '':<12} {edit.verb:<16} {edit.detail}\n" for edit in edits)
