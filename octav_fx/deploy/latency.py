"""How long a model takes in each runtime that is installed, float and deployed."""

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from octav_fx.capture.inputs import Inputs, tensors_of
from octav_fx.capture.rerun import in_eval_mode
from octav_fx.capture.whole import users_own
from octav_fx.deploy.runtimes import onnx_runner, optional, write_float_onnx

_ROUNDS: Final = 10

_Run = Callable[[], Any]


def latencies(
    q: nn.Module, converted: nn.Module, files: Mapping[str, str | os.PathLike[str]], call: Inputs
) -> dict[str, float | str]:
    """Return the least milliseconds of ten calls of each, or why it does not run: float and ours, in each runtime.

    files: of the deployed model, by the target that they are for. The variants take turns, as the load of a machine
    changes. Compiled ones are compiled first, which takes its time.
    """
    args, kwargs = call
    with tempfile.TemporaryDirectory() as folder, in_eval_mode(q), users_own(q), torch.no_grad():
        own = Path(folder) / "float.onnx"
        variants: dict[str, Callable[[], _Run]] = {
            "float, PyTorch": lambda: lambda: q(*args, **kwargs),
            "float, compiled": lambda: _compiled(q, call, "inductor"),
            "float, onnxruntime": lambda: _float_in_onnxruntime(q, call, own),
            "float, OpenVINO": lambda: _in_openvino(own, call),
            "integers, PyTorch": lambda: lambda: converted(*args, **kwargs),
            "integers, compiled": lambda: _compiled(converted, call, "octav"),
            "integers, onnxruntime": lambda: onnx_runner(files["onnxruntime"], call),
            "integers, OpenVINO": lambda: _in_openvino(files["openvino"], call),
        }
        if "openvino" not in files:
            variants = {name: make for name, make in variants.items() if "OpenVINO" not in name}
        return _measured(variants)


def _measured(variants: dict[str, Callable[[], _Run]]) -> dict[str, float | str]:
    found: dict[str, float | str] = {}
    runs: dict[str, _Run] = {}
    for name, make in variants.items():
        found[name] = float("inf")
        try:
            runs[name] = make()
            runs[name]()
        except Exception as error:
            runs.pop(name, None)
            found[name] = (str(error).strip() or type(error).__name__).splitlines()[0]
    for _ in range(_ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            found[name] = min(float(found[name]), 1000 * (time.perf_counter() - start))
    return found


def _compiled(module: nn.Module, call: Inputs, backend: str) -> _Run:
    compiled = torch.compile(module, backend=backend)
    return lambda: compiled(*call.args, **call.kwargs)


def _float_in_onnxruntime(module: nn.Module, call: Inputs, path: Path) -> _Run:
    write_float_onnx(module, call, path)
    return onnx_runner(path, call)


def _in_openvino(path: str | os.PathLike[str], call: Inputs) -> _Run:
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    model = optional("openvino").Core().compile_model(os.fspath(path), "CPU", options)
    given = [tensor.numpy() for tensor in tensors_of(call)]
    return lambda: model(given)
