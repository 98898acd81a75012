"""The models of the coverage benchmark: every one of torchvision, one of each timm family, and of transformers."""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks import zoo_timm, zoo_transformers
from octav_fx import zoo

# Smaller inputs than these are too small for one of their poolings, or not what their position codes fit.
_PIXELS = {"inception_v3": 160, "maxvit_t": 224, "vit_": 32, "vit_h_14": 28, "mvit": 224, "s3d": 224, "raft": 128}
_FRAMES = {"mvit": 16, "s3d": 14}
# Detectors resize what they are given; their own size takes minutes.
_DETECTOR_PIXELS = 160


@dataclass(frozen=True)
class Entry:
    """A model by name, and what makes it: (model, example inputs as octav_fx.quantize takes them)."""

    library: str
    family: str
    name: str
    make: Callable[[str], tuple[nn.Module, Any]]
    # Whether it computes something without targets in training mode too.
    trains: bool = True


def entries() -> list[Entry]:
    """All of them whose library is installed."""
    # Before timm, which imports it, too.
    images = _torchvision()
    found = []
    if _installed("transformers"):
        found += [Entry("transformers", row.family, row.name, zoo_transformers.make) for row in zoo_transformers.MODELS]
    if _installed("timm"):
        found += [Entry("timm", family, name, zoo_timm.make) for family, (name, _) in zoo_timm.MODELS.items()]
    return found + images


def _installed(library: str) -> bool:
    try:
        importlib.import_module(library)
    except ModuleNotFoundError:
        return False
    return True


def _torchvision() -> list[Entry]:
    models = zoo.torchvision().models
    rows = []
    for name in models.list_models():
        path = models.get_model_builder(name).__module__.removeprefix("torchvision.models.")
        # Quantized kernels, not models to train.
        if not path.startswith("quantization."):
            make = _detector if path.startswith("detection.") else functools.partial(_image_model, path)
            rows.append(Entry("torchvision", path, name, make, make is not _detector))
    return rows


def _image_model(path: str, name: str) -> tuple[nn.Module, Any]:
    pixels = _longest(_PIXELS, name, 64)
    options: dict[str, Any] = {"image_size": pixels} if name.startswith("vit_") else {}
    if name in ("googlenet", "inception_v3"):
        # Minutes of scipy.
        options["init_weights"] = False
    model = zoo.load(name, **options)
    if path.startswith("video."):
        return model, torch.randn(2, 3, _longest(_FRAMES, name, 8), pixels, pixels)
    if path.startswith("optical_flow."):
        return model, (torch.randn(2, 3, pixels, pixels), torch.randn(2, 3, pixels, pixels))
    return model, torch.randn(2, 3, pixels, pixels)


def _detector(name: str) -> tuple[nn.Module, Any]:
    size = {} if name.startswith("ssd") else {"min_size": _DETECTOR_PIXELS, "max_size": _DETECTOR_PIXELS}
    model = zoo.load(name, **size)
    return model, ([torch.rand(3, _DETECTOR_PIXELS, _DETECTOR_PIXELS) for _ in range(2)],)


def _longest(table: dict[str, int], name: str, default: int) -> int:
    """The value of the longest prefix of name in the table."""
    fitting = [prefix for prefix in table if name.startswith(prefix)]
    return table[max(fitting, key=len)] if fitting else default
