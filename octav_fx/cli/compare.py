"""The float and the quantized model side by side, in PyTorch and in onnxruntime."""

import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octav_fx.capture.inputs import Inputs, as_inputs, tensors_of
from octav_fx.deploy.convert import bytes_of, convert, size_of
from octav_fx.deploy.export import export_onnx
from octav_fx.deploy.runtimes import onnx_runner, write_float_onnx
from octav_fx.errors import OctavError


def compared(
    model: nn.Module,
    q: nn.Module,
    example_inputs: Any,
    *,
    seconds: float,
    quantized_file: str | os.PathLike[str] | None = None,
) -> list[dict[str, Any]]:
    """Return a value for each way to run a float model and its frozen quantized one on the same inputs.

    ms is the least of what fits into seconds, None for 0; speedup is that to float in the same runtime; sqnr of the
    outputs against the float model's, in dB, None where they are the same. Where a runtime cannot hold the model, note
    says why.
    """
    call = as_inputs(example_inputs)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        float_file = Path(folder) / "float.onnx"
        file = Path(folder) / "quantized.onnx" if quantized_file is None else Path(quantized_file)
        makers: dict[tuple[str, str], Callable[[], tuple[Callable[[], list[Tensor]], int]]] = {
            ("float", "PyTorch"): lambda: (_module(model, call), bytes_of(model.state_dict().values())),
            ("quantized", "PyTorch"): lambda: _converted(q, call),
            ("float", "onnxruntime"): lambda: _file(_write_float(model, call, float_file), call),
            ("quantized", "onnxruntime"): lambda: _file(
                file if quantized_file is not None else _write(q, example_inputs, file), call
            ),
        }
        found: list[dict[str, Any]] = []
        reference: list[Tensor] = []
        for (kind, runtime), make in makers.items():
            row: dict[str, Any] = {"model": kind, "runtime": runtime, "ms": None, "speedup": None, "MB": None}
            try:
                run, size = make()
                outputs = run()
            except OctavError as error:
                found.append({**row, "output_SQNR_dB": None, "note": str(error)})
                continue
            reference = reference or outputs
            row |= {"ms": _least_ms(run, seconds) if seconds else None, "MB": size / 1e6}
            found.append({**row, "output_SQNR_dB": _sqnr(outputs, reference), "note": None})
    return [_with_speedup(row, found) for row in found]


def _with_speedup(row: Mapping[str, Any], found: list[dict[str, Any]]) -> dict[str, Any]:
    base = next(other["ms"] for other in found if (other["model"], other["runtime"]) == ("float", row["runtime"]))
    return {**row, "speedup": base / row["ms"] if base and row["ms"] else None}


def _module(module: nn.Module, call: Inputs) -> Callable[[], list[Tensor]]:
    return lambda: tensors_of(module(*call.args, **call.kwargs))


def _converted(q: nn.Module, call: Inputs) -> tuple[Callable[[], list[Tensor]], int]:
    converted = convert(q)
    return _module(converted, call), size_of(converted)


def _write_float(model: nn.Module, call: Inputs, path: Path) -> Path:
    write_float_onnx(model, call, path)
    return path


def _write(q: nn.Module, example_inputs: Any, path: Path) -> Path:
    export_onnx(q, example_inputs, path)
    return path


def _file(path: Path, call: Inputs) -> tuple[Callable[[], list[Tensor]], int]:
    run = onnx_runner(path, call)
    # Large weights of the exporter's lie in a file beside.
    size = sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*"))
    return lambda: list(run().values()), size


def _least_ms(run: Callable[[], Any], seconds: float) -> float:
    least, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end or least == math.inf:
        start = time.perf_counter()
        run()
        least = min(least, time.perf_counter() - start)
    return 1e3 * least


def _sqnr(outputs: list[Tensor], reference: list[Tensor]) -> float | None:
    pairs = [(a.double(), b.double()) for a, b in zip(outputs, reference, strict=True) if b.is_floating_point()]
    noise = sum(float((a - b).square().sum()) for a, b in pairs)
    signal = sum(float(b.square().sum()) for _, b in pairs)
    return 10 * math.log10(signal / noise) if noise and signal else None
