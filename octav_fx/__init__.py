"""octav_fx: quantization-aware training at float speed, for anyone's PyTorch model, in one line."""

from octav_fx.config import Config
from octav_fx.deploy.convert import convert
from octav_fx.deploy.deployment import DeployedRow, Deployment, deployment
from octav_fx.deploy.export import export_onnx
from octav_fx.deploy.freeze import calibrate, freeze, unfreeze
from octav_fx.deploy.targets.compressed_tensors import export_compressed_tensors
from octav_fx.deploy.targets.gguf import export_gguf
from octav_fx.errors import OctavError
from octav_fx.functional import fake_quantize, optimal_clip
from octav_fx.ir.op import Op as Rule
from octav_fx.ir.op import activation, either, weight
from octav_fx.optim import pact_penalty, param_groups
from octav_fx.reporting.report.page import report
from octav_fx.reporting.rows import Coverage, Row, Rows, coverage, rows
from octav_fx.reporting.table import table
from octav_fx.training.check import check
from octav_fx.training.quantize import float_mode, quantize
from octav_fx.training.state import load_state, state
from octav_fx.version import __version__

__all__ = [
    "Config",
    "Coverage",
    "DeployedRow",
    "Deployment",
    "OctavError",
    "Row",
    "Rows",
    "Rule",
    "__version__",
    "activation",
    "calibrate",
    "check",
    "convert",
    "coverage",
    "deployment",
    "either",
    "export_compressed_tensors",
    "export_gguf",
    "export_onnx",
    "fake_quantize",
    "float_mode",
    "freeze",
    "load_state",
    "optimal_clip",
    "pact_penalty",
    "param_groups",
    "quantize",
    "report",
    "rows",
    "state",
    "table",
    "unfreeze",
    "weight",
]
