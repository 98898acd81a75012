"""DistributedDataParallel around a quantized module: two processes, gloo."""

import copy
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import octav_fx
from octav_fx import OctavError, float_mode, quantize
from tests.support.nets import ConvNet as Net

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


def same_everywhere(value: Tensor) -> bool:
    gathered = [torch.empty_like(value) for _ in range(RANKS)]
    dist.all_gather(gathered, value.contiguous())
    return all(torch.equal(other, value) for other in gathered)


def train(rank: int, static_graph: bool, broadcast_buffers: bool) -> None:
    torch.manual_seed(0)
    model, batches = Net(), torch.randn(2, RANKS, 4, 3, 8, 8)
    # Other examples, so other hints, on each rank: a hint decides nothing.
    q = quantize(model, batches[0, rank])
    expected = copy.deepcopy(q)
    wrapped = DistributedDataParallel(q, static_graph=static_graph, broadcast_buffers=broadcast_buffers)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
    for batch in batches:
        optimizer.zero_grad()
        wrapped(batch[rank]).square().mean().backward()
        for name, p in q.named_parameters():
            assert same_everywhere(p.grad), name
        optimizer.step()
        for name, p in q.named_parameters():
            assert same_everywhere(p.detach()), name
    # The first step by hand: the mean of what each rank computes alone.
    alone = []
    for x in batches[0]:
        expected.zero_grad()
        module = copy.deepcopy(expected)
        module(x).square().mean().backward()
        alone.append([p.grad for p in module.parameters()])
    q.load_state_dict(model.state_dict())
    wrapped.zero_grad()
    wrapped(batches[0][rank]).square().mean().backward()
    for p, one, two in zip(q.parameters(), *alone, strict=True):
        # DDP divides before it adds.
        torch.testing.assert_close(p.grad, (one + two) / 2, rtol=1e-5, atol=1e-7)


@pytest.mark.ranks
@pytest.mark.parametrize(("static_graph", "broadcast_buffers"), [(False, True), (True, False)])
def test_two_steps_on_two_ranks(static_graph, broadcast_buffers):
    spawn(train, static_graph, broadcast_buffers)


def look(rank: int) -> None:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(4, 3, 8, 8)
    q = quantize(model, x)
    text = octav_fx.table(q)
    wrapped = DistributedDataParallel(q)
    with float_mode(wrapped):
        assert torch.equal(wrapped(x), model(x))
    assert not torch.equal(wrapped(x), model(x))
    assert octav_fx.table(wrapped) == text
    assert octav_fx.coverage(wrapped) == octav_fx.coverage(q)
    with pytest.raises(OctavError, match=r"wrap it in DistributedDataParallel afterwards: pass model\.module"):
        quantize(DistributedDataParallel(model), x)
    with pytest.raises(OctavError, match="quantized already"):
        quantize(wrapped.module, x)


@pytest.mark.ranks
def test_float_mode_tables_and_refusals_see_through_the_wrapper():
    spawn(look)
