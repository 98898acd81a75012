"""Processes that train together over gloo, kept from test to test: starting them takes longer than most tests."""

import atexit
import functools
import multiprocessing as mp
import pickle
import shutil
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

RANKS = 2


@dataclass(frozen=True)
class Rank:
    """A process that runs what it is sent, and answers with a traceback, or None."""

    process: BaseProcess
    connection: Connection


def spawn(worker: Callable[..., None], *args: Any) -> None:
    """Call worker(rank, *args) in each process; fail with the first traceback."""
    ranks = _started()
    for rank in ranks:
        rank.connection.send_bytes(pickle.dumps((worker, args)))
    waiting = {rank.connection: rank for rank in ranks}
    while waiting:
        for connection in wait(list(waiting)):
            failure = _answer(waiting.pop(connection))
            if failure is not None:
                _end()
                raise AssertionError(failure)


def _answer(rank: Rank) -> str | None:
    try:
        answer: str | None = rank.connection.recv()
    except EOFError:
        rank.process.join()
        return f"a rank ended with {rank.process.exitcode}"
    return answer


@functools.cache
def _started() -> list[Rank]:
    context, store = mp.get_context("spawn"), tempfile.mkdtemp()
    atexit.register(shutil.rmtree, store, ignore_errors=True)
    ranks = []
    for number in range(RANKS):
        here, there = context.Pipe()
        # They end with this process.
        process = context.Process(target=_serve, args=(number, f"{store}/store", there), daemon=True)
        process.start()
        # With this end open a rank that dies would not be noticed.
        there.close()
        ranks.append(Rank(process, here))
    return ranks


def _end() -> None:
    """End the processes: one that waits for another, which failed, waits for good."""
    for rank in _started():
        rank.process.kill()
        rank.process.join()
    _started.cache_clear()


def _serve(rank: int, store: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    # By a file: a port that was free may be taken by another test by now.
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    while True:
        worker, args = pickle.loads(connection.recv_bytes())
        torch.compiler.reset()
        torch.manual_seed(0)
        try:
            worker(rank, *args)
        except Exception:
            connection.send(f"rank {rank}:\n{traceback.format_exc()}")
        else:
            connection.send(None)


def same_everywhere(value: Tensor) -> bool:
    gathered = [torch.empty_like(value) for _ in range(RANKS)]
    dist.all_gather(gathered, value.contiguous())
    return all(torch.equal(other, value) for other in gathered)
