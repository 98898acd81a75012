"""ONNX files of deployed models: small nets to write, and the ops that onnxruntime makes of a file."""

from collections import Counter
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from octav_fx import Config, calibrate, freeze, quantize
from octav_fx.deploy.runtimes import onnx_session


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
