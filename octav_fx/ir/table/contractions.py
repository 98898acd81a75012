"""Matrix multiplications and convolutions: the ops whose operands are quantized.

Channel axis: one clip for each index, of weights. Reduction axis: products are summed over it.
"""

import operator
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional as F

from octav_fx.compat.modules import padding_of
from octav_fx.compat.tensors import TORCH_GROUPED_MM
from octav_fx.ir.op import MakeCall, Op, Trait, activation, either, parameters, weight
from octav_fx.ops.grouped_mm.op import grouped_product

aten = torch.ops.aten

_CONVOLUTION: Final = frozenset({Trait.FIRST_LAYER, Trait.FEEDS_NORM})
_TRANSPOSED: Final = _CONVOLUTION | {Trait.TRANSPOSED}
_FULLY_CONNECTED: Final = frozenset({Trait.LAST_LAYER, Trait.FEEDS_NORM})

# [out, in / groups, ...]
_FILTERS: Final = (activation(0, "input", reduction=1), weight(1, "weight", channel=0, reduction=1))
# [in, out / groups, ...]: channel j of every group shares a clip.
_TRANSPOSED_FILTERS: Final = (activation(0, "input", reduction=1), weight(1, "weight", channel=1, reduction=0))

_CONVOLUTION_PARAMETERS: Final = parameters("input", "weight", bias=None, stride=1, padding=0, dilation=1, groups=1)
_TRANSPOSED_PARAMETERS: Final = parameters(
    "input", "weight", bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
)


def _linear(layer: Any, make_call: MakeCall, x: Any) -> tuple[Any, ...]:
    return x, layer.weight, layer.bias


def _convolution(conv: Any, make_call: MakeCall, x: Any) -> tuple[Any, ...]:
    weight, bias, padding = conv.weight, conv.bias, conv.padding
    if conv.padding_mode != "zeros":
        # The padded value differs from x, so it is what the quantizer has to see.
        x = make_call(F.pad, x, padding_of(conv), mode=conv.padding_mode)
        padding = (0,) * len(conv.kernel_size)
    return x, weight, bias, conv.stride, padding, conv.dilation, conv.groups


def _transposed(conv: Any, make_call: MakeCall, x: Any) -> tuple[Any, ...]:
    return x, conv.weight, conv.bias, conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation


ATTENTION: Final = Op(
    "attention",
    # The softmax output inside of a fused attention stays float; the mask is not an operand. The product with value
    # sums over the sequence: its tokens and groups lie along it, and later positions count in a clip, as they do in one
    # for the tensor.
    (
        activation(0, "query", reduction=-1),
        activation(1, "key", reduction=-1),
        activation(2, "value", reduction=-2),
    ),
    target=F.scaled_dot_product_attention,
    functions=(aten.scaled_dot_product_attention.default,),
    parameters=parameters(
        *("query", "key", "value"), attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ),
)

