"""decompose_attention: golden text, then numbers against torch's own attention, then idempotence."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import octav_fx
from octav_fx.ir.edits import site_of
from octav_fx.ir.masked_softmax import masked_softmax
from octav_fx.ir.meta import set_fake
from octav_fx.ir.printer import graph_text
from octav_fx.passes import canonicalize, decompose_attention
from tests.support.graphs import captured, model
from tests.support.on_grid import OnGrid
from tests.support.passes import declined, made

QUERY, KEY, VALUE = torch.randn(3, 2, 4, 6, 8).unbind()
BOOLS = torch.rand(2, 1, 6, 6) > 0.4
BOOLS[:, :, 2] = False
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scale": 0.3},
    "causal": {"is_causal": True},
    "a mask of bools, one row of them False": {"attn_mask": BOOLS},
    "a mask of numbers": {"attn_mask": torch.randn(6, 6)},
}


def attends(**settings: Any):
    return model(lambda self, q, k, v: F.scaled_dot_product_attention(q, k, v, **settings))


def split(float_module, *operands: Tensor):
    gm = captured(float_module, **dict(zip("qkv", operands, strict=True)))
    canonicalize(gm)
    return gm, made(gm, decompose_attention)


def test_golden():
    gm, edits = split(attends(is_causal=True, dropout_p=0.1), QUERY, KEY, VALUE)
    assert (
        graph_text(gm.graph)
        == """\
transpose = k.transpose(-2, -1)
matmul = matmul(q, transpose)
size = q.size(-1)
pow_1 = pow(size, -0.5)
mul = mul(matmul, pow_1)
masked_softmax = masked_softmax(mul, None, True)
dropout = dropout(masked_softmax, 0.1, True)
matmul_1 = matmul(dropout, v)
return matmul_1"""
    )
    assert [(e.node, e.verb) for e in edits] == [("attention", "split")]
    assert [site_of(n) for n in gm.graph.nodes if "matmul" in n.name] == ["attention.scores", "attention.output"]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_it_computes_what_the_fused_attention_computes(settings):
    float_module = attends(**settings)
    gm, _ = split(float_module, QUERY, KEY, VALUE)
    operands = [t.double() for t in (QUERY, KEY, VALUE)]
    if settings.get("attn_mask") is not None and settings["attn_mask"].is_floating_point():
        float_module = attends(attn_mask=settings["attn_mask"].double())
    # Six products of numbers near one, in double: eight roundings of 2**-53 each and a softmax.
    torch.testing.assert_close(gm(*operands), float_module(*operands), rtol=1e-13, atol=1e-14)


def test_grouped_queries_share_keys_and_values():
    float_module = attends(enable_gqa=True)
    operands = [QUERY.double(), KEY[:, :2].double(), VALUE[:, :2].double()]
    gm, _ = split(float_module, *operands)
    torch.testing.assert_close(gm(*operands), float_module(*operands), rtol=1e-13, atol=1e-14)


def test_other_lengths_than_those_of_the_capture():
    gm, _ = split(attends(is_causal=True), QUERY, KEY, VALUE)
    longer = torch.randn(3, 1, 4, 9, 8, dtype=torch.double).unbind()
    expected = F.scaled_dot_product_attention(*longer, is_causal=True)
    torch.testing.assert_close(gm(*longer), expected, rtol=1e-13, atol=1e-14)


def test_heads_of_a_layer_are_as_wide_as_its_weight_says():
    layered = model(lambda s, x: F.scaled_dot_product_attention(s.q(x), x, x), q=torch.nn.Linear(8, 8))
    gm = captured(layered, x=torch.randn(2, 5, 8))
    canonicalize(gm)
    made(gm, decompose_attention)
    assert "mul(matmul, 0.35355339059327373)" in graph_text(gm.graph)


def test_heads_of_another_width_have_another_scale():
    gm, _ = split(attends(), QUERY, KEY, VALUE)
    narrow = [operand[..., :5] for operand in (QUERY, KEY, VALUE)]
    torch.testing.assert_close(gm(*narrow), F.scaled_dot_product_attention(*narrow))


def test_a_query_that_may_look_nowhere_has_weights_of_zero():
    weights = masked_softmax(torch.randn(2, 3), torch.tensor([[True, False, True], [False] * 3]))
    assert weights[0, 1] == 0 and weights[0].sum() == pytest.approx(1, rel=1e-6)
    assert weights[1].tolist() == [0, 0, 0]


def test_without_a_mask_no_weight_is_asked_for():
    computed = make_fx(lambda scores: masked_softmax(scores, is_causal=True))(torch.randn(2, 3))
    assert not computed.graph.find_nodes(op="call_function", target=torch.ops.aten.eq.Scalar)


def test_a_second_run_changes_nothing():
    gm, _ = split(attends(), QUERY, KEY, VALUE)
    text = graph_text(gm.graph)
    assert made(gm, decompose_attention) == []
    assert graph_text(gm.graph) == text


def test_an_operand_of_unknown_shape_stays_fused():
    gm = captured(attends(), q=QUERY, k=KEY, v=VALUE)
    canonicalize(gm)
    set_fake(next(n for n in gm.graph.nodes if n.name == "k"), None)
    ((site, operand, reason),) = declined(gm, decompose_attention)
    assert (site, operand) == ("attention", None) and "stays fused" in reason


@pytest.mark.parametrize("attention", ["operands", "full"])
def test_full_quantizes_the_softmax_output_unsigned(attention):
    q = octav_fx.quantize(attends(), (QUERY, KEY, VALUE), octav_fx.Config(attention=attention))
    found = [(row.node, row.operand, row.signed) for row in octav_fx.rows(q)]
    if attention == "operands":
        assert found == [("attention", name, True) for name in ("query", "key", "value")]
        return
    assert found == [
        ("attention.scores", "input", True),
        ("attention.scores", "other", True),
        ("attention.output", "input", False),
        ("attention.output", "other", True),
    ]
    with OnGrid(bits=4) as seen:
        q(QUERY, KEY, VALUE)
    assert (seen.off_grid, seen.checked) == ([], 2)


@pytest.mark.compile
def test_the_backend_takes_it_as_an_option():
    float_module = attends(is_causal=True)
    q = octav_fx.quantize(float_module, (QUERY, KEY, VALUE), octav_fx.Config(attention="full"))
    torch.compiler.reset()
    compiled = torch.compile(float_module, backend="octav", options={"attention": "full"})
    # Codes and clips are the same; softmax and products are rounded in another order.
    torch.testing.assert_close(compiled(QUERY, KEY, VALUE), q(QUERY, KEY, VALUE), rtol=1e-5, atol=1e-6)
