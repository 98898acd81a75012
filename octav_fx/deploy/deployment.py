"""deployment(): what a deployed model stores for each operand, how it runs, and how far it is from the frozen one."""

import copy
import importlib.util
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tabulate import tabulate
from torch import Tensor, nn

from octav_fx.capture.inputs import Inputs, as_inputs, tensors_of
from octav_fx.capture.integer_module import IntegerModule
from octav_fx.capture.module_state import own_copy
from octav_fx.capture.modules import graphs_of
from octav_fx.capture.partial import float_records
from octav_fx.capture.rerun import run_once
from octav_fx.deploy.codes import codes_of_quantizers, moved, nodes_on_codes
from octav_fx.deploy.convert import bytes_of, convert, integer_layers, multiplied, rewritten, size_of
from octav_fx.deploy.export import export_onnx
from octav_fx.deploy.latency import latencies
from octav_fx.deploy.runtimes import run_onnx
from octav_fx.ir.meta import info
from octav_fx.ir.records import Record, graph_info
from octav_fx.ir.sites import in_model
from octav_fx.nn import IntegerWeight, StaticQuantizer, StoredWeight
from octav_fx.nn.fake_quantizer import QUANTIZERS
from octav_fx.passes import CONVERT

# How a node runs that multiplies nothing, or that no rule takes, between layers of integers.
_FLOAT: Final = "computes in float"


@dataclass(frozen=True, slots=True)
class DeployedRow:
    """One operand. bits, scale and bytes are None, and reason is not, where it stays float."""

    node: str
    operand: str
    bits: int | None
    # Mean over the channels, in the units of the operand.
    scale: float | None
    # Of codes and scales; 0 for an operand that shares the quantizer of an earlier row.
    bytes: int | None
    # Share of the codes of an activation that convert(q) gives otherwise than the frozen model, on the given inputs.
    moved: float | None
    reason: str | None
    # How PyTorch runs the node: "integers", or why it multiplies floats.
    runs: str


@dataclass(frozen=True, slots=True)
class Deployment:
    """The rows, sizes in bytes, and the largest differences to the frozen model's outputs, over the largest output.

    latency: milliseconds of one call by runtime, or why it does not run; empty unless asked for.
    """

    rows: list[DeployedRow]
    float_bytes: int
    bytes: int
    onnx_bytes: int
    converted_difference: float
    onnx_difference: float
    latency: dict[str, float | str] = field(default_factory=dict)

    def __str__(self) -> str:
        cells = [
            (r.node, r.operand, r.bits or "float", _text(r.scale), r.bytes, _text(r.moved), r.reason or "", r.runs)
            for r in self.rows
        ]
        headers = ("node", "operand", "bits", "scale", "bytes", "moved", "reason", "runs")
        table = tabulate(
            cells, headers, disable_numparse=True, colalign=("left", "left", *["right"] * 4, "left", "left")
        )
        share = self.bytes / self.float_bytes if self.float_bytes else 0.0
        text = (
            f"{table}\n\n{self.bytes} bytes, {share:.3f} of the float model; ONNX file {self.onnx_bytes} bytes\n"
            f"largest difference to the frozen model, relative to the largest output: converted "
            f"{self.converted_difference:.1e}, onnxruntime {self.onnx_difference:.1e}"
        )
        return "\n".join([text, *(f"{name}: {_milliseconds(value)}" for name, value in self.latency.items())])


