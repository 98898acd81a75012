"""Transformers' architectures as tiny models of random weights, made from configurations: nothing is downloaded."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

_WORDS: Final = 100
_SMALL: Final = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": _WORDS,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Of models whose heads share keys and values.
_GROUPED: Final = {**_SMALL, "num_key_value_heads": 2, "head_dim": 8}
_ENCODER_DECODER: Final = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": _WORDS,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
_IMAGE: Final = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}


def _words(rows: int = 2, length: int = 16) -> Tensor:
    return torch.randint(3, _WORDS, (rows, length))


def _text() -> dict[str, Tensor]:
    """Two sequences, one of them shorter, as a tokenizer pads them."""
    words, mask = _words(), torch.ones(2, 16, dtype=torch.long)
    words[1, 12:], mask[1, 12:] = 0, 0
    return {"input_ids": words, "attention_mask": mask}


def _translation() -> dict[str, Tensor]:
    return {**_text(), "decoder_input_ids": _words(length=8)}


def _pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def _text_and_pixels() -> dict[str, Tensor]:
    return {**_text(), **_pixels()}


def _spectrum() -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, 16, 64), "decoder_input_ids": _words(length=8)}


def _sound() -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 4000)}


@dataclass(frozen=True)
class Row:
    """A class of transformers, its configuration, and its inputs."""

    family: str
    name: str
    config: Mapping[str, Any] = field(default_factory=lambda: _SMALL)
    inputs: Callable[[], dict[str, Tensor]] = _text


MODELS: Final = (
    Row("bert", "BertForSequenceClassification"),
    Row("distilbert", "DistilBertForSequenceClassification", {**_SMALL, "hidden_dim": 64}),
    Row("roberta", "RobertaForSequenceClassification"),
    Row("electra", "ElectraForSequenceClassification", {**_SMALL, "embedding_size": 32}),
    Row("albert", "AlbertForSequenceClassification", {**_SMALL, "embedding_size": 16}),
    Row("gpt2", "GPT2LMHeadModel"),
    Row("gpt_neox", "GPTNeoXForCausalLM"),
    Row("llama", "LlamaForCausalLM", _GROUPED),
    Row("qwen2", "Qwen2ForCausalLM", _GROUPED),
    Row("qwen3", "Qwen3ForCausalLM", _GROUPED),
    Row("mistral", "MistralForCausalLM", _GROUPED),
    Row("mixtral", "MixtralForCausalLM", {**_GROUPED, "num_local_experts": 4}),
    Row("gemma2", "Gemma2ForCausalLM", {**_GROUPED, "sliding_window": 8}),
    Row("phi3", "Phi3ForCausalLM", {**_SMALL, "num_key_value_heads": 2}),
    Row("opt", "OPTForCausalLM", {**_SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    Row("bloom", "BloomForCausalLM"),
    Row("falcon", "FalconForCausalLM"),
    Row(
        "t5",
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": _WORDS},
        _translation,
    ),
    Row("bart", "BartForConditionalGeneration", _ENCODER_DECODER, _translation),
    Row("mbart", "MBartForConditionalGeneration", _ENCODER_DECODER, _translation),
    Row("marian", "MarianMTModel", _ENCODER_DECODER, _translation),
    Row("vit", "ViTForImageClassification", _IMAGE, _pixels),
    Row("deit", "DeiTForImageClassification", _IMAGE, _pixels),
    Row(
        "swin",
        "SwinForImageClassification",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        _pixels,
    ),
    Row("beit", "BeitForImageClassification", _IMAGE, _pixels),
    Row(
        "clip",
        "CLIPModel",
        {"text_config": _SMALL, "vision_config": _IMAGE, "projection_dim": 32},
        _text_and_pixels,
    ),
    Row(
        "whisper",
        "WhisperForConditionalGeneration",
        {**_ENCODER_DECODER, "num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 64},
        _spectrum,
    ),
    Row(
        "wav2vec2",
        "Wav2Vec2ForCTC",
        {**_SMALL, "conv_dim": (32,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
        _sound,
    ),
    Row("deberta_v2", "DebertaV2ForSequenceClassification"),
    Row(
        "xlnet",
        "XLNetForSequenceClassification",
        {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "vocab_size": _WORDS},
    ),
    Row(
        "segformer",
        "SegformerForSemanticSegmentation",
        {
            "hidden_sizes": [8, 16, 32, 64],
            "num_attention_heads": [1, 2, 4, 8],
            "depths": [1, 1, 1, 1],
            "decoder_hidden_size": 32,
        },
        lambda: {"pixel_values": torch.randn(2, 3, 64, 64)},
    ),
)


def make(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model of random weights, and two examples."""
    row = next(row for row in MODELS if row.name == name)
    kind = getattr(importlib.import_module("transformers"), name)
    return kind(kind.config_class(**row.config)), row.inputs()
