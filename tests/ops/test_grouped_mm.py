"""grouped_mm: what F.grouped_mm computes, with its gradients, compiled in float32, and zeros for rows of no group."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import octav_fx
from octav_fx.capture.rerun import unwritten_as_nan
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


@pytest.mark.slow
def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.octav.grouped_mm.default, operands(9))
    torch.library.opcheck(torch.ops.octav.grouped_mm_weights.default, weight_operands(9))


def weight_operands(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    x, _, ends = operands(rows)
    return x, torch.randn(rows, 12, generator=torch.Generator().manual_seed(2)).requires_grad_(), ends


def test_gradients_of_gradients() -> None:
    x, weights, ends = operands(9)
    found = []
    for product in (grouped_product, F.grouped_mm):
        gradients = torch.autograd.grad(product(x, weights, offs=ends).exp().sum(), (x, weights), create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), (x, weights)))
    for one, other in zip(*found, strict=True):
        # Sums of 36 products of 12 and 8 terms, in another order.
        torch.testing.assert_close(one, other, rtol=36 * 96 * 2**-24, atol=1e-4)


def test_what_lies_beyond_the_last_group_is_zero() -> None:
    x, weights, _ = operands(9)
    ends = torch.tensor([2, 2, 6], dtype=torch.int32)
    columns = torch.randn(8, 12, generator=torch.Generator().manual_seed(1))
    with unwritten_as_nan():
        rows = grouped_product(x, weights, offs=ends)
        of_columns = grouped_product(weights.transpose(1, 2), columns, offs=ends)
        (gradient,) = torch.autograd.grad(rows.sum(), x)
    assert torch.equal(rows[:6], F.grouped_mm(x[:6], weights, offs=ends)) and not rows[6:].any()
    assert not of_columns[:, 6:].any() and of_columns[:, :6].isfinite().all()
    assert not gradient[6:].any() and gradient[:6].isfinite().all()


class TwoProducts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(operands(1)[1].detach())
        self.down = nn.Parameter(operands(2)[1].detach().transpose(1, 2).contiguous())
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        rows = F.grouped_mm(x, self.up, offs=ends)
        rows = self.last(F.grouped_mm(rows.relu(), self.down, offs=ends))
        return torch.where(torch.arange(x.shape[0]).unsqueeze(-1) < ends[-1], rows, 0)


@pytest.mark.parametrize("clip", ["octav", "lsq"])
@pytest.mark.parametrize("backend", [None, "aot_eager", pytest.param("octav", marks=pytest.mark.compile)])
def test_chance_beyond_the_last_group_moves_no_clip_and_no_gradient(backend: str | None, clip: str) -> None:
    x, _, ends = operands(12)
    x = x.detach()
    q = octav_fx.quantize(TwoProducts(), (x, ends), octav_fx.Config(clip=clip))
    called = torch.compile(q, backend=backend) if backend else q
    short = torch.tensor([3, 5, 8], dtype=torch.int32)

    def results() -> list[Tensor]:
        found = called(x, short)
        return [found, *torch.autograd.grad(found.square().sum(), list(q.parameters()))]

    expected = results()
    with unwritten_as_nan():
        for one, other in zip(expected, results(), strict=True):
            assert torch.equal(one, other)
