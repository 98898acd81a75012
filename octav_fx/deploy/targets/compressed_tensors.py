"""compressed-tensors: a folder of transformers', with weights as packed codes, that vLLM and transformers load.

The format is that of github.com/vllm-project/compressed-tensors since 0.18. Its symmetric integers are our signed grid:
codes -2**(bits-1) .. 2**(bits-1)-1 and a scale, no zero point.
"""

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from octav_fx.deploy.files import replacing
from octav_fx.deploy.layers import LinearLayer, float_state, linear_layers, scales_in
from octav_fx.deploy.targets.compressed_floats import FLOATS
from octav_fx.errors import OctavError
from octav_fx.formats.grid import Grid
from octav_fx.formats.spec import Spec
from octav_fx.nn import FakeQuantizer

_WORD: Final = 32
# Codes in bits of their own; a byte each, which is what readers take that multiply integers.
_PACKED: Final = "pack-quantized"
_BYTES: Final = "int-quantized"


def export_compressed_tensors(q: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a frozen transformers model as a folder with compressed weights, which from_pretrained and vLLM read.

    Weights of linear layers are the codes that q computes with, 2 to 8 bits with a scale for each channel, tensor or
    group, and read back they are q's levels to the bit. So are MXFP4 and MXFP8 in a model of bfloat16, which readers
    take them for, and NVFP4 but for the division by its float32 scale. Activations stay float, or are integers with one
    static clip ("int-quantized", a byte for each weight); with a clip for each token, the reader finds it by a rule of
    its own, the largest magnitude over 127.5, which a warning says. Embeddings, norms and what q has in float stay as
    they are.

    q: of a class of transformers, in the dtype to be written, and not changed. Save the tokenizer beside it:
    tokenizer.save_pretrained(folder). Raises OctavError for another model, for one that is not frozen, for what the
    format cannot say (a rounded operand of attention, a convolution, another format of numbers), and for a scale that
    the dtype of the model does not hold: scale_format="bfloat16" makes one that bfloat16 does.
    """
    # What PEFT wraps has the same methods, and saves adapters alone.
    if all(kind.__name__ != "PreTrainedModel" for kind in type(q).__mro__):
        raise OctavError(f"{type(q).__name__} is no model of transformers: this format is a folder that it loads")
    layers = linear_layers(q)
    if any(layer.input is not None and layer.input.by_row for layer in layers):
        warnings.warn(
            "octav_fx: what reads compressed-tensors finds the scale of a token by its own rule, the largest magnitude "
            "over 127.5 steps of 8 bits: activations get other codes than in the model that was trained",
            stacklevel=2,
        )
    tensors, groups, weights = float_state(q), dict[str, list[str]](), set[int]()
    for layer in layers:
        weight = tensors.pop(f"{layer.name}.weight")
        weights.add(weight.data_ptr())
        scheme = _scheme(layer)
        tensors |= {f"{layer.name}.{key}": value for key, value in _stored(layer, scheme, weight).items()}
        groups.setdefault(json.dumps(scheme, sort_keys=True), []).append(layer.name)
    schemes = [{"targets": names, **json.loads(text)} for text, names in groups.items()]
    changes: dict[str, Any] = {"quantization_config": _config(q, layers, schemes)}
    if any(value.data_ptr() == taken for value in tensors.values() for taken in weights):
        # An embedding that shares the weight of a layer stays float.
        changes["tie_word_embeddings"] = False
    _save(q, Path(folder), tensors, changes)


def _scheme(layer: LinearLayer) -> dict[str, Any]:
    """Return what the format says of a layer but its name. Raises OctavError for what it cannot say."""
    spec, rounded = layer.weight.spec, layer.input
    activations = None if rounded is None else _activations(layer.name, rounded)
    described = {"input_activations": activations, "output_activations": None}
    if (kind := FLOATS.get(str(spec))) is not None:
        if rounded is not None:
            raise OctavError(f"{layer.name}: activations stay float beside weights in {spec}: activation_bits=None")
        return {"format": kind.name, "weights": dict(kind.arguments), **described}
    if not isinstance(spec.format, Grid) or spec.granularity.kind not in ("tensor", "channel", "group"):
        raise OctavError(
            f"{layer.name}: compressed-tensors has no {spec}: integers, or one of {', '.join(map(repr, FLOATS))}"
        )
    size = spec.granularity.size
    # One scale for the tensor is one for each channel: vLLM reads no packed weights of the former.
    shared = {"strategy": "channel"} if size is None else {"strategy": "group", "group_size": size}
    form = _PACKED if rounded is None else _BYTES
    return {"format": form, "weights": {**_integers(spec), **shared, "dynamic": False}, **described}


def _integers(spec: Spec) -> dict[str, Any]:
    return {"num_bits": spec.format.bits, "type": "int", "symmetric": spec.format.signed}


def _activations(name: str, rounded: FakeQuantizer) -> dict[str, Any]:
    spec = rounded.spec
    by_token = spec.granularity.kind == "token"
    if not isinstance(spec.format, Grid) or not (by_token or spec.granularity.kind == "tensor"):
        raise OctavError(f"{name}: activations of compressed-tensors are integers of tensors or tokens, not {spec}")
    return {**_integers(spec), "strategy": spec.granularity.kind, "dynamic": by_token}


def _stored(layer: LinearLayer, scheme: Mapping[str, Any], values: Tensor) -> dict[str, Tensor]:
    """Return the tensors of a layer by their names in it; values: its float weight, of the dtype of the model."""
    weight, rounded, dtype = layer.weight, layer.input, values.dtype
    if (kind := FLOATS.get(str(weight.spec))) is not None:
        return kind.stored(weight, values)
    codes, scale = weight.integers(), weight.scale
    if scheme["weights"]["strategy"] == "channel":
        scale = scale.reshape(-1, 1).expand(len(codes), 1)
    stored = {"weight_scale": scales_in(dtype, layer.name, scale)}
    if scheme["format"] == _PACKED:
        stored["weight_packed"] = pack_into_words(codes, weight.spec.format.bits)
        stored["weight_shape"] = torch.tensor(codes.shape)
    else:
        stored["weight"] = codes
    if rounded is not None and rounded.clip is not None:
        stored["input_scale"] = scales_in(dtype, layer.name, rounded.spec.format.step(rounded.clip).reshape(1))
        if not rounded.spec.format.signed:
            stored["input_zero_point"] = torch.tensor([_lowest(rounded.spec)], dtype=torch.int8)
    return stored


def _lowest(spec: Spec) -> int:
    """Return the code that stands for zero on an unsigned grid, which is stored as a signed one."""
    return -(2 ** (spec.format.bits - 1))


def pack_into_words(codes: Tensor, bits: int) -> Tensor:
    """Pack signed codes [R, C] into int32 [R, ceil(C * bits / 32)], each counted from the lowest; the first is lowest.

    Words are filled to the last bit: a code of 3, 5, 6 or 7 bits may lie in two.
    """
    counted = codes.to(torch.int64) + 2 ** (bits - 1)
    each = counted.unsqueeze(-1) >> torch.arange(bits, device=codes.device) & 1
    stream = nn.functional.pad(each.flatten(1), (0, -codes.shape[1] * bits % _WORD))
    words = (stream.reshape(len(codes), -1, _WORD) << torch.arange(_WORD, device=codes.device)).sum(-1)
    # The highest bit of a word is its sign.
    return torch.where(words >= 2 ** (_WORD - 1), words - 2**_WORD, words).to(torch.int32)


def _config(q: nn.Module, layers: list[LinearLayer], schemes: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what stands in config.json under quantization_config."""
    names = {layer.name for layer in layers}
    formats = {scheme["format"] for scheme in schemes}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{index}": scheme for index, scheme in enumerate(schemes)},
        "ignore": [name for name, module in q.named_modules() if isinstance(module, nn.Linear) and name not in names],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _save(q: Any, folder: Path, tensors: dict[str, Tensor], changes: dict[str, Any]) -> None:
    """Let transformers write the files of a model, and change what its config.json says."""
    try:
        q.save_pretrained(folder, state_dict=tensors)
        path = folder / "config.json"
        config = {**json.loads(path.read_text()), **changes}
        with replacing(path) as draft:
            draft.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise OctavError(f"{folder} cannot be written: {error.strerror}; give another folder") from error
