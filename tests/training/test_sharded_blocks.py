"""The blocks of a quantized model on two gloo ranks: sharded by FSDP2, in the stages of a pipeline."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from octav_fx import Config, OctavError, quantize
from tests.support import ranks
from tests.support.blocks import WIDTH, Block, Net

pytestmark = pytest.mark.ranks

STEPS = 20


def losses(q: nn.Module, batches: list[Tensor]) -> list[float]:
    optimizer, found = torch.optim.SGD(q.parameters(), lr=0.05), []
    for x in batches:
        optimizer.zero_grad()
        loss = (q(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def made() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(5)
    model = Net()
    # Sharded tensors of their own: a shared one is in the unit of the root either way.
    model.tied = nn.Linear(WIDTH, WIDTH, bias=False)
    batches = [torch.randn(4, 5, WIDTH) for _ in range(STEPS)]
    return quantize(model, batches[0], Config(), blocks="auto"), batches


def sharded(rank: int, expected: list[float]) -> None:
    from torch.distributed.fsdp import fully_shard

    q, batches = made()
    most = 0
    for block in q.blocks:
        fully_shard(block)
    fully_shard(q)

    def count(*_: Any) -> None:
        nonlocal most
        whole = sum(p.numel() for p in q.parameters() if not isinstance(p, DTensor))
        most = max(most, whole)

    for block in q.blocks:
        # Called by the graph of the block, while its parameters are gathered.
        block.norm.register_forward_hook(count)
    found = losses(q, batches)
    # Two gradients of one batch are summed and halved, which is exact.
    assert found == expected
    total = sum(p.numel() for p in q.parameters())
    assert 0 < most < total
    for module in (q, *q.blocks):
        module.reshard()
    assert all(isinstance(p, DTensor) for p in q.parameters())


def test_sharding_each_block_trains_as_one_process() -> None:
    q, batches = made()
    ranks.spawn(sharded, losses(q, batches))


def staged(rank: int, blocks: nn.Sequential, x: Tensor, expected: list[Tensor]) -> None:
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    # Slices are modules of the user's Python, over the very blocks.
    part = blocks[:2] if rank == 0 else blocks[2:]
    stage = PipelineStage(part, rank, 2, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, 2, loss_fn=lambda y, target: (y - target).square().mean())
    if rank == 0:
        schedule.step(x)
    else:
        schedule.step(target=x)
    own = [p.grad for p in part.parameters()]
    wanted = expected[: len(own)] if rank == 0 else expected[-len(own) :]
    assert all(torch.equal(g, w) for g, w in zip(own, wanted, strict=True))


def test_stages_of_a_pipeline_are_slices_of_blocks() -> None:
    torch.manual_seed(5)
    model, x = nn.Sequential(*(Block() for _ in range(4))), torch.randn(4, 5, WIDTH)
    q = quantize(model, x, blocks=[Block])
    one = quantize(model, x, blocks=[Block])
    # Two parts of a batch, each with the clips of its own; the schedule scales the sum of gradients by a half.
    for part in x.chunk(2):
        (one(part) - part).square().mean().backward()
    ranks.spawn(staged, q, x, [p.grad / 2 for p in one.parameters()])


def parallelized(rank: int, q: nn.Module) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh, plan = init_device_mesh("cpu", (2,)), {"up": ColwiseParallel()}
    with pytest.raises(OctavError, match="up of Block would never run this hook: the graph around it calls no such"):
        parallelize_module(q.blocks[0], mesh, plan)
    block, x = Block(), torch.randn(4, 5, WIDTH)
    with pytest.raises(OctavError, match="weight of Linear is sharded by tensor parallelism, which no graph runs"):
        parallelize_module(quantize(block, x, blocks=[nn.Linear]), mesh, plan)
    with pytest.raises(OctavError, match=r"up\.weight is a DTensor: quantize the module first"):
        quantize(parallelize_module(block, mesh, plan), x)


def test_tensor_parallelism_is_refused_before_and_after() -> None:
    ranks.spawn(parallelized, made()[0])
