"""FSDP2 over the blocks of a quantized model: two gloo ranks, each with the same batch, are one process."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from octav_fx import Config, quantize
from tests.support import ranks
from tests.support.blocks import WIDTH, Net

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
