"""ONNX files of deployed models: small nets to write, and the ops that onnxruntime makes of a file."""

from collections import Counter
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from octav_fx import Config, calibrate, freeze, quantize
from octav_fx.deploy.runtimes import onnx_session
from tests.support.deployable_models import LANGUAGE, Case, images, models, named


def shortened() -> dict[str, Case]:
    """Every kind of block of the large models, fewer times: exporting takes a time for each node."""
    resnet, efficient = models.resnet, models.efficientnet

    blocks = [efficient.MBConvConfig(*row) for row in ((1, 3, 1, 32, 16, 1), (6, 5, 2, 16, 40, 2))]
    inverted = [[1, 16, 1, 1], [6, 24, 2, 2]]
    return {
        "resnet18": named("resnet18"),
        "resnet50": Case(lambda: resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=10), images),
        "mobilenet_v2": Case(lambda: models.MobileNetV2(10, inverted_residual_setting=inverted), images),
        "mobilenet_v3": Case(lambda: models.MobileNetV3(_settings(), 64, num_classes=10), images),
        "efficientnet_b0": Case(lambda: efficient.EfficientNet(blocks, 0.2, num_classes=10), images),
        "swin_t": Case(lambda: models.SwinTransformer([4, 4], 24, [2, 2], [3, 6], [4, 4], num_classes=10), images),
        "vit_b_16": Case(
            lambda: models.vision_transformer.VisionTransformer(32, 16, 2, 4, 64, 128, num_classes=10), images
        ),
        **LANGUAGE,
    }


def _settings() -> list[object]:
    make = models.mobilenetv3.InvertedResidualConfig
    rows = ((16, 3, 16, 16, True, "RE", 2, 1), (16, 5, 72, 24, True, "HS", 2, 1), (24, 5, 96, 24, True, "HS", 1, 1))
    return [make(*row, 1.0) for row in rows]


def small(*extra: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), *extra, nn.Flatten(), nn.Linear(180, 4)
    ).eval()


def ready(model: nn.Module | None = None, config: Config | None = None) -> tuple[nn.Module, Tensor]:
    x = torch.randn(2, 3, 8, 8)
    q = quantize(small() if model is None else model, x, config)
    return freeze(calibrate(q, [x])), x


def optimized_ops(path: Path) -> Counter[str]:
    """How often each op is in the graph that onnxruntime makes of a file."""
    optimized = path.with_suffix(".optimized")
    onnx_session(path, 1, optimized)
    return Counter(node.op_type for node in onnx.load(optimized).graph.node)
