"""save_pooled_codes: backward keeps bytes of what was pooled, and computes what it did."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy

import octav_fx.compat.inductor  # noqa: F401  what decomposes a max pool asks Inductor's lowerings
from octav_fx.ir.printer import graph_text
from octav_fx.passes import mask_from_codes, save_codes, save_pooled_codes, split_quantizers
from tests.support.joint import joint, kept, leaf, lower, quantized, tagged, unchanged

SAVE = (split_quantizers, save_codes, mask_from_codes)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return leaf(2, 3, 8, 8), leaf(4, 3, 1, 1), torch.ones(())


def pooled(x: Tensor, w: Tensor, hint: Tensor) -> tuple[Tensor]:
    return (F.conv2d(F.max_pool2d(quantized(x.sin(), hint), 3, 1, 1), w),)


def test_golden_pool() -> None:
    gm = joint(pooled, *inputs())
    lower(gm, *SAVE)
    assert [edit.verb for edit in unchanged(gm, inputs(), save_pooled_codes)] == ["save codes"]
    text = graph_text(gm.graph)
    assert (
        "getitem_2 = getitem(_low_memory_max_pool_with_offsets, 0)\n"
        "quantize_default_1 = quantize.default(getitem_2, optimal_clip_default, 'int4/tensor', None)\n"
        "dequantize_default_1 = "
        "dequantize.default(quantize_default_1, optimal_clip_default, 'int4/tensor', torch.float32)\n"
    ) in text
    assert "convolution = convolution.default(dequantize_default_1, primals_2, " in text
    assert tagged(gm)["dequantize_default_1"] is CheckpointPolicy.MUST_RECOMPUTE
    assert lower(gm, save_pooled_codes) == []


def test_backward_keeps_bytes_of_what_is_pooled() -> None:
    def pooled_twice(x: Tensor, w: Tensor, hint: Tensor) -> tuple[Tensor]:
        y = F.max_pool2d(quantized(x.sin(), hint), 3, 1, 1)
        return (F.conv2d(y, w).sum() + F.conv2d(F.max_pool2d(y, 2), w).sum(),)

    for function, count in ((pooled, 1), (pooled_twice, 2)):
        gm = joint(function, *inputs())
        lower(gm, *SAVE)
        assert len(unchanged(gm, inputs(), save_pooled_codes)) == count
        # x is an input; offsets of pools are bytes, too.
        assert {name for name, dtype in kept(gm).items() if dtype is torch.float32} == {"optimal_clip_default"}


def test_what_no_backward_reads_stays() -> None:
    gm = joint(lambda x, w, hint: (F.max_pool2d(quantized(x.sin(), hint), 2).sum() * w.sum(),), *inputs())
    lower(gm, *SAVE)
    assert lower(gm, save_pooled_codes) == []
    gm = joint(pooled, *(value.detach() for value in inputs()), trace_joint=False)
    lower(gm, *SAVE)
    assert lower(gm, save_pooled_codes) == []
