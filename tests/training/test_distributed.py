"""DistributedDataParallel around a quantized module: two processes, gloo."""

import copy

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import octav_fx
from octav_fx import OctavError, float_mode, quantize
from tests.support.nets import ConvNet as Net
from tests.support.ranks import RANKS, same_everywhere, spawn


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
