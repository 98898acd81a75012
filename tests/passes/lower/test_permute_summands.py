"""permute_summands: sums of slices are permuted before they are added up, with the values of before."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from octav_fx.ir.printer import graph_text
from octav_fx.passes import permute_summands, select_gradients
from tests.support.joint import joint, leaf, lower, unchanged

of_selects = functools.partial(select_gradients, device="cpu")
on_cpu = functools.partial(permute_summands, device="cpu")


def halves(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, -1)).transpose(0, 1).contiguous()


def of_halves(x: Tensor) -> tuple[Tensor]:
    x = halves(x)
    return (x[0] * x[1],)


def projected(x: Tensor) -> tuple[Tensor]:
    """As nn.MultiheadAttention takes query, key and value out of its projection."""
    x = x.unflatten(-1, (3, -1)).unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
    return (x[0].exp() * x[1] + x[2].sin(),)


def test_golden() -> None:
    gm = joint(of_halves, leaf(3, 4))
    lower(gm, of_selects)
    assert [(edit.verb, edit.detail) for edit in lower(gm, on_cpu)] == [("permute summands", "[3, 2, 2]")]
    text = graph_text(gm.graph)
    assert text[text.index("permute_default") :] == (
        "permute_default = permute.default(slice_scatter_default, [1, 0, 2])\n"
        "permute_default_1 = permute.default(slice_scatter_default_1, [1, 0, 2])\n"
        "add_tensor = add.Tensor(permute_default, permute_default_1)\n"
        "clone_1 = clone.default(add_tensor, memory_format=torch.contiguous_format)\n"
        "view_1 = view.default(clone_1, [3, 4])\n"
        "return [mul, view_1]"
    )
    assert lower(gm, on_cpu) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers(dtype: torch.dtype) -> None:
    x = torch.randn(5, 4, 6, dtype=dtype, requires_grad=True)
    gm = joint(projected, x)
    # Each summand is what it was, in another place: no bit changes.
    edits = unchanged(gm, (x.detach(),), of_selects, on_cpu)
    assert [edit.verb for edit in edits] == ["select gradient"] * 3 + ["permute summands"]
    assert lower(gm, of_selects, on_cpu) == []


def of_another_sum(x: Tensor) -> tuple[Tensor]:
    x = halves(x)
    return (x[0] * x[1] + x.sum(),)


def of_one_part(x: Tensor) -> tuple[Tensor]:
    return (halves(x)[0].sin(),)


@pytest.mark.parametrize("function", [of_another_sum, of_one_part])
def test_others_stay(function: Callable[[Tensor], tuple[Tensor]]) -> None:
    gm = joint(function, leaf(3, 4))
    assert "clone_1" in graph_text(gm.graph)
    assert lower(gm, of_selects)
    assert lower(gm, on_cpu) == []


def test_on_a_cpu_sums_stay() -> None:
    gm = joint(projected, leaf(5, 4, 6))
    lower(gm, of_selects)
    assert lower(gm, permute_summands) == []