CONTRACTIONS: Final = (
    Op(
        "conv1d",
        _FILTERS,
        target=F.conv1d,
        functions=(aten.conv1d.default,),
        modules=(nn.Conv1d,),
        parameters=_CONVOLUTION_PARAMETERS,
        call_of=_convolution,
        traits=_CONVOLUTION,
        spatial=1,
    ),
    Op(
        "conv2d",
        _FILTERS,
        target=F.conv2d,
        functions=(aten.conv2d.default,),
        modules=(nn.Conv2d,),
        parameters=_CONVOLUTION_PARAMETERS,
        call_of=_convolution,
        traits=_CONVOLUTION,
        spatial=2,
    ),
    Op(
        "conv3d",
        _FILTERS,
        target=F.conv3d,
        functions=(aten.conv3d.default,),
        modules=(nn.Conv3d,),
        parameters=_CONVOLUTION_PARAMETERS,
        call_of=_convolution,
        traits=_CONVOLUTION,
        spatial=3,
    ),
    Op(
        "conv_transpose1d",
        _TRANSPOSED_FILTERS,
        target=F.conv_transpose1d,
        functions=(aten.conv_transpose1d.default,),
        modules=(nn.ConvTranspose1d,),
        parameters=_TRANSPOSED_PARAMETERS,
        call_of=_transposed,
        traits=_TRANSPOSED,
        spatial=1,
    ),
    Op(
        "conv_transpose2d",
        _TRANSPOSED_FILTERS,
        target=F.conv_transpose2d,
        functions=(aten.conv_transpose2d.input,),
        modules=(nn.ConvTranspose2d,),
        parameters=_TRANSPOSED_PARAMETERS,
        call_of=_transposed,
        traits=_TRANSPOSED,
        spatial=2,
    ),
    Op(
        "conv_transpose3d",
        _TRANSPOSED_FILTERS,
        target=F.conv_transpose3d,
        functions=(aten.conv_transpose3d.input,),
        modules=(nn.ConvTranspose3d,),
        parameters=_TRANSPOSED_PARAMETERS,
        call_of=_transposed,
        traits=_TRANSPOSED,
        spatial=3,
    ),
    Op(
        "linear",
        (activation(0, "input", reduction=-1), weight(1, "weight", channel=0, reduction=-1)),
        target=F.linear,
        functions=(aten.linear.default,),
        modules=(nn.Linear,),
        parameters=parameters("input", "weight", bias=None),
        call_of=_linear,
        traits=_FULLY_CONNECTED,
    ),
    Op(
        "bilinear",
        # The weight is [out, in1, in2], and summed over in1 as well.
        (
            activation(0, "input1", reduction=-1),
            activation(1, "input2", reduction=-1),
            weight(2, "weight", channel=0, reduction=-1),
        ),
        target=F.bilinear,
        functions=(aten.bilinear.default,),
        modules=(nn.Bilinear,),
        parameters=parameters("input1", "input2", "weight", bias=None),
        call_of=lambda layer, make_call, x, y: (x, y, layer.weight, layer.bias),
        traits=frozenset({Trait.LAST_LAYER}),
    ),
    Op(
        "conv_tbc",
        # Time first: [T, B, in] with filters [K, in, out].
        (activation(0, "input", reduction=2), weight(1, "weight", channel=2, reduction=1)),
        target=F.conv_tbc,
        functions=(aten.conv_tbc.default,),
        parameters=parameters("input", "weight", "bias", pad=0),
        traits=frozenset({Trait.FIRST_LAYER}),
    ),
    Op(
        "matmul",
        (
            either(0, "input", -2, reduction=-1),
            either(1, "other", -1, "mat2", "vec", "tensor", reduction=-2),
        ),
        target=torch.matmul,
        functions=(
            *(operator.matmul, operator.imatmul, torch.mm, torch.bmm, torch.mv, torch.dot, torch.linalg.matmul),
            *(aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default),
        ),
        methods=("matmul", "mm", "bmm", "mv", "dot", "__matmul__", "__imatmul__"),
    ),
    Op(
        "addmm",
        (either(1, "mat1", -2, reduction=-1), either(2, "mat2", -1, reduction=-2)),
        target=torch.addmm,
        functions=(aten.addmm.default,),
        methods=("addmm",),
        parameters=parameters("input", "mat1", "mat2", beta=1, alpha=1),
    ),
    Op(
        "addmv",
        (either(1, "mat", -2, reduction=-1), either(2, "vec", None)),
        target=torch.addmv,
        functions=(aten.addmv.default,),
        methods=("addmv",),
        parameters=parameters("input", "mat", "vec", beta=1, alpha=1),
    ),
    Op(
        "addbmm",
        (either(1, "batch1", -2, reduction=-1), either(2, "batch2", -1, reduction=-2)),
        target=torch.addbmm,
        functions=(aten.addbmm.default,),
        methods=("addbmm",),
        parameters=parameters("input", "batch1", "batch2", beta=1, alpha=1),
    ),
    Op(
        "baddbmm",
        (either(1, "batch1", -2, reduction=-1), either(2, "batch2", -1, reduction=-2)),
        target=torch.baddbmm,
        functions=(aten.baddbmm.default,),
        methods=("baddbmm",),
        parameters=parameters("input", "batch1", "batch2", beta=1, alpha=1),
    ),
    Op(
        "grouped_mm",
        # [rows, in] sorted by expert times [experts, in, out]: channel j of every expert shares a clip.
        (either(0, "mat_a", -2, "input", reduction=-1), either(1, "mat_b", -1, "mat2", reduction=-2)),
        target=grouped_product,
        functions=(F.grouped_mm, TORCH_GROUPED_MM, aten._grouped_mm.default),
        parameters=parameters("mat_a", "mat_b", offs=None, bias=None, out_dtype=None),
    ),
    Op(
        "einsum",
        # The equation names no output-channel axis that every operand has.
        (either(1, "operand", None),),
        variadic=True,
        target=torch.einsum,
        functions=(torch.functional.einsum,),
    ),
    ATTENTION,
)
