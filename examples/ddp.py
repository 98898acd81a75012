"""Train a quantized model on several processes, and go on where they were killed.

torchrun --nproc-per-node=2 examples/ddp.py OUT

The same command again goes on from OUT/checkpoint.pt to the same weights.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import octav_fx

BATCH = 16


def net() -> nn.Sequential:
    """Return any module of yours: images [N, 3, 32, 32] -> logits [N, 10]."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )


def batch_of(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return images and labels in place of your data: others on each rank, and the same whenever they are asked for."""
    random = torch.Generator().manual_seed(1000 * step + rank)
    labels = torch.randint(10, (BATCH,), generator=random)
    return torch.randn(BATCH, 3, 32, 32, generator=random) + labels.view(-1, 1, 1, 1), labels


def save(path: Path, q: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write a checkpoint. Every rank calls this; the first one writes."""
    # Parameters are the same on all ranks. What the quantizers remember is each rank's own.
    extra: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(extra, octav_fx.state(q))
    if dist.get_rank() == 0:
        values = {"model": q.state_dict(), "optimizer": optimizer.state_dict(), "extra": extra, "step": step}
        # Written beside, then moved: whoever is killed meanwhile leaves the old one.
        torch.save(values, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)


def load(path: Path, q: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bring this rank to where save() found it; return the steps that were done."""
    values = torch.load(path, map_location="cpu", weights_only=True)
    # "model" has the keys of the float model, which loads it with strict=True.
    q.load_state_dict(values["model"])
    octav_fx.load_state(q, values["extra"][dist.get_rank()])
    optimizer.load_state_dict(values["optimizer"])
    return int(values["step"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Train to a step; every process that torchrun starts calls this."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args(arguments)

    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank = dist.get_rank()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # The same parameters on every rank. A clip is found anew for each tensor, so that quantizers need no seed.
    torch.manual_seed(0)
    model = net().to(device)
    # A rank finds the clips of the activations that it holds. sync_clip=True: of the activations of all ranks, as
    # SyncBatchNorm does with statistics.
    q = octav_fx.quantize(model, batch_of(0, rank)[0].to(device), octav_fx.Config(sync_clip=True))
    # The quantized module goes inside of DistributedDataParallel; compiled, torch.compile(q, backend="octav") does.
    ddp = DistributedDataParallel(q)
    optimizer = torch.optim.AdamW(octav_fx.param_groups(q, 0.01), lr=2e-3)

    path = options.out / "checkpoint.pt"
    done = load(path, q, optimizer) if path.exists() else 0
    options.out.mkdir(parents=True, exist_ok=True)
    for step in range(done, options.steps):
        images, labels = (tensor.to(device) for tensor in batch_of(step, rank))
        optimizer.zero_grad()
        loss = F.cross_entropy(ddp(images), labels)
        loss.backward()
        optimizer.step()
        if (step + 1) % 10 == 0 or step + 1 == options.steps:
            save(path, q, optimizer, step + 1)
            if rank == 0:
                print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)

    # The first to leave would take its connections away from the others.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
