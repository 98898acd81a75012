"""quantize(blocks=): each block a graph of its own, called as a module by the user's Python, with one table of all."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import octav_fx
from octav_fx import Config, OctavError, quantize
from octav_fx.capture.modules import WholeModule, graphs_of
from octav_fx.capture.partial import PartialModule
from tests.support.blocks import WIDTH, Block, Net, batch, saved_bytes
from tests.support.on_grid import OnGrid

WAYS: list[Any] = ["auto", [Block], ["blocks.0", "blocks.1", "blocks.2"]]


@pytest.mark.parametrize("blocks", WAYS, ids=["auto", "class", "names"])
def test_each_block_is_one_graph_inside_the_users_python(blocks: Any) -> None:
    model, x = Net(), batch()
    q = quantize(model, x, blocks=blocks)
    assert isinstance(q, Net) and isinstance(q, PartialModule) and not isinstance(q, WholeModule)
    for block in q.blocks:
        assert isinstance(block, Block) and isinstance(block, WholeModule)
        assert [name for name, _ in block.named_children()] == ["norm", "up", "down", "quantizers"]
    assert list(q.state_dict()) == list(model.state_dict()) and q.tied.weight is q.head.weight
    with octav_fx.float_mode(q):
        assert torch.equal(q(x), model(x))


@pytest.mark.parametrize("training", [False, True])
def test_operands_are_quantized_as_in_the_whole_model(training: bool) -> None:
    torch.manual_seed(3)
    model, x = Net().train(training), batch()
    parts, whole = quantize(model, x, blocks="auto"), quantize(model, x, blocks=())
    assert isinstance(whole, WholeModule)
    found = [
        {(row.node, row.operand): (row.op, row.bits, row.signed, row.clip, row.macs, row.share) for row in rows}
        for rows in map(octav_fx.rows, (parts, whole))
    ]
    # The sign of what the first block takes is known, and the last layer is the last of the model: blocks are no edges.
    assert found[0] == found[1] and {bits for _, bits, *_ in found[0].values()} == {4, 8}
    assert octav_fx.coverage(parts) == octav_fx.coverage(whole)
    assert torch.equal(parts(x), whole(x))
    for q in (parts, whole):
        q(x).square().sum().backward()
    for (name, ours), theirs in zip(parts.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name


def test_methods_of_the_model_are_quantized() -> None:
    q, x = quantize(Net(), batch(), Config(2, 2, edge_bits=None), blocks="auto"), batch()
    with OnGrid(2) as seen:
        y = q.forward_features(x)
    assert (seen.checked, seen.off_grid) == (7, [])
    assert torch.equal(q.tied(q.head(y)), q(x))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))], ids=["deepcopy", "pickle"])
def test_calibrate_freeze_convert_and_copies_go_over_all_blocks(again: Any) -> None:
    q, x = quantize(Net(), batch(), blocks="auto").eval(), batch()
    octav_fx.freeze(octav_fx.calibrate(q, [x, batch(3)]))
    assert torch.equal(again(q)(x), q(x))
    converted = octav_fx.convert(q)
    # Sums of codes round in another order than sums of levels: a code at a tie may differ.
    assert (converted(x) - q(x)).abs().max() < 0.2 * q(x).abs().max()
    octav_fx.unfreeze(q)
    assert torch.equal(again(q)(x), q(x))


@pytest.mark.parametrize("when", ["before", "after", "blocks by default"])
def test_blocks_are_recomputed_as_in_float(when: str) -> None:
    # Many tokens: what quantizers keep of weights outside of the blocks is little beside them.
    model, x = Net(depth=6), torch.randn(8, 64, WIDTH)
    if when != "after":
        model.set_grad_checkpointing()
    q = quantize(model, x) if when == "blocks by default" else quantize(model, x, blocks="auto")
    assert all(isinstance(block, WholeModule) for block in q.blocks)
    plain = saved_bytes(q.eval(), x, q)
    q.train().set_grad_checkpointing()
    model.set_grad_checkpointing()
    kept, of_float = saved_bytes(q, x, q), saved_bytes(model, x, model)
    assert kept < plain / 3
    q(x).sum().backward()
    recomputed = {name: p.grad.clone() for name, p in q.named_parameters()}
    q.zero_grad()
    q.set_grad_checkpointing(False)
    q(x).sum().backward()
    assert all(torch.equal(p.grad, recomputed[name]) for name, p in q.named_parameters())
    assert kept <= 1.2 * of_float + 3 * 4 * 8 * 64 * WIDTH


def test_checkpointing_around_the_model() -> None:
    q, x = quantize(Net(), batch(), blocks="auto"), batch()
    y = checkpoint(q, x, use_reentrant=False)
    assert torch.equal(y, q(x))
    y.sum().backward()
    assert all(p.grad is not None for p in q.parameters())


def test_hooks_on_blocks_fire() -> None:
    q, x = quantize(Net(), batch(), blocks="auto"), batch()
    seen: list[str] = []
    for i, block in enumerate(q.blocks):
        block.register_forward_pre_hook(lambda m, args, i=i: seen.append(f"before {i}"))
        block.register_forward_hook(lambda m, args, y, i=i: seen.append(f"after {i}"))
        block.register_full_backward_hook(lambda m, g, h, i=i: seen.append(f"backward {i}"))
    q(x).sum().backward()
    assert seen == [
        *("before 0", "after 0", "before 1", "after 1", "before 2", "after 2"),
        *("backward 2", "backward 1", "backward 0"),
    ]
    with pytest.raises(OctavError, match="up of Block would never run this hook"):
        q.blocks[0].up.register_forward_hook(lambda *_: None)


def test_a_layer_by_itself_is_no_edge_of_a_network() -> None:
    x = torch.randn(2, 8)
    assert {row.bits for row in octav_fx.rows(quantize(nn.Linear(8, 8), x))} == {4}
    assert {row.bits for row in octav_fx.rows(quantize(nn.Sequential(nn.Linear(8, 8)), x))} == {8}


def test_partial_freezing() -> None:
    model = Net()
    for p in model.blocks[0].parameters():
        p.requires_grad_(False)
    q = quantize(model, batch(), blocks="auto")
    q(batch()).sum().backward()
    assert {name.split(".")[1] for name, p in q.named_parameters() if p.grad is None} == {"0"}


class TestRefusals:
    def test_what_is_no_block(self) -> None:
        with pytest.raises(OctavError, match=r"blocks: 'layers' is no module of it; Net has blocks, blocks\.0"):
            quantize(Net(), batch(), blocks=["layers"])
        with pytest.raises(OctavError, match="is the model itself"):
            quantize(Net(), batch(), blocks=[Net])
        with pytest.raises(OctavError, match=r'blocks=\'blocks\': "auto", or a list'):
            quantize(Net(), batch(), blocks="blocks")
        with pytest.raises(OctavError, match="blocks: 3 is no name and no class of modules"):
            quantize(Net(), batch(), blocks=[3])  # type: ignore[list-item]


def test_the_model_stays_one_graph_without_blocks() -> None:
    assert graphs_of(quantize(Net(), batch())) is not None


@pytest.mark.compile
def test_equal_blocks_are_compiled_once() -> None:
    x = batch()
    # More blocks than Dynamo compiles one function anew for.
    q = quantize(Net(depth=10), x, blocks="auto")
    expected = q(x)
    counter = CompileCounterWithBackend("aot_eager")
    for block in q.blocks:
        block.compile(backend=counter)
    assert torch.equal(q(x), expected) and counter.frame_count == 1
