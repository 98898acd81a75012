"""grouped_mm: what F.grouped_mm computes, with its gradients, in code that is compiled in float32."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import octav_fx
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


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(operands(1)[1].detach())

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return F.grouped_mm(x, self.weights, offs=ends)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_under_autocast_the_result_is_of_the_dtype_of_the_weights(backend: str) -> None:
    x, _, ends = operands(9)
    x = x.detach().bfloat16().float()
    q = octav_fx.quantize(Experts(), (x, ends))
    expected = q(x, ends)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.compile(q, backend=backend)(x, ends)
        with octav_fx.float_mode(q):
            assert torch.equal(q(x, ends), F.grouped_mm(x, q.weights, offs=ends))
    assert found.dtype is torch.float32
    # Levels of rows, the same ones, are rounded to bfloat16: each by half a unit of its last place at most.
    rounding = 2**-9 * (Experts().weights.abs().sum(1).max() * x.abs().max())
    assert (found - expected).abs().max() < rounding
    found.sum().backward()
    assert q.weights.grad is not None


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.octav.grouped_mm.default, operands(9))
