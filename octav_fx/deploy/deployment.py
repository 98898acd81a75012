"""deployment(): what a deployed model stores for each operand, and how far its outputs are from the frozen model's."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch import Tensor, nn

from octav_fx.capture.inputs import as_inputs, tensors_of
from octav_fx.capture.modules import QuantizedModule, quantized_modules
from octav_fx.capture.rerun import in_eval_mode, run_once
from octav_fx.deploy.convert import bytes_of, convert, integer_layers, rewritten, size_of
from octav_fx.deploy.export import export_onnx
from octav_fx.deploy.runtimes import run_onnx
from octav_fx.errors import OctavError
from octav_fx.nn import FakeQuantizer, IntegerWeight, StaticQuantizer
from octav_fx.nn.fake_quantizer import QUANTIZERS
from octav_fx.passes import CONVERT


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
    # Largest difference of the operand's values between the frozen and the converted model on the given inputs.
    difference: float | None
    reason: str | None
    # How PyTorch runs the node: "integers", or why it multiplies floats.
    runs: str


@dataclass(frozen=True, slots=True)
class Deployment:
    """The rows, sizes in bytes, and the largest differences to the frozen model's outputs, over the largest output."""

    rows: list[DeployedRow]
    float_bytes: int
    bytes: int
    onnx_bytes: int
    converted_difference: float
    onnx_difference: float

    def __str__(self) -> str:
        cells = [
            (r.node, r.operand, r.bits or "float", _text(r.scale), r.bytes, _text(r.difference), r.reason or "", r.runs)
            for r in self.rows
        ]
        headers = ("node", "operand", "bits", "scale", "bytes", "difference", "reason", "runs")
        table = tabulate(
            cells, headers, disable_numparse=True, colalign=("left", "left", *["right"] * 4, "left", "left")
        )
        share = self.bytes / self.float_bytes if self.float_bytes else 0.0
        return (
            f"{table}\n\n{self.bytes} bytes, {share:.3f} of the float model; ONNX file {self.onnx_bytes} bytes\n"
            f"largest difference to the frozen model, relative to the largest output: converted "
            f"{self.converted_difference:.1e}, onnxruntime {self.onnx_difference:.1e}"
        )


def deployment(q: nn.Module, example_inputs: Any, path: str | os.PathLike[str] | None = None) -> Deployment:
    """Compare a frozen model, convert(q) and its ONNX file, run by onnxruntime, on example_inputs.

    path: where export_onnx wrote the file; None writes one for the comparison. A code at a tie may fall to either side
    when sums are taken in another order, and move everything behind it: a difference is no error by itself. Raises
    OctavError like convert and export_onnx, and for a module with more than one quantized part.
    """
    (quantized, *more) = quantized_modules(q)
    if more or quantized.owner is not q:
        raise OctavError("deployment takes a model that one graph holds, as octav_fx.quantize returned it")
    converted, levels = convert(q), rewritten(q, CONVERT)
    args, kwargs = as_inputs(example_inputs)
    with in_eval_mode(q):
        frozen, operands = _observed(q, FakeQuantizer, args, kwargs)
    found = run_once(converted, args, kwargs)
    # Operands are compared where they are levels; codes are the same.
    _, others = _observed(levels, (StaticQuantizer, IntegerWeight), args, kwargs)
    with tempfile.TemporaryDirectory() as folder:
        if path is None:
            path = Path(folder) / "model.onnx"
            export_onnx(q, example_inputs, path)
        onnx_outputs = list(run_onnx(path, example_inputs).values())
        onnx_bytes = Path(path).stat().st_size
    differences = {name: _difference(others[name], value) for name, value in operands.items() if name in others}
    return Deployment(
        rows=_rows(quantized, levels, differences, dict(integer_layers(converted))),
        float_bytes=_float_bytes(quantized),
        bytes=size_of(converted),
        onnx_bytes=onnx_bytes,
        converted_difference=_relative(tensors_of(found), tensors_of(frozen)),
        onnx_difference=_relative(onnx_outputs, tensors_of(frozen)),
    )


def _observed(
    module: nn.Module, kinds: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Tensor]]:
    """Return the outputs, and what each quantizer returned last."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: seen.update({name: output.detach()})

    named = [(name, part) for name, part in module.named_modules() if isinstance(part, kinds)]
    handles = [part.register_forward_hook(keep(name)) for name, part in named]
    try:
        return run_once(module, args, kwargs), seen
    finally:
        for handle in handles:
            handle.remove()


def _rows(
    q: QuantizedModule, converted: nn.Module, differences: dict[str, float], reasons: dict[str, str | None]
) -> list[DeployedRow]:
    rows, counted = [], set[str]()
    for record in q.all_records[False]:
        runs = reasons.get(record.site, "no rule") or "integers"
        part = None if record.quantizer is None else converted.get_submodule(record.quantizer)
        if not isinstance(part, (IntegerWeight, StaticQuantizer)) or record.quantizer is None:
            rows.append(DeployedRow(record.site, record.operand or "", None, None, None, None, record.reason, runs))
            continue
        stored = 0 if record.quantizer in counted else size_of(part)
        counted.add(record.quantizer)
        difference = differences.get(record.quantizer)
        scale = float(part.scale.mean())
        rows.append(DeployedRow(record.site, record.operand or "", part.bits, scale, stored, difference, None, runs))
    return rows


def _float_bytes(q: QuantizedModule) -> int:
    return bytes_of(value for name, value in q.state_dict().items() if not name.startswith(f"{QUANTIZERS}."))


def _relative(found: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    return max((_difference(f, e) / max(_largest(e), 1e-30) for f, e in pairs), default=0.0)


def _difference(found: Tensor, expected: Tensor) -> float:
    return _largest(found.double() - expected.double())


def _largest(x: Tensor) -> float:
    return float(x.detach().double().abs().max()) if x.numel() else 0.0


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
