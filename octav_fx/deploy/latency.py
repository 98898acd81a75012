"""How long a model takes in each runtime that is installed, float and deployed."""

import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from octav_fx.capture.inputs import Inputs, tensors_of
from octav_fx.capture.modules import users_own
from octav_fx.capture.rerun import in_eval_mode
from octav_fx.deploy.runtimes import onnx_session, optional

_ROUNDS: Final = 10

_Run = Callable[[], Any]


def latencies(q: nn.Module, converted: nn.Module, path: str | os.PathLike[str], call: Inputs) -> dict[str, float | str]:
    """Return the least milliseconds of ten calls of each, or why it does not run: float and ours, in each runtime.

    The variants take turns, as the load of a machine changes. Compiled ones are compiled first, which takes its time.
    """
    args, kwargs = call
    with tempfile.TemporaryDirectory() as folder, in_eval_mode(q), users_own(q), torch.no_grad():
        own = Path(folder) / "float.onnx"
        variants: dict[str, Callable[[], _Run]] = {
            "float, PyTorch": lambda: lambda: q(*args, **kwargs),
            "float, compiled": lambda: _compiled(q, call, "inductor"),
            "float, onnxruntime": lambda: _in_onnxruntime(_float_file(q, call, own), call),
            "float, OpenVINO": lambda: _in_openvino(own, call),
            "integers, PyTorch": lambda: lambda: converted(*args, **kwargs),
            "integers, compiled": lambda: _compiled(converted, call, "octav"),
            "integers, onnxruntime": lambda: _in_onnxruntime(path, call),
            "integers, OpenVINO": lambda: _in_openvino(path, call),
        }
        if importlib.util.find_spec("openvino") is None:
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


def _float_file(module: nn.Module, call: Inputs, path: Path) -> Path:
    program = torch.onnx.export(module, call.args, kwargs=dict(call.kwargs), dynamo=True, verbose=False)
    assert program is not None
    program.save(str(path))
    return path


def _in_onnxruntime(path: str | os.PathLike[str], call: Inputs) -> _Run:
    session = onnx_session(path, threads=torch.get_num_threads())
    given = [tensor.numpy() for tensor in tensors_of(call)]
    feed = dict(zip((value.name for value in session.get_inputs()), given, strict=True))
    return lambda: session.run(None, feed)


def _in_openvino(path: str | os.PathLike[str], call: Inputs) -> _Run:
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    model = optional("openvino").Core().compile_model(os.fspath(path), "CPU", options)
    given = [tensor.numpy() for tensor in tensors_of(call)]
    return lambda: model(given)
