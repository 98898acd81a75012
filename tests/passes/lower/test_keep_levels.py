"""keep_levels: backward finds the levels of activations, and computes what it did."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy

from octav_fx.ir.printer import graph_text
from octav_fx.passes import keep_levels, lower_passes, mask_from_codes, save_codes, split_quantizers
from tests.support.joint import joint, kept, layer_inputs, leaf, linear, lower, quantized, unchanged, weight

octav = torch.ops.octav
BEFORE = (split_quantizers, save_codes, mask_from_codes)


def test_golden() -> None:
    gm = joint(linear(), *layer_inputs())
    lower(gm, *BEFORE)
    text = graph_text(gm.graph)
    assert [(edit.verb, edit.detail) for edit in lower(gm, keep_levels)] == [("keep levels", "for backward")]
    # What is kept is no matter of the graph, but of the partitioner.
    assert graph_text(gm.graph) == text
    (levels,) = gm.graph.find_nodes(op="call_function", target=octav.dequantize.default)
    assert levels.meta["recompute"] is CheckpointPolicy.MUST_SAVE
    assert lower(gm, keep_levels) == []


def test_levels_are_kept_beside_their_codes() -> None:
    inputs = layer_inputs()
    with_codes, with_levels = joint(linear(), *inputs), joint(linear(), *inputs)
    lower(with_codes, *BEFORE)
    unchanged(with_levels, inputs, *BEFORE, keep_levels)
    assert set(kept(with_codes)) == {"quantize_default", "optimal_clip_default"}
    assert set(kept(with_levels)) == {"quantize_default", "dequantize_default"}


def test_levels_of_a_weight_are_computed_again() -> None:
    def of_weight(x: Tensor, w: Tensor, hint: Tensor) -> tuple[Tensor]:
        return (F.linear(x.sin(), weight(w, hint)),)

    gm = joint(of_weight, leaf(7, 30), leaf(4, 30), torch.ones(4))
    lower(gm, *BEFORE)
    assert lower(gm, keep_levels) == []


def test_views_of_levels_are_made_of_what_is_kept() -> None:
    inputs = (leaf(4, 5, 6), leaf(3, 6), torch.ones(()))
    gm = joint(lambda x, w, hint: (F.linear(quantized(x.sin(), hint).transpose(0, 1), w),), *inputs)
    unchanged(gm, inputs, *BEFORE, keep_levels)
    assert set(kept(gm)) == {"quantize_default", "dequantize_default"}


def test_it_runs_where_it_is_asked_for() -> None:
    assert keep_levels not in lower_passes()
    assert keep_levels in lower_passes(keep="levels")
