"""export_onnx(): the converted model as standard ONNX, with QuantizeLinear and DequantizeLinear around every operand.

PyTorch's exporter translates everything but the quantizers. Those are one node each while it works, with the name of
their module, and are written here: integers and their scales as initializers of their own types.
"""

import importlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from octav_fx.capture.inputs import as_inputs, tensors_of
from octav_fx.capture.modules import IntegerModule
from octav_fx.deploy.convert import convert
from octav_fx.errors import OctavError
from octav_fx.formats.grid import Grid
from octav_fx.formats.packing import pack
from octav_fx.ir.pipeline import run
from octav_fx.nn import IntegerWeight, StaticQuantizer
from octav_fx.passes import EXPORT
from octav_fx.passes.export.fold_affine_into_scale import NOTHING

OPSET: Final = 21
# The domain of the nodes that stand for quantizers while PyTorch's exporter works.
_DOMAIN: Final = "octav"
# onnxruntime moves a QuantizeLinear before these.
_MOVERS: Final = ("MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Flatten", "Expand", "Identity")


def export_onnx(q: nn.Module, example_inputs: Any, path: str | os.PathLike[str], *, dynamic_batch: bool = True) -> None:
    """Write a frozen model as ONNX (opset 21, QDQ) that computes what convert(q) computes.

    Weights are int4 or int8 initializers behind a DequantizeLinear for each channel; activations pass QuantizeLinear
    and DequantizeLinear with static scales, int4, uint4, int8 or uint8. A factor of a batch norm is in the weight's
    scale, its sign, where negative, in a Mul behind the convolution. example_inputs: as for quantize(). With
    dynamic_batch the first axis of every input that has the size of the first one's is free.
    The file is written whole or not at all. Raises OctavError for a model that is not frozen or is not float32, for an
    op that ONNX lacks, and for a path that cannot be written.
    """
    onnx = _optional("onnx")
    _optional("onnxscript")
    target = Path(path)
    with _replacing(target) as draft:
        converted = convert(q, integers=False)
        _check_float32(converted)
        for module in converted.modules():
            if isinstance(module, IntegerModule):
                run(module, EXPORT)
        quantizers = _stand_ins(converted)
        model = _translated(converted, example_inputs, dynamic_batch)
        _write_quantizers(onnx, model, quantizers)
        _strip(model)
        try:
            onnx.checker.check_model(model, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise OctavError(f"the exported model is not valid ONNX, a defect of octav_fx: {error}") from error
        draft.write_bytes(model.SerializeToString())


def run_onnx(model: str | os.PathLike[str] | bytes, example_inputs: Any) -> dict[str, Tensor]:
    """The outputs of an ONNX file, or of its bytes, by name, computed by onnxruntime on the CPU.

    example_inputs: as for export_onnx, or a dict by the names of the file's inputs.
    """
    runtime = _optional("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # By default the float operand of a matmul with stored integers is rounded to 8 bits: a result off by 3e-3.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    # By default products of 8 bits saturate at 16 where the CPU has no VNNI.
    options.add_session_config_entry("session.x64quantprecision", "1")
    source = model if isinstance(model, bytes) else os.fspath(model)
    session = runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    args, kwargs = as_inputs(example_inputs)
    names = [value.name for value in session.get_inputs()]
    # None is no input of the file.
    given = {**dict(zip(names, tensors_of(args), strict=False)), **kwargs}
    outputs = session.run(None, {name: given[name].detach().cpu().numpy() for name in names})
    return {value.name: torch.from_numpy(found) for value, found in zip(session.get_outputs(), outputs, strict=True)}


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A new file beside the target; it takes the target's place when all went well inside, and is gone when not."""
    if target.is_dir():
        raise OctavError(f"{target} is a folder: give the path of a file to write")
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    except OSError as error:
        raise OctavError(f"{target} cannot be written: {error.strerror}; give another path") from error
    os.close(handle)
    draft = Path(name)
    try:
        yield draft
        # mkstemp gives no one else a right to read.
        mask = os.umask(0)
        os.umask(mask)
        draft.chmod(0o666 & ~mask)
        draft.replace(target)
    except OSError as error:
        raise OctavError(f"{target} cannot be written: {error.strerror}; give another path") from error
    finally:
        draft.unlink(missing_ok=True)


def _check_float32(module: nn.Module) -> None:
    dtypes = {name: value.dtype for name, value in (*module.named_parameters(), *module.named_buffers())}
    dtypes |= {name: part.dtype for name, part in module.named_modules() if isinstance(part, IntegerWeight)}
    for name, dtype in dtypes.items():
        if dtype.is_floating_point and dtype is not torch.float32:
            raise OctavError(f"{name} is {dtype}, ONNX is written in float32: call q.float() before octav_fx.freeze")


class _Weight(nn.Module):
    """The node octav::Weight in place of an IntegerWeight."""

    def __init__(self, key: str, shape: Sequence[int]) -> None:
        super().__init__()
        self.key, self.shape = key, list(shape)

    def forward(self) -> Tensor:
        return torch.onnx.ops.symbolic(
            f"{_DOMAIN}::Weight", (), {"key": self.key}, dtype=torch.float32, shape=self.shape, version=1
        )


class _Activation(nn.Module):
    """The node octav::Activation in place of a StaticQuantizer."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key

    def forward(self, x: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            f"{_DOMAIN}::Activation", (x,), {"key": self.key}, dtype=x.dtype, shape=x.shape, version=1
        )


def _stand_ins(module: nn.Module) -> dict[str, IntegerWeight | StaticQuantizer]:
    """Put stand-ins in the places of the quantizers; return the quantizers by path."""
    found: dict[str, IntegerWeight | StaticQuantizer] = {}
    for name, part in list(module.named_modules()):
        if isinstance(part, (IntegerWeight, StaticQuantizer)):
            stand_in = _Weight(name, part.shape) if isinstance(part, IntegerWeight) else _Activation(name)
            module.set_submodule(name, stand_in, strict=True)
            found[name] = part
    return found


def _translated(module: nn.Module, example_inputs: Any, dynamic_batch: bool) -> Any:
    """The model as PyTorch's exporter writes it."""
    args, kwargs = as_inputs(example_inputs)
    dynamic = None
    if dynamic_batch:
        args, kwargs, dynamic = _free_batch(args, kwargs)
    try:
        program = torch.onnx.export(
            module, args, kwargs=kwargs, dynamo=True, opset_version=OPSET, dynamic_shapes=dynamic, verbose=False
        )
    except Exception as error:
        raise OctavError(_why(error, dynamic_batch)) from error
    assert program is not None
    return program.model_proto


def _free_batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """The inputs with a batch of at least two, as a size of one would be taken for a constant; their free axes."""
    sizes = [len(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim()]
    axis = {0: torch.export.Dim("batch")}

    def is_batched(leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == sizes[0]

    dynamic = pytree.tree_map(lambda leaf: axis if is_batched(leaf) else None, kwargs or args)
    if sizes[:1] == [1]:
        args, kwargs = pytree.tree_map(lambda x: torch.cat([x, x]) if is_batched(x) else x, (args, kwargs))
    return args, kwargs, dynamic


def _why(error: BaseException, dynamic_batch: bool) -> str:
    """The innermost cause, which names the op; the exporter's own messages are pages long."""
    while error.__cause__ is not None:
        error = error.__cause__
    detail = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    hint = "; if the model is for one batch size only, export it with dynamic_batch=False" if dynamic_batch else ""
    return f"PyTorch's exporter cannot write this model as ONNX: {detail}. Write the op that it names with others{hint}"


def _write_quantizers(onnx: Any, model: Any, quantizers: Mapping[str, IntegerWeight | StaticQuantizer]) -> None:
    """Replace the nodes of octav by standard ones and their initializers."""
    graph, written = model.graph, set[str]()
    makers = {output: node for node in graph.node for output in node.output}
    nodes = []
    for node in graph.node:
        if node.domain != _DOMAIN:
            nodes += _TRANSLATIONS.get(node.op_type, _as_it_is)(onnx, node, graph, makers)
            continue
        key = next(a.s.decode() for a in node.attribute if a.name == "key")
        part = quantizers[key]
        if isinstance(part, IntegerWeight):
            made, initializers = _weight(onnx, key, part, node.output[0])
        else:
            made, initializers = _activation(
                onnx, key, part, node.input[0], node.output[0], _type_bits(part, makers.get(node.input[0]), makers)
            )
        # A module that is called twice has one set of initializers.
        graph.initializer.extend([] if key in written else initializers)
        written.add(key)
        nodes += made
    del graph.node[:]
    graph.node.extend(nodes)
    _drop_unused(graph)
    kept = [entry for entry in model.opset_import if entry.domain != _DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(kept)


def _drop_unused(graph: Any) -> None:
    """Initializers that no node reads any more."""
    graphs = [graph, *(part for part in _described(graph) if hasattr(part, "node"))]
    read = {name for inner in graphs for node in inner.node for name in node.input}
    read |= {value.name for value in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _weight(onnx: Any, key: str, weight: IntegerWeight, output: str) -> tuple[list[Any], list[Any]]:
    codes = weight.integers().cpu()
    narrow = weight.bits <= 4
    kind = onnx.TensorProto.INT4 if narrow else onnx.TensorProto.INT8
    data = (pack(codes) if narrow else codes).contiguous().numpy().tobytes()
    stored = onnx.helper.make_tensor(f"{key}.codes", kind, list(codes.shape), data, raw=True)
    # Zero where a channel is all zeros; runtimes want scales to be positive.
    scale = _floats(onnx, f"{key}.scale", torch.where(weight.scale > 0, weight.scale, NOTHING))
    # Optional in the standard; onnxruntime wants it where it turns int8 into uint8.
    zero = onnx.helper.make_tensor(f"{key}.zero", kind, list(weight.scale.shape), [0] * weight.scale.numel())
    axis = {} if weight.dim is None else {"axis": weight.dim}
    inputs = [stored.name, scale.name, zero.name]
    node = onnx.helper.make_node("DequantizeLinear", inputs, [output], f"{key}.dequantize", **axis)
    return [node], [stored, scale, zero]


def _activation(
    onnx: Any, key: str, quantizer: StaticQuantizer, source: str, output: str, type_bits: int
) -> tuple[list[Any], list[Any]]:
    make, bits, shape = onnx.helper.make_node, quantizer.bits, list(quantizer.scale.shape)
    kind = f"{'' if quantizer.signed else 'U'}INT{type_bits}"
    zeros = [0] * quantizer.scale.numel()
    zero = onnx.helper.make_tensor(f"{key}.zero", getattr(onnx.TensorProto, kind), shape, zeros)
    scale = _floats(onnx, f"{key}.scale", quantizer.scale)
    axis = {} if quantizer.dim is None else {"axis": quantizer.dim}
    nodes, initializers = [], [scale, zero]
    # A quantizer may be called for several tensors; each call has its own names.
    call = f"{key}/{output}"
    if bits != type_bits:
        # QuantizeLinear saturates at the ends of its integer type only.
        if quantizer.dim is not None:
            raise OctavError(
                f"{key}: {bits} bits with a scale for each channel of data have no place in ONNX; use 4 or 8 bits there"
            )
        grid = Grid(bits, quantizer.signed)
        ends = [_floats(onnx, f"{key}.{level}", level * quantizer.scale) for level in (grid.low, grid.high)]
        initializers += ends
        nodes.append(make("Clip", [source, *(end.name for end in ends)], [f"{call}.clipped"], f"{call}.clip"))
        source = f"{call}.clipped"
    codes, parameters = f"{call}.codes", [scale.name, zero.name]
    nodes.append(make("QuantizeLinear", [source, *parameters], [codes], f"{call}.quantize", **axis))
    nodes.append(make("DequantizeLinear", [codes, *parameters], [output], f"{call}.dequantize", **axis))
    return nodes, initializers


def _type_bits(quantizer: StaticQuantizer, maker: Any, makers: Mapping[str, Any]) -> int:
    """The width of the integer type for codes: 4 or 8.

    Moved before a MaxPool, which has no 4-bit kernel, a QuantizeLinear of 4 bits makes a model that onnxruntime 1.31
    does not load; a Clip before one of 8 bits keeps it in its place.
    """
    while maker is not None and maker.op_type in _MOVERS:
        if maker.op_type == "MaxPool":
            return 8
        maker = makers.get(maker.input[0])
    return 4 if quantizer.bits == 4 else 8


def _as_it_is(onnx: Any, node: Any, graph: Any, makers: Mapping[str, Any]) -> list[Any]:
    return [node]


def _bias_apart(onnx: Any, node: Any, graph: Any, makers: Mapping[str, Any]) -> list[Any]:
    """A convolution and its bias as two nodes, where the weight is stored as integers.

    A bias inside is rounded by onnxruntime to multiples of both scales, which at 4 bits moves results by percents.
    """
    weight = makers.get(node.input[1])
    if weight is None or weight.domain != _DOMAIN or len(node.input) < 3 or not node.input[2]:
        return [node]
    name, output = node.input[2], node.output[0]
    bias = next((tensor for tensor in graph.initializer if tensor.name == name), None)
    if bias is None:
        return [node]
    spatial = len(next(a.ints for a in node.attribute if a.name == "kernel_shape"))
    shaped = onnx.TensorProto()
    shaped.CopyFrom(bias)
    shaped.name = f"{output}.bias"
    shaped.dims.extend([1] * spatial)
    graph.initializer.append(shaped)
    del node.input[2]
    node.output[0] = f"{output}.product"
    return [node, onnx.helper.make_node("Add", [node.output[0], shaped.name], [output], f"{output}.add")]


def _clip_by_two(onnx: Any, clip: Any, graph: Any, makers: Mapping[str, Any]) -> list[Any]:
    """Clip as Max and Min: onnxruntime 1.31 does not load a Clip before a QuantizeLinear of 4 bits."""
    (source, *bounds), output = clip.input, clip.output[0]
    steps = [(kind, bound) for kind, bound in zip(("Max", "Min"), bounds, strict=False) if bound]
    nodes = []
    for i, (kind, bound) in enumerate(steps):
        result = output if i == len(steps) - 1 else f"{output}.{kind}"
        nodes.append(onnx.helper.make_node(kind, [source, bound], [result], result))
        source = result
    return nodes or [clip]


# What onnxruntime 1.31 gets wrong beside 4-bit operands, and what is written instead.
_TRANSLATIONS: Final = {"Clip": _clip_by_two, "Conv": _bias_apart, "ConvTranspose": _bias_apart}


def _floats(onnx: Any, name: str, value: Tensor) -> Any:
    data = value.detach().to(torch.float32).cpu().contiguous().numpy().tobytes()
    return onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT, list(value.shape), data, raw=True)


def _strip(model: Any) -> None:
    """Drop where each node comes from: it names files of the machine that exported, and takes room."""
    for part in (model, model.graph, *_described(model.graph)):
        del part.metadata_props[:]
        part.doc_string = ""


def _described(graph: Any) -> Iterator[Any]:
    yield from graph.node
    yield from graph.initializer
    yield from (*graph.input, *graph.output, *graph.value_info)
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield inner
                yield from _described(inner)


def _optional(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise OctavError(f"exporting needs {error.name}: pip install 'octav_fx[onnx]'") from error
