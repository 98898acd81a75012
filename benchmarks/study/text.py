"""Text: the source of Python's own standard library, as bytes."""

import functools
import hashlib
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from benchmarks.study.data import TEST, Batch, generator

SYMBOLS: Final = 256
# Folders that are not the library itself, or that are tests of it.
_LEFT_OUT: Final = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
# One file in so many is for testing, and one for validation.
_SHARE: Final = 10
_TEST_BATCH: Final = 32


def files(judged: str = TEST) -> tuple[list[Path], list[Path]]:
    """Return the files for training and those to judge by, chosen by a hash of the relative path alone."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in sorted(root.rglob("*.py")) if not _LEFT_OUT & set(path.relative_to(root).parts)]
    train, test = _apart(paths, lambda path: is_test(path.relative_to(root).as_posix()))
    if judged == TEST:
        return train, test
    return _apart(train, lambda path: is_validation(path.relative_to(root).as_posix()))


def is_test(relative: str) -> bool:
    """Return whether a file is for testing."""
    return hashlib.sha256(relative.encode()).digest()[0] * _SHARE < 256


def is_validation(relative: str) -> bool:
    """Return whether a file that is not for testing is for validation."""
    return hashlib.sha256(relative.encode()).digest()[1] * _SHARE < 256


@functools.cache
def joined(judged: str = TEST) -> tuple[Tensor, Tensor]:
    """Return the bytes of the training files one after another, and of those to judge by; uint8."""
    train, test = (b"\0".join(path.read_bytes() for path in paths) for paths in files(judged))
    return torch.frombuffer(bytearray(train), dtype=torch.uint8), torch.frombuffer(bytearray(test), dtype=torch.uint8)


def _apart(paths: list[Path], chosen: Callable[[Path], bool]) -> tuple[list[Path], list[Path]]:
    """Return those that are not chosen, and those that are."""
    return [path for path in paths if not chosen(path)], [path for path in paths if chosen(path)]


class Text:
    """Bytes [N, length] and the bytes that follow each of them [N, length], as int64."""

    def __init__(self, seed: int, batch: int, length: int, windows: int, judged: str = TEST) -> None:
        """windows: how many stretches of the files to judge by are read, evenly spaced."""
        self.seed, self.size, self.length = seed, batch, length
        self.train_bytes, test_bytes = joined(judged)
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
