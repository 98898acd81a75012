"""Hooks of transformers on modules that a graph holds: what they are for is done by the graph, or refused in time."""

import copy

import pytest
import torch
from torch import nn

import octav_fx
from octav_fx import OctavError
from octav_fx.capture.whole import WholeModule
from tests.support.blocks import WIDTH, Net, batch

capturing = pytest.importorskip("transformers.utils.output_capturing")


@pytest.mark.parametrize("before", [True, False])
def test_a_recorder_inside_of_a_graph_is_refused_when_it_is_asked(before: bool) -> None:
    model = Net()
    if before:
        capturing.install_output_capuring_hook(model.blocks[0].up, "attentions", 1)
    q = octav_fx.quantize(model, batch(), blocks="auto")
    if not before:
        for block in q.blocks:
            # Two of one key are one refusal.
            for layer in (block.up, block.down):
                capturing.install_output_capuring_hook(layer, "attentions", 1)
            assert len(block._forward_pre_hooks) == 1
    assert isinstance(q.blocks[0], WholeModule)
    for each in (q, copy.deepcopy(q)):
        for wanted in (None, {}, {"hidden_states": []}):
            token = capturing._active_collector.set(wanted)
            assert torch.equal(each(batch() * 0), q(batch() * 0))
            capturing._active_collector.reset(token)
        token = capturing._active_collector.set({"attentions": []})
        with pytest.raises(OctavError, match=r"up of Block is part of a graph, which hands no attentions out: give"):
            each(batch())
        with octav_fx.float_mode(each):
            each(batch())
        capturing._active_collector.reset(token)


def test_a_recorder_on_a_block_records() -> None:
    model, seen = Net(), {"hidden_states": []}
    q = octav_fx.quantize(model, batch(), blocks="auto")
    for block in q.blocks:
        capturing.install_output_capuring_hook(block, "hidden_states", 0)
    token = capturing._active_collector.set(seen)
    q(batch())
    capturing._active_collector.reset(token)
    # The first block's input, and what each returns.
    assert len(seen["hidden_states"]) == 1 + len(q.blocks)


def test_gradients_are_asked_of_what_the_graph_returns() -> None:
    def make_inputs_require_grads(module: nn.Module, given: object, output: torch.Tensor) -> None:
        output.requires_grad_(True)

    make_inputs_require_grads.__module__ = "transformers.modeling_utils"
    q = octav_fx.quantize(Net(), batch(), blocks="auto").requires_grad_(False)
    q.blocks[0].up.register_forward_hook(make_inputs_require_grads)
    assert q.blocks[0](torch.randn(2, WIDTH)).requires_grad and not q.blocks[1](torch.randn(2, WIDTH)).requires_grad


def test_a_frozen_model_with_recorders_computes_its_integers() -> None:
    q = octav_fx.quantize(Net(), batch(), octav_fx.Config(4, 4), blocks="auto").eval()
    octav_fx.freeze(octav_fx.calibrate(q, [batch()]))
    # What SegFormer has from its first call on.
    for block in q.blocks:
        capturing.install_output_capuring_hook(block.up, "attentions", 1)
    x = batch(64)
    for block, defined in zip(q.blocks, octav_fx.convert(q, integers=False).blocks, strict=True):
        assert torch.equal(block(x), defined(x))
        # The graph itself rounds otherwise.
        assert not torch.equal(block(x), block.simulated_forward(x))
