"""mask_in_place: gradients between matmuls and attention are masked where they lie."""

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from octav_fx.ir.printer import graph_text
from octav_fx.passes import mask_from_codes, mask_in_place, save_codes, split_quantizers
from tests.support.joint import after_relu, joint, layer_inputs, leaf, linear, lower, quantized, unchanged

octav = torch.ops.octav
on_cpu = functools.partial(mask_in_place, device="cpu")
SAVE = (split_quantizers, save_codes)


def test_golden() -> None:
    gm = joint(linear(), *layer_inputs())
    lower(gm, *SAVE)
    assert [(edit.node, edit.verb, edit.detail) for edit in lower(gm, on_cpu)] == [("mm", "mask in place", "mm_3")]
    assert (
        graph_text(gm.graph)
        .partition("mm_3 = ")[2]
        .startswith(
            "mm.default(tangents_1, permute_3)\n"
            "permute_4 = permute.default(permute_2, [1, 0])\n"
            "auto_functionalized = auto_functionalized(<OpOverload(op='octav.zero_clipped_', overload='default')>, "
            "grad=mm_3, codes=quantize_default, low=-8, high=7)\n"
            "getitem_2 = getitem(auto_functionalized, 1)\n"
            "permute_5 = permute.default(primals_1, [1, 0])\n"
            "mm_4 = mm.default(permute_5, getitem_2)\n"
        )
    )


def attention(x: Tensor, u: Tensor, w: Tensor, hint: Tensor) -> tuple[Tensor]:
    """Return attention of one quantized projection, 5 tokens of 3 heads, and what follows it."""
    heads = quantized((x @ u).unflatten(1, (3, 10)).transpose(0, 1).unsqueeze(0), hint)
    mixed = F.scaled_dot_product_attention(heads, heads, heads)
    return (F.linear(quantized(mixed.squeeze(0).transpose(0, 1).flatten(1), hint), w),)


def test_masks_are_those_of_before() -> None:
    for function in (linear(), linear(signed=False), linear(bits=8), attention):
        inputs = layer_inputs()
        gm = joint(function, *inputs)
        assert "mask in place" in {edit.verb for edit in unchanged(gm, inputs, *SAVE, on_cpu)}
        assert lower(gm, on_cpu) == []


def test_what_a_pointwise_kernel_makes_or_reads_is_left_to_it() -> None:
    def scaled(x: Tensor, u: Tensor, w: Tensor, hint: Tensor) -> tuple[Tensor]:
        return (F.linear(quantized(x @ u, hint) * 2, w),)

    for function in (after_relu, scaled, linear(gradient="mad"), linear(gradient="ste")):
        gm = joint(function, *layer_inputs())
        lower(gm, *SAVE)
        assert lower(gm, on_cpu) == []


def test_a_ceiling_has_codes_that_are_none_of_the_grid() -> None:
    def clamped(x: Tensor, w: Tensor, hint: Tensor) -> tuple[Tensor]:
        return (F.linear(quantized(F.relu6(x), hint, signed=False), w),)

    gm = joint(clamped, leaf(7, 30), leaf(4, 30), torch.ones(()))
    lower(gm, *SAVE)
    assert lower(gm, on_cpu) == []


def test_a_cpu_keeps_masks() -> None:
    gm = joint(linear(), *layer_inputs())
    lower(gm, *SAVE)
    assert lower(gm, mask_in_place) == []
    assert lower(gm, mask_from_codes)
