"""What matmuls of codes took on GPUs that they were measured on: measured.json, which ./dev gpu kernels writes."""

import functools
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

FILE: Final = Path(__file__).with_name("measured.json")


@dataclass(frozen=True, slots=True)
class Measured:
    """A matmul [m, k] times [k, n] of codes: its time over that of one in bfloat16, by what holds the codes."""

    m: int
    n: int
    k: int
    int8: float
    # None where the GPU does not add up float8 exactly.
    float8: float | None = None

    def distance(self, m: int, n: int, k: int) -> float:
        """Return how unlike these sizes are: the sum of factors between them, in powers of two."""
        return sum(abs(math.log2(a / b)) for a, b in ((self.m, m), (self.n, n), (self.k, k)))


def nearest(gpu: str, m: int, n: int, k: int) -> Measured | None:
    """Return what was measured for sizes most like these on a GPU of this name; None if nothing was."""
    return min(_table().get(gpu, ()), key=lambda row: row.distance(m, n, k), default=None)


def write(gpu: str, rows: Iterable[Measured]) -> None:
    """Put the rows of a GPU into the file, in place of what was there of it."""
    found = {name: list(map(asdict, of)) for name, of in _table().items()} | {gpu: list(map(asdict, rows))}
    FILE.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    _table.cache_clear()


@functools.cache
def _table() -> dict[str, tuple[Measured, ...]]:
    return {gpu: tuple(Measured(**row) for row in rows) for gpu, rows in json.loads(FILE.read_text()).items()}
