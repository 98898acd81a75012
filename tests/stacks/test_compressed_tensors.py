"""Weights as compressed-tensors, an encoder that others serve, writes and reads them: equal levels at equal scales."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from octav_fx import Config, OctavError, calibrate, export_compressed_tensors, freeze, quantize, zoo
from octav_fx.deploy.layers import linear_layers
from octav_fx.formats.scales import tensor_scale
from octav_fx.formats.spec import spec_of

pytestmark = pytest.mark.stacks

# Its preset, its compressor, and ours. Scales of float32, as its integers and FP8 have them, are of any format there.
CASES = {
    "NVFP4A16": ("NVFP4PackedCompressor", "e2m1/group-16.1/e4m3"),
    "MXFP4A16": ("MXFP4PackedCompressor", "e2m1/group-32.1/e8m0"),
    "MXFP8A16": ("MXFP8QuantizationCompressor", "e4m3/group-32.1/e8m0"),
    "W4A16": ("PackedQuantizationCompressor", "int4/group-128.1"),
    "W8A16": ("PackedQuantizationCompressor", "int8/channel.0"),
}


@pytest.fixture
def library() -> Any:
    zoo.torchvision()
    return pytest.importorskip("compressed_tensors")


def weight() -> Tensor:
    """A weight whose largest magnitude is that of E2M1 times that of E4M3: the scale of the tensor of NVFP4 is 1."""
    x = torch.randn(24, 256) * torch.randn(24, 1).exp() * 100
    return x.clamp(-6 * 448, 6 * 448).index_put((torch.tensor([3]), torch.tensor([5])), torch.tensor(6 * 448.0))


@pytest.mark.parametrize("preset", CASES)
@pytest.mark.parametrize("method", ["octav", "max"])
def test_levels_are_those_that_it_writes_and_reads(library: Any, preset: str, method: str) -> None:
    from compressed_tensors import compressors
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    name, text = CASES[preset]
    compressor, scheme = getattr(compressors, name), preset_name_to_scheme(preset, ["Linear"])
    spec, x = spec_of(text), weight()
    hint = torch.zeros(() if spec.granularity.is_short else spec.clip_shape(x.shape))
    clip = torch.ops.octav.optimal_clip(x, hint, text, method)
    ours = torch.ops.octav.fake_quantize(x, clip, text, "ste")
    scale = spec.format.step(clip).reshape(len(x), -1)
    tensors = {"weight": x, "weight_scale": scale}
    if preset.startswith("NVFP4"):
        assert tensor_scale(x, spec.format) == 1
        tensors["weight_global_scale"] = torch.ones(1)
    theirs = compressor.decompress(compressor.compress(tensors, scheme), scheme)["weight"]
    # It reads FP4 into bfloat16, which holds these products.
    assert torch.equal(theirs.float(), ours)


LLAMA = {
    **{"vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
}
TOKENS = torch.arange(24).reshape(2, 12) * 7 % 96


def frozen(kind: str, config: Config, **settings: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    made = getattr(transformers, f"{kind}Config")(**settings)
    q = quantize(getattr(transformers, f"{kind}ForCausalLM")(made).eval(), {"input_ids": TOKENS}, config)
    return freeze(calibrate(q, [{"input_ids": TOKENS}]))


def read(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group-32"])
def test_a_folder_of_weights_computes_the_same(library: Any, tmp_path: Path, bits: int, granularity: str) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    q = frozen("Llama", Config(bits, None, weight_granularity=granularity), **LLAMA)
    export_compressed_tensors(q, tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    # It raises for keys that it does not know.
    groups = QuantizationConfig.model_validate(described).config_groups.values()
    assert sum(len(group.targets) for group in groups) == 15
    assert torch.equal(logits(read(tmp_path)), logits(q))


def test_weights_in_half_precision_are_the_levels_of_the_model(library: Any, tmp_path: Path) -> None:
    config = Config(4, None, weight_granularity="group-32", scale_format="bfloat16", edge_bits=None)
    q = frozen("Llama", config, **LLAMA, dtype=torch.bfloat16)
    q = freeze(q.bfloat16())
    export_compressed_tensors(q, tmp_path)
    found = read(tmp_path)
    logits(found)
    for layer in linear_layers(q):
        assert torch.equal(found.get_submodule(layer.name).weight, layer.weight())


def test_a_scale_that_the_dtype_does_not_hold(library: Any, tmp_path: Path) -> None:
    q = freeze(frozen("Llama", Config(4, None, edge_bits=None), **LLAMA).bfloat16())
    with pytest.raises(OctavError, match=r"does not hold its scales.*'scale_format': 'bfloat16'"):
        export_compressed_tensors(q, tmp_path)


def test_a_head_that_was_tied_to_the_embedding(library: Any, tmp_path: Path) -> None:
    q = frozen("Llama", Config(4, None), **LLAMA, tie_word_embeddings=True)
    export_compressed_tensors(q, tmp_path)
    found = read(tmp_path)
    assert torch.equal(logits(found), logits(q))
    assert found.model.embed_tokens.weight.unique().numel() > 2**8


def test_a_tied_head_that_stays_float(library: Any, tmp_path: Path) -> None:
    q = frozen("Llama", Config(4, None, overrides={"lm_head": None}), **LLAMA, tie_word_embeddings=True)
    export_compressed_tensors(q, tmp_path)
    found = read(tmp_path)
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert torch.equal(logits(found), logits(q))


def test_adapters_are_no_model_of_transformers(library: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    q = quantize(adapted.eval(), {"input_ids": TOKENS}, Config(4, None, edge_bits=None))
    with pytest.raises(OctavError, match="is no model of transformers"):
        export_compressed_tensors(freeze(q), tmp_path)


OPT = {
    **{"vocab_size": 96, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"max_position_embeddings": 64, "word_embed_proj_dim": 64},
}


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("weight_bits", [4, 8])
def test_static_clips_of_activations(library: Any, tmp_path: Path, weight_bits: int, signed: bool) -> None:
    """Behind the ReLU codes are unsigned, which the format says with a zero point of the lowest code."""
    config = Config(weight_bits, 8, signed_activations=signed, overrides={"*.attention": None})
    q = frozen("OPT", config, **OPT)
    export_compressed_tensors(q, tmp_path)
    found = read(tmp_path)
    kinds = {hasattr(module, "input_zero_point") for module in found.modules() if hasattr(module, "input_scale")}
    assert kinds == ({False} if signed else {False, True})
    # q multiplies codes and scales their sums, it sums products of levels: less than half a step of a code that does
    # not move, of 255 in the largest activation.
    assert (logits(found) - logits(q)).abs().max() < 1e-5 * logits(q).abs().max()


def test_a_clip_for_each_token_is_the_readers_own(library: Any, tmp_path: Path) -> None:
    config = Config(8, 8, activation_granularity="token", overrides={"*.attention": None})
    q = frozen("Llama", config, **LLAMA)
    with pytest.warns(UserWarning, match="finds the scale of a token by its own rule"):
        export_compressed_tensors(q, tmp_path)
    # Two roundings to 8 bits with scales that differ by less than a step.
    assert (logits(read(tmp_path)) - logits(q)).abs().max() < 0.05 * logits(q).abs().max()


def test_products_of_attention_are_refused(library: Any, tmp_path: Path) -> None:
    with pytest.raises(OctavError, match=r"attention (query|key|value) is quantized.*overrides="):
        export_compressed_tensors(frozen("Llama", Config(8, 8), **LLAMA), tmp_path)
    assert not any(tmp_path.iterdir())


FLOATS = {
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"weight_format": "e2m1", "weight_granularity": "group-16", "scale_format": "e4m3"},
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {"weight_format": "e2m1", "weight_granularity": "group-32", "scale_format": "e8m0"},
    ),
    "mxfp8": ("mxfp8-quantized", {"weight_format": "e4m3", "weight_granularity": "group-32", "scale_format": "e8m0"}),
}


@pytest.mark.parametrize("name", FLOATS)
def test_small_floats_in_a_model_of_bfloat16(library: Any, tmp_path: Path, name: str) -> None:
    described, fields = FLOATS[name]
    q = frozen("Llama", Config(8 if name == "mxfp8" else 4, None, edge_bits=None, **fields), **LLAMA)
    q = freeze(q.bfloat16())
    export_compressed_tensors(q, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["format"] == described
    found = read(tmp_path)
    logits(found)
    for layer in linear_layers(q):
        theirs, ours = found.get_submodule(layer.name).weight, layer.weight()
        # The scale of the tensor is divided by, whose inverse is rounded once: the next bfloat16, where that matters.
        assert torch.equal(theirs, ours) or (name == "nvfp4" and (theirs / ours - 1).nan_to_num().abs().max() <= 2**-7)


def test_other_formats_are_refused(library: Any, tmp_path: Path) -> None:
    with pytest.raises(OctavError, match=r"has no ternary/channel\.0: integers, or one of"):
        export_compressed_tensors(frozen("Llama", Config(2, None, weight_format="ternary"), **LLAMA), tmp_path)
    config = Config(4, 8, weight_format="e2m1", weight_granularity="group-32", scale_format="e8m0", edge_bits=None)
    overrides = {"*.attention": None, "*/input": {"scale_format": "float32"}}
    with pytest.raises(OctavError, match="activations stay float beside weights in e2m1"):
        q = frozen("Llama", dataclasses.replace(config, overrides=overrides), **LLAMA)
        export_compressed_tensors(q, tmp_path)