def deployment(
    q: nn.Module, example_inputs: Any, path: str | os.PathLike[str] | None = None, *, latency: bool = False
) -> Deployment:
    """Compare a frozen model, convert(q) and its ONNX file, run by onnxruntime, on example_inputs.

    path: where export_onnx wrote the file; None writes one for the comparison. latency: time one call of the float and
    the deployed model in each runtime that is installed, which compiles both. A code at a tie may fall to either side
    when sums are scaled in another order, and move everything behind it: a difference is no error by itself. Raises
    OctavError like convert and export_onnx.
    """
    levels = rewritten(q, CONVERT)
    converted, defined = multiplied(copy.deepcopy(levels)), convert(q, integers=False)
    call = as_inputs(example_inputs)
    frozen, found = run_once(defined, *call), run_once(converted, *call)
    shares = moved(codes_of_quantizers(converted, *own_copy(call)), codes_of_quantizers(defined, *own_copy(call)))
    with tempfile.TemporaryDirectory() as folder:
        if path is None:
            path = Path(folder) / "model.onnx"
            export_onnx(q, example_inputs, path, dynamic_batch=False)
        onnx_outputs = list(run_onnx(path, example_inputs).values())
        onnx_bytes = Path(path).stat().st_size
        measured = _latencies(q, converted, path, call, Path(folder)) if latency else {}
    return Deployment(
        rows=_rows(q, levels, shares, {**_in_float(converted), **dict(integer_layers(converted))}),
        float_bytes=_float_bytes(q),
        bytes=size_of(converted),
        onnx_bytes=onnx_bytes,
        converted_difference=_relative(tensors_of(found), tensors_of(frozen)),
        onnx_difference=_relative(onnx_outputs, tensors_of(frozen)),
        latency=measured,
    )


def _latencies(
    q: nn.Module, converted: nn.Module, path: str | os.PathLike[str], call: Inputs, folder: Path
) -> dict[str, float | str]:
    files: dict[str, str | os.PathLike[str]] = {"onnxruntime": path}
    if importlib.util.find_spec("openvino") is not None:
        files["openvino"] = folder / "openvino.onnx"
        export_onnx(q, call.kwargs or call.args, files["openvino"], target="openvino", dynamic_batch=False)
    return latencies(q, converted, files, call)


def _in_float(converted: nn.Module) -> dict[str, str]:
    """Return the nodes of a converted model that compute on floats still. Most that are on codes now have no name."""
    found = set[str]()
    for module in converted.modules():
        if isinstance(module, IntegerModule):
            known = graph_info(module)
            floats = set(module.graph.nodes) - nodes_on_codes(module.graph)
            sites = {site for node in floats if (site := info(node).site) is not None}
            found |= {in_model(site, known.path, known.is_op) for site in sites}
    return dict.fromkeys(found, _FLOAT)


def _rows(
    q: nn.Module, levels: nn.Module, shares: dict[str, float], reasons: dict[str, str | None]
) -> list[DeployedRow]:
    rows, counted = [], set[str]()
    for path, record in _records(q):
        runs = reasons.get(record.site, None if record.quantizer else _FLOAT) or "integers"
        part = None if path is None else levels.get_submodule(path)
        if path is None or not isinstance(part, (IntegerWeight, StaticQuantizer, StoredWeight)):
            rows.append(DeployedRow(record.site, record.operand or "", None, None, None, None, record.reason, runs))
            continue
        stored = 0 if path in counted else size_of(part)
        counted.add(path)
        scale, share = float(part.scale.mean()), shares.get(path)
        bits = part.spec.format.bits if isinstance(part, StoredWeight) else part.bits
        rows.append(DeployedRow(record.site, record.operand or "", bits, scale, stored, share, None, runs))
    return rows


def _records(q: nn.Module) -> list[tuple[str | None, Record]]:
    """Return each record of eval mode and the path in q of its quantizer; None for what stays float."""
    found: list[tuple[str | None, Record]] = []
    for path, module in q.named_modules():
        for record in () if (graphs := graphs_of(module)) is None else graphs.all_records[False]:
            # The path of the outermost module is no part of those below it.
            found.append((record.quantizer and f"{path}.{record.quantizer}".removeprefix("."), record))
    return [*found, *((None, record) for record in float_records(q))]


def _float_bytes(q: nn.Module) -> int:
    return bytes_of(value for name, value in q.state_dict().items() if QUANTIZERS not in name.split("."))


def _relative(found: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    return max((_difference(f, e) / max(_largest(e), 1e-30) for f, e in pairs), default=0.0)


def _difference(found: Tensor, expected: Tensor) -> float:
    return _largest(found.double() - expected.double())


def _largest(x: Tensor) -> float:
    return float(x.detach().double().abs().max()) if x.numel() else 0.0


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _milliseconds(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.2f} ms"
