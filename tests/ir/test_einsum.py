import pytest

from octav_fx.ir.einsum import summed_axes, terms_of


@pytest.mark.parametrize(
    ("equation", "axes"),
    [
        ("ij,jk->ik", [1, 0]),
        ("bhqd, bhkd -> bhqk", [3, 3]),
        ("bi,ij", [1, 0]),
        ("...id,jd->...ij", [-1, 1]),
        ("d...i,d->...i", [0, 0]),
        # Of two axes the last of the first operand, wherever the other one has it.
        ("bqhd,hdm->bqm", [3, 1]),
        ("bqhd,dhm->bqm", [3, 0]),
        # Nothing is summed, each is summed by itself, the diagonal of one.
        ("i,j->ij", [None, None]),
        ("ij,kl->ik", [None, None]),
        ("ii,i->i", [None, None]),
        ("ii,i", [None, None]),
    ],
)
def test_the_axes_that_products_are_summed_over(equation, axes):
    assert summed_axes(equation) == axes


def test_a_result_that_is_implied():
    assert terms_of("bj, ai") == (["bj", "ai"], "abij")
    assert terms_of("...ij,jk") == (["...ij", "jk"], "...ik")
