"""Running files in the runtimes that they are for."""

import importlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octav_fx.capture.inputs import Inputs, as_inputs, tensors_of
from octav_fx.compat.tensors import has_vnni
from octav_fx.deploy.translate import OPSET
from octav_fx.errors import OctavError


def run_onnx(model: str | os.PathLike[str] | bytes, example_inputs: Any) -> dict[str, Tensor]:
    """Return the outputs of an ONNX file, or of its bytes, by name, computed by onnxruntime on the CPU.

    example_inputs: as for export_onnx, or a dict by the names of the file's inputs.
    """
    return onnx_runner(model, as_inputs(example_inputs))()


def onnx_runner(model: str | os.PathLike[str] | bytes, call: Inputs) -> Callable[[], dict[str, Tensor]]:
    """Return what runs an ONNX file, or its bytes, for a call as often as it is called; see run_onnx."""
    session = onnx_session(model, threads=torch.get_num_threads())
    args, kwargs = call
    names = [value.name for value in session.get_inputs()]
    # None is no input of the file.
    given = {**dict(zip(names, tensors_of(args), strict=False)), **kwargs}
    feed = {name: given[name].detach().cpu().numpy() for name in names}
    results = [value.name for value in session.get_outputs()]
    return lambda: {name: torch.from_numpy(found) for name, found in zip(results, session.run(None, feed), strict=True)}


def write_float_onnx(model: nn.Module, call: Inputs, path: Path) -> None:
    """Write a float model as ONNX, to be compared with. Raises OctavError where torch's exporter cannot."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model, call.args, kwargs=dict(call.kwargs), dynamo=True, opset_version=OPSET, verbose=False
            )
        assert program is not None
        program.save(str(path))
    except Exception as error:
        raise OctavError(f"torch.onnx cannot write the float model: {str(error).splitlines()[0]}") from error


def onnx_session(
    model: str | os.PathLike[str] | bytes, threads: int, optimized: str | os.PathLike[str] | None = None
) -> Any:
    """Return an onnxruntime session for a file, or its bytes, on the CPU.

    optimized: where to write the graph as onnxruntime's optimizer leaves it, or None.
    """
    runtime = optional("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    # By default the float operand of a matmul with stored integers is rounded to 8 bits: a result off by 3e-3.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    # By default int8 is changed to uint8, and a zero point behind a transpose is left behind: such files do not load.
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    if optimized is not None:
        # It says that the file is for machines like this one, which is what is wanted here.
        options.log_severity_level = 3
        options.optimized_model_filepath = os.fspath(optimized)
    source = model if isinstance(model, bytes) else os.fspath(model)

    def start() -> Any:
        return runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    if has_vnni():
        return start()
    # By default products of 8 bits saturate at 16 where the CPU has no VNNI; where it has, this doubles the time.
    options.add_session_config_entry("session.x64quantprecision", "1")
    # It would write down the error that is dealt with below.
    options.log_severity_level = 4
    try:
        return start()
    except (runtime.capi.onnxruntime_pybind11_state.NotImplemented, runtime.capi.onnxruntime_pybind11_state.Fail):
        # Under that option it makes products of int8 that it has no kernel for, and stumbles over a weight that several
        # layers read, as the steps of an unrolled LSTM do: without integers it computes levels.
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        return start()


def optional(module: str, extra: str = "onnx") -> Any:
    """Import a package that only exporting needs. Raises OctavError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise OctavError(f"exporting needs {error.name}: pip install 'octav_fx[{extra}]'") from error
