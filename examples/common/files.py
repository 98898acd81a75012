"""Files that are there as a whole or not at all, whenever the process is killed."""

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def write(path: Path, make: Callable[[Path], Any]) -> None:
    """Let make(place) write a file at another place, and move it to path in one step."""
    place = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        make(place)
        os.replace(place, path)
    finally:
        place.unlink(missing_ok=True)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a CSV with a column for each key of any row; a row without it leaves its cell empty."""

    def make(place: Path) -> None:
        with place.open("w", newline="") as file:
            columns = dict.fromkeys(name for row in rows for name in row)
            writer = csv.DictWriter(file, list(columns), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    write(path, make)
