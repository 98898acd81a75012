"""expand_products: single products, equal to what they stand for."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import octav_fx
from octav_fx.ir.edits import Edit
from octav_fx.ir.printer import graph_text
from octav_fx.passes.prepare.expand_products import expand_products
from tests.support.alike import quantized_alike
from tests.support.examples import examples
from tests.support.graphs import captured, model, run_alike

X, Y = torch.randn(6, 8), torch.randn(4, 8)


def weights() -> dict[str, Any]:
    return {
        "w": nn.Parameter(torch.randn(8, 8) / 3),
        "v": nn.Parameter(torch.randn(8, 3)),
        "e": nn.Parameter(torch.randn(8, 2, 8)),
    }


def test_golden() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = torch.einsum("bi,ij,jk->bk", x, s.w, s.w) + torch.inner(x, s.w) + x @ torch.matrix_power(s.w, 3)
        return torch.linalg.multi_dot([y, s.w, s.v])

    gm = captured(model(forward, **weights()), x=X)
    names = [edit.detail for edit in expand_products(gm)]
    assert names == ["einsum", "inner", "matrix_power", "linalg_multi_dot"]
    text = graph_text(gm.graph)
    for line in (
        "einsum_1 = einsum('bi,ij->bj', x, w)",
        "einsum_2 = einsum('bj,jk->bk', einsum_1, w)",
        "t = w.t()",
        "matmul_1 = matmul(x, t)",
        "matmul_2 = matmul(w, w)",
        "matmul_3 = matmul(w, matmul_2)",
    ):
        assert line in text, text
    assert expand_products(gm) == []


# Functions of the model and [B, 8], with the multiply-accumulates for B = 6.
PRODUCTS: dict[str, tuple[Callable[..., Any], int]] = {
    "einsum of three": (lambda s, x: torch.einsum("bi,ij,jk->bk", x, s.w, s.w), 768),
    "implied": (lambda s, x: torch.einsum("bi,ij,jk", x, s.w, s.w), 768),
    "dots": (lambda s, x: torch.einsum("...i,ij,jk->...k", x[None], s.w, s.w), 768),
    "tensordot": (lambda s, x: torch.tensordot(x, s.w, dims=([1], [1])), 384),
    "tensordot by number": (lambda s, x: torch.tensordot(x, s.w, 1), 384),
    "tensordot of two axes": (lambda s, x: torch.tensordot(x[:, None] * s.w, s.e, dims=([1, 2], [0, 2])), 768),
    "inner": (lambda s, x: torch.inner(x, s.w), 384),
    "inner of vectors": (lambda s, x: torch.inner(x[0], s.w[0]) * x, 8),
    "inner method": (lambda s, x: x.inner(s.e), 6 * 8 * 16),
    "multi_dot": (lambda s, x: torch.linalg.multi_dot([x, s.w, s.v]), 6 * 8 * 3 + 8 * 8 * 3),
    "multi_dot of a vector": (lambda s, x: torch.linalg.multi_dot([x[0], s.w, s.v]), 64 + 24),
    "matrix_power": (lambda s, x: x @ torch.linalg.matrix_power(s.w, 5), 384 + 3 * 512),
    "matrix_power method": (lambda s, x: x @ s.w.matrix_power(2), 384 + 512),
    "vdot": (lambda s, x: torch.vdot(x[0], s.w[0]) * x, 8),
    "addmm_": (lambda s, x: (x * 2).addmm_(x, s.w, beta=0.5, alpha=2), 384),
    "baddbmm_": (lambda s, x: (x * 2)[None].baddbmm_(x[None], s.w[None]), 384),
    "addbmm_": (lambda s, x: (x * 2).addbmm_(x[None], s.w[None]), 384),
    "addmv_": (lambda s, x: (x[0] * 2).addmv_(s.w, x[0]), 64),
    "an op without its overload": (lambda s, x: torch.ops.aten.addmm(s.w[0], x, s.w), 384),
    "a vector": (lambda s, x: F.linear(x, s.w[0]), 48),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_quantized(name: str) -> None:
    function, macs = PRODUCTS[name]
    q = quantized_alike(model(function, **weights()), (X,), (Y,))
    assert octav_fx.coverage(q) == octav_fx.Coverage(macs, macs, [])


# What multiplies, and has no row: told with its work.
@torch.library.custom_op("octav_tests::product", mutates_args=())
def product(a: Tensor, b: Tensor) -> Tensor:
    """What only its Python code knows to be a product."""
    return a @ b


@product.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


FLOAT: dict[str, tuple[Callable[..., Any], int, str]] = {
    "cdist": (lambda s, x: torch.cdist(x, s.w), 384, "no rule for cdist"),
    "addr": (lambda s, x: torch.addr(s.w, x[0], x[1]), 64, "no rule for addr"),
    "custom op": (lambda s, x: product(x, s.w.detach()), 384, "no rule for product.default"),
    "complex": (lambda s, x: (x.to(torch.cfloat) @ s.w.to(torch.cfloat)).abs(), 384, "its operands are complex"),
    "sparse": (lambda s, x: s.sparse @ (x @ s.w), 288, "one of its operands is sparse"),
}


@pytest.mark.parametrize("name", FLOAT)
def test_what_stays_float_is_told(name: str) -> None:
    function, macs, reason = FLOAT[name]
    float_model = model(function, sparse=torch.eye(6).to_sparse(), **weights())
    q = octav_fx.quantize(float_model, X)
    ((_, told, work),) = octav_fx.coverage(q).skipped
    assert (told, work) == (reason, macs)


def test_vdot_of_complex_numbers_is_left() -> None:
    gm = captured(model(lambda s, x: torch.vdot(x, x * 1j)), x=torch.randn(3, dtype=torch.cfloat))
    before = graph_text(gm.graph)
    assert expand_products(gm) == [] and graph_text(gm.graph) == before


@st.composite
def equations(draw: st.DrawFn) -> tuple[str, list[Tensor]]:
    sizes = {"a": 2, "b": 3, "c": 4, "d": 1, "e": 5}
    terms = draw(st.lists(st.lists(st.sampled_from("abcde"), max_size=3), min_size=3, max_size=4))
    letters = sorted({c for term in terms for c in term})
    output = draw(st.permutations(letters))[: draw(st.integers(0, 3))]
    equation = ",".join(map("".join, terms)) + draw(st.sampled_from(["", "->" + "".join(output)]))
    return equation, [torch.randint(-3, 4, [sizes[c] for c in term]).double() for term in terms]


@pytest.mark.slow
@examples(60)
@given(equations())
def test_an_einsum_of_several_operands(drawn: tuple[str, list[Tensor]]) -> None:
    """Of small integers in double precision, so that sums are exact in any order."""
    equation, operands = drawn
    float_model = model(lambda s, *x: torch.einsum(equation, *x))
    gm = captured(float_model, x=tuple(operands))
    assert all(isinstance(edit, Edit) for edit in expand_products(gm))
    gm.recompile()
    assert run_alike(float_model, gm, *operands)


@pytest.mark.parametrize("sizes", list(itertools.product((1, 5), repeat=5)))
def test_a_chain_is_multiplied_in_torchs_order(sizes: tuple[int, ...]) -> None:
    matrices = tuple(torch.randint(-3, 4, shape).double() for shape in itertools.pairwise(sizes))
    float_model = model(lambda s, *x: torch.linalg.multi_dot(x))
    gm = captured(float_model, x=matrices)
    expand_products(gm)
    gm.recompile()
    assert run_alike(float_model, gm, *matrices)
