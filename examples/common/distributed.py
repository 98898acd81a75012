"""The processes of torchrun: their group, a model for them, and sums over them."""

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from octav_fx import OctavError

PARALLEL: Final = ("ddp", "fsdp2")
# How torch calls sending the buffers at each step: newer releases warn of the old name.
_SYNC_BUFFERS: Final = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)
# Primes: seed, step and rank give seeds that do not meet.
_PRIMES: Final = (1_000_003, 10_007)


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those of the run."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print it once, not on every rank."""
        if self.is_first:
            print(text, flush=True)


@contextmanager
def process_group(device: str | None = None) -> Iterator[Ranks]:
    """Join the processes that torchrun started, or stand alone where it did not; use the group that there is already.

    device: "cpu" or "cuda"; None: CUDA where there is one, a GPU for each local rank. NCCL on GPUs, gloo on CPUs.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    place = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if dist.is_initialized():
        # Who made it ends it.
        yield Ranks(dist.get_rank(), dist.get_world_size(), place)
        return
    backend = "nccl" if place.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        # Port 0 is any that is free.
        dist.init_process_group(backend, init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), place)
        # The first to leave would take its connections away from the others, which gloo answers with an abort.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed what a step draws, dropout for one, so that a resumed run draws what the whole one does."""
    torch.manual_seed((seed * _PRIMES[0] + step) * _PRIMES[1] + rank)


def parallelize(q: nn.Module, parallel: str, ranks: Ranks, *, compiled: bool = False) -> nn.Module:
    """Return what to call in place of q: DistributedDataParallel around it, or q itself, sharded in place by FSDP2.

    All ranks begin with rank 0's parameters and buffers. q's names stay, so q is what is saved and evaluated; call only
    what is returned. Buffers are not sent at each step, as DDP would: a batch norm in train mode does not read its own,
    and share_buffers() sends rank 0's before anything reads them.

    FSDP2 takes the whole model as one unit. Parameters, gradients and the optimizer's state are sharded between the
    steps; inside a step all parameters are there at once.
    """
    if parallel not in PARALLEL:
        raise OctavError(f"parallel={parallel!r}: one of {', '.join(PARALLEL)}")
    if sharded := [name for name, module in q.named_modules() if isinstance(module, FSDPModule)]:
        raise OctavError(
            f"{sharded[0] or 'the model'} is sharded already: rank 0 cannot send its parameters; leave out fully_shard"
        )
    scalars = [name for name, parameter in q.named_parameters() if not parameter.dim()]
    if parallel == "fsdp2" and scalars:
        raise OctavError(
            f"{scalars[0]} [] is a parameter of one number, which FSDP2 cannot shard (the learned clip of a whole "
            "tensor is one): use --parallel ddp"
        )
    # Before sharding: FSDP2 takes of each parameter the share of this rank as it stands.
    for value in (*q.parameters(), *q.buffers()):
        dist.broadcast(value.detach(), 0)
    if parallel == "fsdp2":
        fully_shard(q, mesh=init_device_mesh(ranks.device.type, (ranks.world,)))
    called: nn.Module = torch.compile(q, backend="octav") if compiled else q  # type: ignore[assignment]
    if parallel == "ddp":
        # The compiled module inside: DDP would cut its graph into buckets.
        devices = [ranks.device] if ranks.device.type == "cuda" else None
        options: dict[str, Any] = {"device_ids": devices, _SYNC_BUFFERS: False}
        return DistributedDataParallel(called, **options)
    return called


def share_buffers(q: nn.Module) -> None:
    """Give every rank rank 0's persistent buffers: the statistics of batch norm. Hints stay each rank's own."""
    kept = q.state_dict()
    for name, value in q.named_buffers():
        if name in kept:
            dist.broadcast(value, 0)


def summed(value: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks."""
    total = value.clone()
    dist.all_reduce(total)
    return total
