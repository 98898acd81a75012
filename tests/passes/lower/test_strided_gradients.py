"""strided_gradients: strided depthwise gradients in bfloat16 come from a float32 kernel, with the values of before."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from octav_fx.ir.printer import graph_text
from octav_fx.passes import strided_gradients
from tests.support.joint import joint, lower

HALF = torch.bfloat16


def convolved(**options: Any) -> Any:
    return lambda x, w: (F.conv2d(x * 2, w, **options),)


def whole(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    """Few whole numbers, whose sums of products are exact."""
    return torch.randint(-3, 4, shape).to(dtype).requires_grad_()


def test_golden() -> None:
    gm = joint(convolved(stride=2, padding=1, groups=4), whole(2, 4, 6, 6), whole(4, 1, 3, 3))
    assert [(edit.verb, edit.detail) for edit in lower(gm, strided_gradients)] == [("strided gradient", "[2, 4, 6, 6]")]
    assert graph_text(gm.graph) == (
        "mul = mul.Tensor(primals_1, 2)\n"
        "convolution = convolution.default(mul, primals_2, None, [2, 2], [1, 1], [1, 1], False, [0, 0], 4)\n"
        "convert_element_type_default = convert_element_type.default(tangents_1, torch.float32)\n"
        "convert_element_type_default_1 = convert_element_type.default(primals_2, torch.float32)\n"
        "convolution_default = convolution.default(convert_element_type_default, convert_element_type_default_1, None, "
        "[2, 2], [1, 1], [1, 1], True, [1, 1], 4)\n"
        "convert_element_type_default_2 = convert_element_type.default(convolution_default, torch.bfloat16)\n"
        "convolution_backward = convolution_backward.default(tangents_1, mul, primals_2, [0], [2, 2], [1, 1], [1, 1], "
        "False, [0, 0], 4, [False, True, False])\n"
        "getitem_1 = getitem(convolution_backward, 1)\n"
        "mul_1 = mul.Tensor(convert_element_type_default_2, 2)\n"
        "return [convolution, mul_1, getitem_1]"
    )
    assert lower(gm, strided_gradients) == []


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "padding": 1},
        {"stride": (1, 2)},
        {"stride": 3, "padding": (2, 1)},
        {"stride": 2, "padding": 2, "dilation": 2},
    ],
)
@pytest.mark.parametrize("size", [(7, 6), (8, 9)])
def test_numbers(options: dict[str, Any], layout: torch.memory_format, size: tuple[int, int]) -> None:
    x, w = whole(2, 4, *size).detach().to(memory_format=layout).requires_grad_(), whole(8, 1, 3, 3)
    # Two output channels for each input channel are not depthwise to oneDNN's kernels, one is.
    for filters, is_slow in ((w, False), (w[:4].detach().requires_grad_(), True)):
        gm = joint(convolved(**options, groups=4), x, filters)
        (tangent,) = (node for node in gm.graph.find_nodes(op="placeholder") if "tangents" in str(node.target))
        gradient = torch.randint(-9, 9, tangent.meta["val"].shape).to(HALF)
        expected = gm(x, filters, gradient)
        assert len(lower(gm, strided_gradients)) == is_slow
        for found, other in zip(gm(x, filters, gradient), expected, strict=True):
            assert torch.equal(found, other)
            assert found.dtype is HALF


def test_where_nobody_asks_for_the_weights_gradient_no_call_is_left() -> None:
    gm = joint(convolved(stride=2, groups=4), whole(2, 4, 6, 6), whole(4, 1, 3, 3).detach())
    assert len(lower(gm, strided_gradients)) == 1
    assert "convolution_backward" not in graph_text(gm.graph)


@pytest.mark.parametrize(
    ("dtype", "stride", "groups"), [(torch.float32, 2, 4), (HALF, 1, 4), (HALF, 2, 1), (torch.float16, 2, 4)]
)
def test_others_stay(dtype: torch.dtype, stride: int, groups: int) -> None:
    gm = joint(
        convolved(stride=stride, groups=groups),
        whole(2, 4, 6, 6, dtype=dtype),
        whole(4, 4 // groups, 3, 3, dtype=dtype),
    )
    assert lower(gm, strided_gradients) == []
