"""Architectures of transformers, tiny and of random weights: one graph each, and all that it multiplies quantized."""

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from octav_fx import Config, OctavError, coverage, float_mode, quantize, zoo
from tests.support.on_grid import OnGrid

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.models

WORDS = 50
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {
    **SPECIAL,
    "vocab_size": WORDS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 4}
T5 = {**SPECIAL, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "vocab_size": WORDS}
WHISPER = {
    **SPECIAL,
    **{f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("layers", 1), ("attention_heads", 4))},
    "decoder_start_token_id": 2,
    "vocab_size": WORDS,
    "d_model": 16,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 16,
}


def words(length: int = 8) -> Tensor:
    return torch.randint(3, WORDS, (2, length))


def text() -> dict[str, Tensor]:
    """Two sequences, the second padded."""
    ids, mask = words(), torch.ones(2, 8, dtype=torch.long)
    ids[1, 6:], mask[1, 6:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def translation() -> dict[str, Tensor]:
    return {**text(), "decoder_input_ids": words(5)}


def pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


def spectrum() -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": words(5)}


# Class -> what its configuration differs in, and its inputs.
MODELS: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Tensor]]]] = {
    "BertForSequenceClassification": (SMALL, text),
    "DistilBertForSequenceClassification": ({**SMALL, "hidden_dim": 24}, text),
    "GPT2LMHeadModel": (SMALL, text),
    "LlamaForCausalLM": (GROUPED, text),
    "Qwen3ForCausalLM": (GROUPED, text),
    "OPTForCausalLM": ({**SMALL, "ffn_dim": 24, "word_embed_proj_dim": 16}, text),
    "T5ForConditionalGeneration": (T5, translation),
    "ViTForImageClassification": ({**SMALL, "image_size": 16, "patch_size": 4}, pixels),
    "WhisperForConditionalGeneration": (WHISPER, spectrum),
    "MixtralForCausalLM": ({**GROUPED, "num_local_experts": 4}, text),
}
# Four levels: fewer than any row of a weight here has values.
TWO_BITS = Config(weight_bits=2, activation_bits=2, edge_bits=None)


def build(name: str) -> nn.Module:
    with contextlib.suppress(OctavError):
        # Transformers imports torchvision where it finds it, which fails beside a torch without CUDA's libraries.
        zoo.torchvision()
    kind = getattr(importlib.import_module("transformers"), name)
    return kind(kind.config_class(**MODELS[name][0]))


def leaves(out: Any) -> list[Tensor]:
    """The tensors of an output, of a cache in it too."""
    plain = [vars(x) if hasattr(x, "layers") else x for x in dict(out).values()]
    plain = [[(layer.keys, layer.values) for layer in x["layers"]] if isinstance(x, dict) else x for x in plain]
    return [leaf for leaf in pytree.tree_leaves(plain) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("name", MODELS)
def test_one_graph_of_all_of_it_with_the_librarys_own_outputs(name: str) -> None:
    model, inputs = build(name).eval(), MODELS[name][1]()
    q = quantize(model, inputs, TWO_BITS)
    assert isinstance(q, fx.GraphModule)
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
    q = quantize(model, inputs)
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
    q = quantize(model, inputs)
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
    q = quantize(model, {**inputs, "past_key_values": given})
    assert given.get_seq_length() == length
    expected = model(**inputs, past_key_values=cache())
    with float_mode(q):
        restored = q(**inputs, past_key_values=cache())
    out = q(**inputs, past_key_values=cache())
    assert all(torch.equal(a, b) for a, b in zip(leaves(restored), leaves(expected), strict=True))
    assert out.past_key_values.get_seq_length() == length + 3


def test_labels_make_a_loss() -> None:
    model, inputs = build("BertForSequenceClassification").eval(), {**text(), "labels": torch.tensor([0, 1])}
    q = quantize(model, inputs)
    with float_mode(q):
        assert torch.equal(q(**inputs).loss, model(**inputs).loss)
    q(**inputs).loss.backward()
    assert all(p.grad.isfinite().all() for p in q.parameters() if p.grad is not None)
