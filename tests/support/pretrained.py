"""Architectures of transformers, tiny and of random weights, and inputs for them."""

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from octav_fx import OctavError, zoo

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


def build(name: str, **settings: Any) -> nn.Module:
    return made(name, {**MODELS[name][0], **settings})


def made(name: str, settings: dict[str, Any]) -> nn.Module:
    with contextlib.suppress(OctavError):
        # Transformers imports torchvision where it finds it, which fails beside a torch without CUDA's libraries.
        zoo.torchvision()
    kind = getattr(importlib.import_module("transformers"), name)
    return kind(kind.config_class(**settings))
