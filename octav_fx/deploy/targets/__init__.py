"""Runtimes that files are written for, one file each."""

from typing import Final

from octav_fx.deploy.targets.onnx import EXACT, Target
from octav_fx.deploy.targets.onnxruntime import ONNXRUNTIME
from octav_fx.deploy.targets.openvino import OPENVINO
from octav_fx.deploy.targets.tensorrt import TENSORRT

TARGETS: Final[tuple[Target, ...]] = (ONNXRUNTIME, OPENVINO, TENSORRT, EXACT)

__all__ = ["TARGETS", "Target"]
