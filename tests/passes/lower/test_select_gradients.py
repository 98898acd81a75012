"""select_gradients: gradients of parts of a tensor are read where they lie, with the values of before."""

import functools
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import octav_fx
from benchmarks.absent_gpu import generated
from octav_fx.ir.printer import graph_text
from octav_fx.passes import select_gradients
from tests.support.joint import joint, leaf, lower, unchanged

on_cpu = functools.partial(select_gradients, device="cpu")


def product(x: Tensor) -> tuple[Tensor]:
    """The first and the last part of x, of which each has a gradient of its own."""
    return (x[0] * x[-1],)


def test_golden() -> None:
    gm = joint(product, leaf(2, 3))
    assert [(edit.verb, edit.detail) for edit in lower(gm, on_cpu)] == [("select gradient", "[2, 3]")] * 2
    zeros = "full.default([2, 3], 0, dtype=torch.float32, layout=torch.strided, device=device(type='cpu'), "
    assert graph_text(gm.graph) == (
        "select = select.int(primals_1, 0, 0)\n"
        "select_1 = select.int(primals_1, 0, -1)\n"
        "mul = mul.Tensor(select, select_1)\n"
        "mul_1 = mul.Tensor(tangents_1, select)\n"
        "mul_2 = mul.Tensor(tangents_1, select_1)\n"
        f"full = {zeros}pin_memory=False)\n"
        "unsqueeze_default = unsqueeze.default(mul_1, 0)\n"
        "slice_scatter_default = slice_scatter.default(full, unsqueeze_default, 0, -1, None)\n"
        f"full_1 = {zeros}pin_memory=False)\n"
        "unsqueeze_default_1 = unsqueeze.default(mul_2, 0)\n"
        "slice_scatter_default_1 = slice_scatter.default(full_1, unsqueeze_default_1, 0, 0, 1)\n"
        "add = add.Tensor(slice_scatter_default, slice_scatter_default_1)\n"
        "return [mul, add]"
    )
    assert lower(gm, on_cpu) == []


@pytest.mark.slow
@settings(max_examples=20)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.sampled_from([torch.float32, torch.bfloat16]), st.data())
def test_numbers(shape: list[int], dtype: torch.dtype, data: st.DataObject) -> None:
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    indices = data.draw(st.lists(st.integers(-shape[dim], shape[dim] - 1), min_size=1, max_size=4))
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    gm = joint(lambda x: (sum(x.select(dim, index).sin() for index in indices),), x)
    # Nothing is added up but what was: no bit changes.
    assert len(unchanged(gm, (x.detach(),), on_cpu)) == len(indices)


def test_on_a_cpu_and_in_forward_selects_stay() -> None:
    def written(x: Tensor, y: Tensor) -> tuple[Tensor]:
        x = x.clone()
        x[0] = y
        return (x,)

    assert lower(joint(product, leaf(2, 3)), select_gradients) == []
    gm = joint(written, leaf(2, 3), torch.randn(3))
    assert "select_scatter" in graph_text(gm.graph)
    assert lower(gm, on_cpu) == []


class Attention(nn.Module):
    """That of torchvision's ViT: nn.MultiheadAttention projects to query, key and value at once."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 2)

    def forward(self, x: Tensor) -> Any:
        return x + self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.compile
def test_a_gpu_reads_each_gradient_once() -> None:
    x = torch.randn(5, 4, 64)
    _, backward = generated(octav_fx.quantize(Attention(), (x,)), x, autocast=True)
    (kernel,) = re.findall(r"def triton_poi\w*select_backward.*?tl\.store", backward.code, re.DOTALL)
    reads = re.findall(r"tl\.load\(in_ptr\d+ \+ \(.*x0.*\), (.*), eviction", kernel)
    # Of each part its gradient, and its value, by which the gradient is masked.
    assert len(reads) == 6
    assert "xmask" not in reads
    assert len(set(reads)) == 3
