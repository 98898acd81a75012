"""What a command works on: a model by name, its inputs, its data, its Config."""

import argparse
import importlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octav_fx import zoo
from octav_fx.config import Config
from octav_fx.errors import OctavError


@dataclass(frozen=True, slots=True)
class Subject:
    """A float model in eval mode, inputs for one call, and batches to calibrate on."""

    model: nn.Module
    inputs: Any
    batches: list[Any]
    # Whether batches are noise, whose clips are not those of data.
    is_noise: bool


def load(options: argparse.Namespace) -> Subject:
    """Make what the options name, seeded; weights are random unless --weights gives a file."""
    torch.manual_seed(0)
    # A callable may bring its inputs: (model, example_inputs).
    made = zoo.called(options.model) if ":" in options.model else zoo.load(options.model)
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise OctavError(f"{options.model} returned {type(model).__name__}, not an nn.Module")
    model.eval()
    if options.input is not None or inputs is None:
        inputs = _noise(model, options.input)
    if options.data is None:
        return Subject(model, inputs, [inputs], is_noise=True)
    batches = list(_batches(options.data, options.batches))
    if not batches:
        raise OctavError(f"--data {options.data} has no batches")
    return Subject(model, inputs, batches, is_noise=False)


def load_weights(model: nn.Module, path: str | None) -> None:
    """Load a state_dict, or the one under "model" of a checkpoint, from a .safetensors or a torch.save file."""
    if path is None:
        return
    try:
        if path.endswith(".safetensors"):
            state = importlib.import_module("safetensors.torch").load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise OctavError(f"--weights {path}: {error}") from error
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    try:
        model.load_state_dict(state, strict=True)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise OctavError(f"--weights {path} is not a state of this model: {error}") from error


def config(options: argparse.Namespace) -> Config:
    """Return the Config of --config, a JSON object or a file of one, with the fields of single options laid over it.

    Fields that neither names are the command's own.
    """
    values: dict[str, Any] = dict(options.fields)
    if options.config is not None:
        try:
            is_text = options.config.lstrip().startswith("{")
            values |= json.loads(options.config if is_text else Path(options.config).read_text())
        except (OSError, TypeError, ValueError) as error:
            raise OctavError(f"--config {options.config}: {error}") from error
    single = {name: getattr(options, name) for name in ("weight_bits", "activation_bits", "clip", "attention")}
    values |= {name: value for name, value in single.items() if value is not None}
    for name in ("edge_bits", "residual_bits"):
        if (value := getattr(options, name)) is not None:
            values[name] = _bits(name, value)
    overrides = dict(values.get("overrides", {}))
    for text in options.override:
        pattern, equals, given = text.rpartition("=")
        if not equals:
            raise OctavError(f"--override {text}: GLOB=BITS, or GLOB=float")
        bits = _bits("override", given, float_name="float")
        overrides[pattern] = None if bits is None else {"weight_bits": bits, "activation_bits": bits}
    return Config.from_dict(values | {"overrides": overrides})


def _bits(name: str, text: str, float_name: str = "none") -> int | None:
    if text == float_name:
        return None
    try:
        return int(text)
    except ValueError:
        raise OctavError(f"--{name.replace('_', '-')} {text}: a number of bits, or {float_name}") from None


def _noise(model: nn.Module, shape: str | None) -> Any:
    """Return random inputs of a shape, by default of the one that the model says it takes."""
    sizes = None
    if shape is not None:
        try:
            sizes = [int(size) for size in shape.split("x")]
        except ValueError:
            raise OctavError(f"--input {shape}: sizes joined by x, as in 1x3x224x224") from None
    own: Any = getattr(model, "config", None)
    name = getattr(model, "main_input_name", None)
    if name == "input_ids" and hasattr(own, "vocab_size"):
        return {name: torch.randint(own.vocab_size, sizes or [1, 32])}
    if name == "pixel_values" and hasattr(own, "image_size"):
        side = own.image_size
        height, width = side if isinstance(side, (tuple, list)) else (side, side)
        return {name: torch.randn(sizes or [1, getattr(own, "num_channels", 3), height, width])}
    of_timm = getattr(model, "default_cfg", None) or {}
    return torch.randn(sizes or [1, *of_timm.get("input_size", (3, 224, 224))])


def _batches(name: str, count: int) -> Iterator[Any]:
    """Return the first batches of what "package.module:callable" returns; labels of (inputs, labels) are dropped."""
    if ":" not in name:
        raise OctavError(f"--data {name}: package.module:callable, which returns batches")
    found = zoo.called(name)
    if not isinstance(found, Iterable):
        raise OctavError(f"--data {name} returned {type(found).__name__}, not batches")
    for batch in itertools.islice(found, count):
        is_labelled = isinstance(batch, (tuple, list)) and len(batch) == 2 and not _is_float(batch[1])
        yield batch[0] if is_labelled else batch


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
