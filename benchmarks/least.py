"""The least time of a call: whatever disturbs a call makes it longer."""

import time
from collections.abc import Callable


def least_time(run: Callable[[], object], rounds: int = 30, clock: Callable[[], float] = time.thread_time) -> float:
    """Return the least time of some calls, in seconds; by default that of this thread alone."""
    times = []
    for _ in range(rounds):
        start = clock()
        run()
        times.append(clock() - start)
    return min(times)
