"""export_onnx(): the integers of a frozen model as standard ONNX, in the form that a runtime computes them in."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from octav_fx.deploy.convert import rewritten
from octav_fx.deploy.exported_calls import led_by_exported_calls
from octav_fx.deploy.files import replacing
from octav_fx.deploy.other_sizes import check_other_sizes, check_other_ways
from octav_fx.deploy.runtimes import optional
from octav_fx.deploy.targets import TARGETS, Target
from octav_fx.deploy.targets.graph import described
from octav_fx.deploy.targets.onnx import write
from octav_fx.deploy.translate import cause_of, translated
from octav_fx.errors import OctavError
from octav_fx.nn import IntegerWeight
from octav_fx.passes import CONVERT


def export_onnx(
    q: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    target: str = "onnxruntime",
    dynamic_batch: bool = True,
    dynamic_axes: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Write a frozen model as ONNX (opset 21, QDQ).

    Weights are int4 or int8 initializers with a scale for each channel, or for each group; activations pass
    QuantizeLinear and DequantizeLinear with static scales as uint8, with a zero point where they are signed. A batch
    norm is in scales, of its sign, and biases. target: "onnxruntime", a graph that it computes in integers, and
    convert(q) to the bit where layers, sums and pools read and make codes; "openvino", with every rounding
    where its kernels make it, and those codes but for ties; "tensorrt", signed integers with zero points of zero, as
    TensorRT takes them; "exact", the same integers as float arithmetic, for any runtime.
    example_inputs: as for quantize(). With dynamic_batch the first axis of every input that has the size of the first
    one's is free; dynamic_axes frees further ones, by the name of the input: {"input_ids": [1]}. The file is written
    whole or not at all. Raises OctavError for a model that is not frozen or is not float32, for an op that ONNX lacks,
    for an axis that is not there or has one size only, for what the target cannot say, for an unknown target, and for a
    path that cannot be written.
    """
    row = _target(target)
    onnx = optional("onnx")
    optional("onnxscript")
    with replacing(Path(path)) as draft:
        freely = {"dynamic_batch": dynamic_batch, "dynamic_axes": dynamic_axes or {}}
        try:
            model, parts = _translated(q, example_inputs, freely)
        except OctavError as error:
            if not _is_call_of_a_block(error):
                raise
            model, parts = _translated(led_by_exported_calls(q, example_inputs), example_inputs, freely)
        model = write(row, model, parts)
        _strip(model)
        try:
            onnx.checker.check_model(model, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise OctavError(f"the exported model is not valid ONNX, a defect of octav_fx: {error}") from error
        draft.write_bytes(model.SerializeToString())


def _target(name: str) -> Target:
    for row in TARGETS:
        if row.name == name:
            return row
    raise OctavError(f"target={name!r}: one of {', '.join(repr(row.name) for row in TARGETS)}")


def _translated(q: nn.Module, example_inputs: Any, freely: Mapping[str, Any]) -> tuple[Any, Any]:
    converted = rewritten(q, CONVERT)
    _check_float32(converted)
    check_other_sizes(q, converted, example_inputs, **freely)
    written = translated(converted, example_inputs, **freely)
    check_other_ways(q, converted, example_inputs, **freely)
    return written


def _is_call_of_a_block(error: BaseException) -> bool:
    """Tell whether the exporter met a call that a graph of ours does not hold for."""
    cause = cause_of(error)
    return cause is not error and isinstance(cause, OctavError)


def _check_float32(module: nn.Module) -> None:
    dtypes = {name: value.dtype for name, value in (*module.named_parameters(), *module.named_buffers())}
    dtypes |= {name: part.dtype for name, part in module.named_modules() if isinstance(part, IntegerWeight)}
    for name, dtype in dtypes.items():
        if dtype.is_floating_point and dtype is not torch.float32:
            raise OctavError(f"{name} is {dtype}, ONNX is written in float32: call q.float() before octav_fx.freeze")


def _strip(model: Any) -> None:
    """Drop where each node comes from: it names files of the machine that exported, and takes room."""
    for part in (model, model.graph, *described(model.graph)):
        del part.metadata_props[:]
        part.doc_string = ""
