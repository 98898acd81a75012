"""Models by name, for the README, the command line and the recipes: octav_fx.zoo.load("resnet18").

load() takes the names of torchvision's builders, and any "package.module:callable". torchvision() imports torchvision
beside a CPU-only torch, too. They are called by these names, and octav_fx does not import this module by itself.
"""

import importlib
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from octav_fx.compat.modules import allow_missing_binary_ops
from octav_fx.errors import OctavError


def torchvision() -> Any:
    """Import torchvision, beside a CPU-only torch too.

    Its wheels want CUDA libraries for the binary ops; without them the import fails on the missing schemas of two
    detection ops, which are declared here first.
    """
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        raise OctavError("torchvision is not installed: pip install 'octav_fx[models]'") from error
    except RuntimeError:
        _declare_missing_ops()
        found = importlib.import_module("torchvision")
        # nms is there by now without the library of binary ops that it asks for.
        allow_missing_binary_ops(found)
        return found


def load(name: str, **options: Any) -> nn.Module:
    """Make a model with random weights: "resnet18", "fcn_resnet50" (torchvision) or "package.module:callable"."""
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            builder = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise OctavError(f"no model {name!r}: {error}") from error
        model = builder(**options)
        if not isinstance(model, nn.Module):
            raise OctavError(f"{name} returned {type(model).__name__}, not an nn.Module")
        return model
    models = torchvision().models
    if name not in models.list_models():
        raise OctavError(f"torchvision has no model {name!r}; it has {', '.join(models.list_models())}")
    takes = inspect.signature(models.get_model_builder(name)).parameters
    if "weights_backbone" in takes:
        # The default downloads.
        options.setdefault("weights_backbone", None)
    built: nn.Module = models.get_model(name, weights=None, **options)
    return built


def _declare_missing_ops() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for op in ("nms", "qnms"):
        library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", _nms, "CPU")
    # A library takes its definitions along when it is collected.
    _LIBRARIES.append(library)


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Return the indices of the boxes [N, 4] (x1, y1, x2, y2) that no better one covers, best first."""
    left = scores.argsort(descending=True, stable=True)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    kept = []
    while left.numel():
        best, left = left[0], left[1:]
        kept.append(best)
        overlap = torch.minimum(boxes[best, 2:], boxes[left, 2:]) - torch.maximum(boxes[best, :2], boxes[left, :2])
        shared = overlap.clamp(min=0).prod(1)
        left = left[shared <= iou_threshold * (area[best] + area[left] - shared)]
    return torch.stack(kept) if kept else scores.new_empty(0, dtype=torch.long)


_LIBRARIES: list[torch.library.Library] = []
