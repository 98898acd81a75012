"""Text: the source of Python's own standard library, as bytes."""

import functools
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from benchmarks.study.data import Batch, generator

SYMBOLS: Final = 256
# Folders that are not the library itself, or that are tests of it.
_LEFT_OUT: Final = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
# One file in so many is for testing.
_TEST_SHARE: Final = 10
_TEST_BATCH: Final = 32


def files() -> tuple[list[Path], list[Path]]:
    """Return the files for training and those for testing, chosen by a hash of the relative path alone."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in sorted(root.rglob("*.py")) if not _LEFT_OUT & set(path.relative_to(root).parts)]
    train: list[Path] = []
    test: list[Path] = []
    for path in paths:
        (test if is_test(path.relative_to(root).as_posix()) else train).append(path)
    return train, test


def is_test(relative: str) -> bool:
    """Return whether a file is for testing."""
    return hashlib.sha256(relative.encode()).digest()[0] * _TEST_SHARE < 256


@functools.cache
def joined() -> tuple[Tensor, Tensor]:
    """Return the bytes of the training files one after another, and of the test files; uint8."""
    train, test = (b"\0".join(path.read_bytes() for path in paths) for paths in files())
    return torch.frombuffer(bytearray(train), dtype=torch.uint8), torch.frombuffer(bytearray(test), dtype=torch.uint8)


class Text:
    """Bytes [N, length] and the bytes that follow each of them [N, length], as int64."""

    def __init__(self, seed: int, batch: int, length: int, windows: int) -> None:
        """windows: how many stretches of the test files are read, evenly spaced."""
        self.seed, self.size, self.length = seed, batch, length
        self.train_bytes, test_bytes = joined()
        starts = torch.linspace(0, len(test_bytes) - length - 1, windows).long()
        self.windows = _stretches(test_bytes, starts, length)

    def batch(self, step: int) -> Batch:
        """Draw stretches that begin anywhere."""
        last = len(self.train_bytes) - self.length
        starts = torch.randint(last, (self.size,), generator=generator(2, self.seed, step))
        stretches = _stretches(self.train_bytes, starts, self.length)
        return stretches[:, :-1], stretches[:, 1:]

    def test(self) -> Iterator[Batch]:
        """Return the windows."""
        for stretches in self.windows.split(_TEST_BATCH):
            yield stretches[:, :-1], stretches[:, 1:]


def _stretches(data: Tensor, starts: Tensor, length: int) -> Tensor:
    """Return [N, length + 1]: the inputs, and the targets one further."""
    return data[starts.unsqueeze(1) + torch.arange(length + 1)].long()
