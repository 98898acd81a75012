"""An ONNX model as text: its nodes, attributes and initializers; floats to five digits, integers by their values."""

import importlib
from collections.abc import Iterator
from typing import Any

from benchmarks.replay.text import short_hash


def onnx_text(content: bytes) -> str:
    """Write a model of ONNX, a line for each thing in it."""
    onnx: Any = importlib.import_module("onnx")
    model = onnx.load_model_from_string(content)
    opsets = [f"opset {entry.domain or 'ai.onnx'} {entry.version}" for entry in model.opset_import]
    functions = [f"function {function.name}" for function in model.functions]
    return "\n".join([*opsets, *functions, *_graph(onnx, model.graph)])


def _graph(onnx: Any, graph: Any) -> Iterator[str]:
    yield from (f"input {_value(value)}" for value in graph.input)
    yield from (f"initializer {_tensor(onnx, tensor)}" for tensor in graph.initializer)
    for node in graph.node:
        attributes = ", ".join(f"{a.name}={_attribute(onnx, a)}" for a in sorted(node.attribute, key=lambda a: a.name))
        yield f"{', '.join(node.output)} = {node.op_type}({', '.join(node.input)}) {{{attributes}}} {node.name}"
    yield from (f"output {_value(value)}" for value in graph.output)


def _value(value: Any) -> str:
    kind = value.type.tensor_type
    return f"{value.name} {kind.elem_type} {[size.dim_param or size.dim_value for size in kind.shape.dim]}"


def _attribute(onnx: Any, attribute: Any) -> str:
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, onnx.GraphProto):
        return "{" + "; ".join(_graph(onnx, value)) + "}"
    if isinstance(value, onnx.TensorProto):
        return _tensor(onnx, value)
    return f"{value:.4e}" if isinstance(value, float) else repr(value)


def _tensor(onnx: Any, tensor: Any) -> str:
    values = onnx.numpy_helper.to_array(tensor)
    # ml_dtypes' int4 is no integer for NumPy.
    is_float = tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)
    # + 0.0: there is one zero.
    numbers = [f"{x + 0.0:.4e}" if is_float else str(int(x)) for x in values.ravel().tolist()]
    shown = " ".join(numbers) if len(numbers) <= 8 else short_hash(" ".join(numbers))
    return f"{tensor.name} {onnx.TensorProto.DataType.Name(tensor.data_type)} {list(tensor.dims)} {shown}"
