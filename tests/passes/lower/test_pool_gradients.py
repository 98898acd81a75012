"""pool_gradients: the gradient of a max pool by torch's own kernel, with the values of before."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch.nn import functional as F

import octav_fx.compat.inductor  # noqa: F401  what decomposes a max pool asks Inductor's lowerings
from octav_fx.ir.printer import graph_text
from octav_fx.passes import pool_gradients
from tests.support.joint import joint, leaf, lower

octav = torch.ops.octav

pytestmark = pytest.mark.skipif(
    torch.ops.aten.max_pool2d_with_indices_backward.default not in select_decomp_table(),
    reason="torch 2.11 keeps its own kernel in the graph",
)


def pooled(*window: Any, **options: Any) -> Any:
    return lambda x: (F.max_pool2d(x.sin(), *window, **options) * 2,)


def test_golden() -> None:
    gm = joint(pooled(3, 2, 1), leaf(2, 4, 6, 6))
    assert [(edit.verb, edit.detail) for edit in lower(gm, pool_gradients)] == [("pool gradient", "[2, 4, 6, 6]")]
    assert graph_text(gm.graph).splitlines()[-4:] == [
        "max_pool_gradient_default = max_pool_gradient.default(mul_1, _low_memory_max_pool_offsets_to_indices, "
        "[2, 4, 6, 6], [3, 3], [2, 2], [1, 1], [1, 1], False)",
        "cos = cos.default(primals_1)",
        "mul_2 = mul.Tensor(max_pool_gradient_default, cos)",
        "return [mul, mul_2]",
    ]
    assert lower(gm, pool_gradients) == []


@pytest.mark.parametrize("window", [(3, 2, 1), (2,), (3, 1, 0, 1), ((3, 2), (1, 2)), (2, 2, 0, 1, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_numbers(window: tuple, dtype: torch.dtype, layout: torch.memory_format) -> None:
    # Whole numbers and few of them: windows share maxima, and sums of gradients are exact.
    x = torch.randint(-3, 4, (2, 4, 7, 6)).to(dtype).to(memory_format=layout).requires_grad_()
    gm = joint(lambda x: (F.max_pool2d(x * 2, *window),), x)
    gradient = torch.randint(-9, 9, gm.graph.find_nodes(op="placeholder")[1].meta["val"].shape).to(dtype)
    expected = gm(x, gradient)
    assert len(lower(gm, pool_gradients)) == 1
    for found, other in zip(gm(x, gradient), expected, strict=True):
        assert torch.equal(found, other)


def test_what_is_written_lies_as_the_gradient_does() -> None:
    y, indices = F.max_pool2d(torch.randn(2, 4, 6, 6), 2, return_indices=True)
    arguments = [2, 4, 6, 6], [2, 2], [2, 2], [0, 0], [1, 1], False
    expected = octav.max_pool_gradient(y, indices, *arguments)
    grad = y.to(memory_format=torch.channels_last)
    found = octav.max_pool_gradient(grad, indices, *arguments)
    assert torch.equal(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_other_scatters_stay() -> None:
    def scattered(x: Tensor, index: Tensor) -> tuple[Tensor]:
        return (torch.zeros(2, 9).scatter_add(1, index, x.sin()).view(2, 3, 3) * 2,)

    gm = joint(scattered, leaf(2, 4), torch.randint(0, 9, (2, 4)))
    assert lower(gm, pool_gradients) == []
