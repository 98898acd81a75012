"""Architectures of transformers, tiny and of random weights: one graph each, and all that it multiplies quantized."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from octav_fx import Config, coverage, float_mode, quantize
from octav_fx.capture.whole import WholeModule
from tests.support.on_grid import OnGrid
from tests.support.pretrained import MODELS, build, text, words

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.models

# Four levels: fewer than any row of a weight here has values.
TWO_BITS = Config(weight_bits=2, activation_bits=2, edge_bits=None)


def leaves(out: Any) -> list[Tensor]:
    """The tensors of an output, of a cache in it too."""
    plain = [vars(x) if hasattr(x, "layers") else x for x in dict(out).values()]
    plain = [[(layer.keys, layer.values) for layer in x["layers"]] if isinstance(x, dict) else x for x in plain]
    return [leaf for leaf in pytree.tree_leaves(plain) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("name", MODELS)
def test_one_graph_of_all_of_it_with_the_librarys_own_outputs(name: str) -> None:
    model, inputs = build(name).eval(), MODELS[name][1]()
    q = quantize(model, inputs, TWO_BITS, blocks=())
    assert isinstance(q, WholeModule)
    assert list(q.state_dict()) == list(model.state_dict())
    covered = coverage(q)
    assert covered.quantized_macs == covered.total_macs - sum(
        macs for _, reason, macs in covered.skipped if reason.startswith("computed from integers and constants")
    )
    assert all(reason.startswith("computed from integers and constants") for _, reason, _ in covered.skipped)
    expected = model(**inputs)
    with float_mode(q):
        restored = q(**inputs)
    # With gradients torch splits an attention whose bias is learned, and the softmax in the middle is float.
    with torch.no_grad(), OnGrid(2) as seen:
        out = q(**inputs)
    nodes = {record.site for record in q.records if record.quantizer}
    assert seen.checked >= len(nodes) > 0 and seen.off_grid == []
    for found in (restored, out):
        assert type(found) is type(expected) and list(found) == list(expected)
        assert [type(found[key]) for key in found] == [type(expected[key]) for key in expected]
        assert [t.shape for t in leaves(found)] == [t.shape for t in leaves(expected)]
    assert all(torch.equal(a, b) for a, b in zip(leaves(restored), leaves(expected), strict=True))
    assert not torch.equal(out.logits, expected.logits)


@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_is_finite_and_reaches_every_parameter_that_the_model_reaches(name: str) -> None:
    model, inputs = build(name).train(), MODELS[name][1]()
    q = quantize(model, inputs, blocks=())
    with float_mode(q):
        step(q, inputs)
    step(model, inputs)
    for (key, ours), theirs in zip(q.named_parameters(), model.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), key
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad), key
    q.zero_grad()
    step(q, inputs)
    for (key, ours), theirs in zip(q.named_parameters(), model.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), key
        assert ours.grad is None or ours.grad.isfinite().all(), key


def step(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    torch.manual_seed(1)
    model(**inputs).logits.square().mean().backward()


def test_a_cache_of_one_call_goes_into_none_of_the_next() -> None:
    model, inputs = build("LlamaForCausalLM").eval(), text()
    q = quantize(model, inputs, blocks=())
    first, second = q(**inputs).past_key_values, q(**inputs).past_key_values
    assert first is not second and first.get_seq_length() == second.get_seq_length() == 8


@pytest.mark.parametrize("length", [0, 8])
def test_a_cache_that_is_an_argument(length: int) -> None:
    model = build("LlamaForCausalLM").eval()

    def cache() -> Any:
        filled = transformers.DynamicCache(config=model.config)
        if length:
            torch.manual_seed(2)
            with torch.no_grad():
                model(words(length), past_key_values=filled)
        return filled

    inputs, given = {"input_ids": words(3)}, cache()
    q = quantize(model, {**inputs, "past_key_values": given}, blocks=())
    assert given.get_seq_length() == length
    expected = model(**inputs, past_key_values=cache())
    with float_mode(q):
        restored = q(**inputs, past_key_values=cache())
    out = q(**inputs, past_key_values=cache())
    assert all(torch.equal(a, b) for a, b in zip(leaves(restored), leaves(expected), strict=True))
    assert out.past_key_values.get_seq_length() == length + 3


def test_labels_make_a_loss() -> None:
    model, inputs = build("BertForSequenceClassification").eval(), {**text(), "labels": torch.tensor([0, 1])}
    q = quantize(model, inputs, blocks=())
    with float_mode(q):
        assert torch.equal(q(**inputs).loss, model(**inputs).loss)
    q(**inputs).loss.backward()
    assert all(p.grad.isfinite().all() for p in q.parameters() if p.grad is not None)
