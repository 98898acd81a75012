"""Models by name, for the README, the command line and the recipes: octav_fx.zoo.load("resnet18").

load() takes the names of torchvision's builders, "timm/NAME", "transformers/TYPE", a folder as transformers saves it,
and any "package.module:callable". torchvision() imports torchvision beside a CPU-only torch, too. octav_fx does not
import this module by itself, and nothing is downloaded.
"""

import contextlib
import importlib
import inspect
from pathlib import Path
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
    """Make a model with random weights: "resnet18" (torchvision), "timm/vit_tiny_patch16_224", "transformers/bert".

    "transformers/FOLDER" has the weights that are saved there; "package.module:callable" is called with the options.
    Raises OctavError for a name that there is not, and for what returns no module.
    """
    if ":" in name:
        model = called(name, **options)
        if not isinstance(model, nn.Module):
            raise OctavError(f"{name} returned {type(model).__name__}, not an nn.Module")
        return model
    library, _, rest = name.partition("/")
    if rest and library == "timm":
        return _timm(rest, options)
    if rest and library == "transformers":
        return _transformers(rest, options)
    models = torchvision().models
    if name not in models.list_models():
        raise OctavError(f"torchvision has no model {name!r}; it has {', '.join(models.list_models())}")
    takes = inspect.signature(models.get_model_builder(name)).parameters
    if "weights_backbone" in takes:
        # The default downloads.
        options.setdefault("weights_backbone", None)
    built: nn.Module = models.get_model(name, weights=None, **options)
    return built


def called(name: str, **options: Any) -> Any:
    """Return what "package.module:callable" returns for these options; a module that is there by a name is itself."""
    module, _, attribute = name.partition(":")
    if module.endswith(".py"):
        raise OctavError(f"no model {name!r}: the name of a module, not of a file, as {Path(module).stem}:{attribute}")
    try:
        builder = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise OctavError(f"no model {name!r}: {error}") from error
    if isinstance(builder, nn.Module) and not options:
        return builder
    try:
        inspect.signature(builder).bind(**options)
    except TypeError as error:
        raise OctavError(f"{name} cannot be called with {options or 'no arguments'}: {error}") from error
    return builder(**options)


def _timm(name: str, options: dict[str, Any]) -> nn.Module:
    # timm imports torchvision.
    torchvision()
    try:
        timm = importlib.import_module("timm")
    except ModuleNotFoundError as error:
        raise OctavError(f"{error.name} is not installed: pip install 'octav_fx[zoo]'") from error
    if not timm.is_model(name):
        raise OctavError(f"timm has no model {name!r}; some are {', '.join(timm.list_models(f'*{name}*')[:8])}")
    model: nn.Module = timm.create_model(name, pretrained=False, **options)
    return model


def _transformers(name: str, options: dict[str, Any]) -> nn.Module:
    # transformers imports torchvision where it is installed.
    with contextlib.suppress(OctavError):
        torchvision()
    try:
        library = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise OctavError(f"{error.name} is not installed: pip install 'octav_fx[zoo]'") from error
    auto = library.AutoModel
    if Path(name).is_dir():
        saved: nn.Module = auto.from_pretrained(name, local_files_only=True, **options)
        return saved
    if name not in library.CONFIG_MAPPING:
        raise OctavError(f"transformers has no type {name!r}, and no folder of that name is here")
    made: nn.Module = auto.from_config(library.AutoConfig.for_model(name, **options))
    return made


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
