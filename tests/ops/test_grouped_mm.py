"""grouped_mm: what F.grouped_mm computes, with its gradients, in code that is compiled in float32."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from octav_fx.ops.grouped_mm.op import grouped_product


def operands(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x, weights = torch.randn(rows, 8, generator=generator), torch.randn(3, 8, 12, generator=generator)
    return x.requires_grad_(), weights.requires_grad_(), torch.tensor([rows // 4, rows // 4, rows], dtype=torch.int32)


@pytest.mark.parametrize("rows", [4, 9])
def test_compiled_it_is_torchs_function_with_its_gradients(rows: int) -> None:
    x, weights, ends = operands(rows)
    compiled = torch.compile(lambda *args: grouped_product(args[0], args[1], offs=args[2]), backend="aot_eager")
    found, expected = compiled(x, weights, ends), F.grouped_mm(x, weights, offs=ends)
    # The very kernel of torch in both.
    assert torch.equal(found, expected)
    factors = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    for one, other in zip(
        torch.autograd.grad((found * factors).sum(), (x, weights)),
        torch.autograd.grad((expected * factors).sum(), (x, weights)),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.octav.grouped_mm.default, operands(9))
