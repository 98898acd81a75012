"""GGUF: a file for llama.cpp, with weights in blocks of 32 codes under a scale of two bytes or one.

Q4_0 is our signed grid of 4 bits in groups of 32, Q8_0 that of 8 bits, MXFP4 is E2M1 in groups of 32 under a power of
two.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from octav_fx.deploy.files import replacing
from octav_fx.deploy.layers import LinearLayer, float_state, linear_layers, scales_in
from octav_fx.deploy.runtimes import optional
from octav_fx.deploy.targets.compressed_floats import exponents, nibbles
from octav_fx.deploy.targets.gguf_tokenizer import add_tokenizer
from octav_fx.errors import OctavError
from octav_fx.formats.grid import Grid

_BLOCK: Final = 32
_FLOATS: Final = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

# Moves the rows of a tensor.
_Rows = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class _Architecture:
    """What llama.cpp calls a model type of transformers'.

    paired: whether rows of queries and keys that are rotated together are neighbours there; in transformers they are
    half a head apart.
    """

    name: str
    paired: bool = False


_ARCHITECTURES: Final = {
    "llama": _Architecture("llama", paired=True),
    "mistral": _Architecture("llama", paired=True),
    "qwen2": _Architecture("qwen2"),
    "qwen3": _Architecture("qwen3"),
}


def export_gguf(q: nn.Module, path: str | os.PathLike[str], *, tokenizer: Any = None) -> None:
    """Write a frozen language model of transformers as GGUF, for llama.cpp: Llama, Mistral, Qwen2, Qwen3.

    Weights of linear layers are the codes that q computes with: up to 4 bits as Q4_0, up to 8 as Q8_0, E2M1 under
    powers of two as MXFP4. A block of 32 has a scale there, so that q has one for a channel, or for a group of 32, 64,
    ...; scales are float16, which scale_format="float16" makes them. What q has in float stays in its dtype. The file
    holds the weights of q to the bit; llama.cpp rounds activations by itself, on a CPU to 8 bits in blocks of 32.

    tokenizer: of transformers, with the byte-level pairs of Llama 3, Qwen or GPT-2. None: the file has none, and takes
    tokens as numbers. The file is written whole or not at all. Raises OctavError for another model or tokenizer, for a
    model that is not frozen, for rounded activations (activation_bits=None leaves them float), for what llama.cpp
    computes otherwise (scaled rotary embeddings, windows), and for widths and scales that no block has.
    """
    gguf = optional("gguf", "gguf")
    architecture = _architecture(q)
    config: Any = q.config
    stored = dict[str, tuple[Any, str]]()
    tensors = float_state(q)
    for layer in linear_layers(q):
        key = f"{layer.name}.weight"
        del tensors[key]
        stored[key] = blocks_of(layer, _rows(key, config, architecture))
    if config.tie_word_embeddings:
        # Where it is not a layer's own now llama.cpp takes the embedding.
        tensors.pop("lm_head.weight", None)
    for key, value in tensors.items():
        kind = _FLOATS[torch.float32 if value.dim() == 1 else value.dtype]
        moved = _rows(key, config, architecture)(value.detach().cpu()).float().numpy()
        stored[key] = (gguf.quants.quantize(moved, gguf.GGMLQuantizationType[kind]), kind)
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture.name], config.num_hidden_layers)
    with replacing(Path(path)) as draft:
        writer = gguf.GGUFWriter(draft, architecture.name)
        _add_shape_of(writer, config)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_tokenizer(writer, tokenizer, config.vocab_size)
        for key, (data, kind) in stored.items():
            name = names.get_name(key, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise OctavError(f"llama.cpp knows no {key} in a model of type {architecture.name!r}")
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _architecture(q: nn.Module) -> _Architecture:
    """Return what llama.cpp calls a model. Raises OctavError for one that it would compute otherwise."""
    config: Any = getattr(q, "config", None)
    found = _ARCHITECTURES.get(getattr(config, "model_type", ""))
    if found is None or not type(q).__name__.endswith("ForCausalLM"):
        raise OctavError(
            f"{type(q).__name__}: GGUF is written of transformers' models for causal language, of the types "
            f"{', '.join(_ARCHITECTURES)}"
        )
    rotary = _rotary(config)
    if rotary.get("rope_type", "default") != "default":
        raise OctavError(f"rotary embeddings that are scaled ({rotary['rope_type']}) are not written into GGUF files")
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise OctavError(
            "attention in windows (sliding_window) is not written into GGUF files: llama.cpp would have none"
        )
    if config.hidden_act != "silu":
        raise OctavError(f"hidden_act={config.hidden_act!r}: llama.cpp computes silu in models of this type")
    return found


def _add_shape_of(writer: Any, config: Any) -> None:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(_rotary(config)["rope_theta"])
    writer.add_vocab_size(config.vocab_size)


def _rotary(config: Any) -> dict[str, Any]:
    """Return the settings of rotary embeddings, which transformers 4 has in two places."""
    if (found := getattr(config, "rope_parameters", None)) is not None:
        return dict(found)
    return {"rope_theta": config.rope_theta, **(getattr(config, "rope_scaling", None) or {})}


def _rows(key: str, config: Any, architecture: _Architecture) -> _Rows:
    """Return what moves the rows of a tensor to where llama.cpp has them."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(key.split(".")[-2])
    if not architecture.paired or heads is None:
        return lambda x: x
    return lambda x: x.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def blocks_of(layer: LinearLayer, rows: _Rows) -> tuple[Any, str]:
    """Return the bytes [out, blocks * bytes] of a weight [out, in], and the name of their kind."""
    spec, codes = layer.weight.spec, layer.weight.integers().cpu()
    if layer.input is not None:
        raise OctavError(
            f"{layer.name}: its input is rounded, and llama.cpp rounds activations by a rule of its own: quantize with "
            "activation_bits=None"
        )
    is_e2m1 = spec.format.name == "e2m1" and spec.scale == "e8m0"
    size = spec.granularity.size or codes.shape[1]
    if size % _BLOCK or not (is_e2m1 or isinstance(spec.format, Grid)):
        raise OctavError(
            f"{layer.name}: no block of 32 codes holds {spec} of {codes.shape[1]} columns: integers, or e2m1 with "
            "scale_format='e8m0', in groups of 32, 64, ..."
        )
    scale = layer.weight.scale.cpu().reshape(-1, codes.shape[1] // size if spec.granularity.is_short else 1)
    blocks = rows(codes).unflatten(1, (-1, _BLOCK))
    scale = scale.expand(len(codes), -1).repeat_interleave(blocks.shape[1] // scale.shape[1], 1)
    scale = rows(scale).unsqueeze(-1)
    if is_e2m1:
        return _joined(exponents(scale), _halves(nibbles(blocks))), "MXFP4"
    stored = scales_in(torch.float16, layer.name, scale).view(torch.uint8)
    if spec.format.bits <= 4:
        return _joined(stored, _halves(blocks + 8)), "Q4_0"
    return _joined(stored, blocks.contiguous().view(torch.uint8)), "Q8_0"


def _halves(codes: Tensor) -> Tensor:
    """Return [..., 32] numbers of four bits as bytes [..., 16]: the first half is in the low bits."""
    low, high = codes.to(torch.uint8).chunk(2, -1)
    return low | high << 4


def _joined(scales: Tensor, codes: Tensor) -> Any:
    return torch.cat([scales, codes], -1).flatten(1).numpy()
