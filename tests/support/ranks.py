"""Several processes that train together over gloo."""

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

RANKS = 2


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def spawn(worker, *args) -> None:
    mp.spawn(_start, (worker, free_port(), *args), nprocs=RANKS)


def _start(rank: int, worker, port: int, *args) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    try:
        worker(rank, *args)
        # The first to leave would take its connections away from the other, which gloo answers with an abort.
        dist.barrier()
    finally:
        dist.destroy_process_group()
    # A thread of gloo that asks for the interpreter while that shuts down is unwound through C++: an abort.
    os._exit(0)


def same_everywhere(value: Tensor) -> bool:
    gathered = [torch.empty_like(value) for _ in range(RANKS)]
    dist.all_gather(gathered, value.contiguous())
    return all(torch.equal(other, value) for other in gathered)
