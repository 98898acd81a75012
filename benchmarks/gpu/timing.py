"""Medians of device time."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

WARM_UP = 5


def median_ms(run: Callable[[], Any], device: str, repeats: int = 30) -> float:
    """Milliseconds of one run by CUDA events; on a CPU, where nothing is measured but this code, by its clock."""
    for _ in range(WARM_UP):
        run()
    times: list[float] = []
    if device == "cpu":
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda.synchronize()
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


@contextmanager
def peak_memory(device: str) -> Iterator[list[float]]:
    """A list that gets the most MB that were allocated at once inside, beside nothing on a CPU."""
    found: list[float] = []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    yield found
    found.append(round(torch.cuda.max_memory_allocated() / 1e6, 1) if device == "cuda" else 0.0)
