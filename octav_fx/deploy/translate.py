"""A converted model as PyTorch's ONNX exporter writes it, with one node of the domain "octav" for each quantizer.

    octav::Weight() {key}          an IntegerWeight, or a StoredWeight of integers
    octav::Bias() {key}            an IntegerBias
    octav::Activation(x) {key}     a StaticQuantizer

The key is the path of the module; a target writes the nodes that stand for it (deploy/targets/).
"""

import contextlib
import functools
import inspect
import io
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from octav_fx.capture.inputs import Inputs, as_inputs
from octav_fx.capture.integer_module import IntegerModule
from octav_fx.capture.kinds import same_tensors
from octav_fx.compat.graphs import function_of
from octav_fx.compat.tensors import pytree
from octav_fx.errors import OctavError
from octav_fx.formats.grid import Grid
from octav_fx.ir.arguments import argument
from octav_fx.nn import FakeQuantizer, IntegerBias, IntegerWeight, StaticQuantizer, StoredWeight

OPSET: Final = 21
DOMAIN: Final = "octav"
# Of an attention, as PyTorch's exporter knows it.
_AXES: Final = 4

# What a node of the domain stands for.
Part = IntegerWeight | StoredWeight | IntegerBias | StaticQuantizer


@dataclass(frozen=True)
class FreeCall:
    """The call that a file is written for."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    # The inputs by name.
    named: Mapping[str, Any]
    # For each leaf of them its free axes, as torch.export takes them; None where there is none at all.
    dynamic: Any


def free_call(
    module: nn.Module, call: Inputs, *, dynamic_batch: bool, dynamic_axes: Mapping[str, Sequence[int]]
) -> FreeCall:
    """Return the call that a model is exported with. Raises OctavError for axes that are not there."""
    args, kwargs = call.args, _in_order(module, call.kwargs)
    if dynamic_batch:
        args, kwargs = _at_least_two(args, kwargs)
    named = kwargs or dict(zip(names_of(module, len(args)), args, strict=True))
    return FreeCall(args, kwargs, named, _free_axes(named, kwargs, dynamic_batch, dynamic_axes))


def translated(
    module: nn.Module, example_inputs: Any, *, dynamic_batch: bool, dynamic_axes: Mapping[str, Sequence[int]]
) -> tuple[Any, dict[str, Part]]:
    """Return the onnx.ModelProto of a converted model, and its quantizers by their keys; the module is changed.

    Raises OctavError for an op that ONNX lacks, for an example in which two inputs are one tensor, for one that the
    model does not hold for, and for axes that are not there or that the model computes for one size only.
    """
    call = as_inputs(example_inputs)
    same = same_tensors(*call)
    if len(set(same)) < len(same):
        raise OctavError(
            "two inputs of the example are one tensor, and ONNX has no such inputs: quantize the model and export it "
            "with an example in which one is a copy of the other"
        )
    if isinstance(module, IntegerModule):
        module.check_call(*call)
    _check_scales(module)
    _check_divisors(module)
    _give_four_axes(module)
    parts = _stand_ins(module)
    free = free_call(module, call, dynamic_batch=dynamic_batch, dynamic_axes=dynamic_axes)
    # A dictionary that is the last of them is taken for keyword arguments.
    given = free.args if free.kwargs else (*free.args, {})
    options: Any = {"dynamo": True, "opset_version": OPSET, "dynamic_shapes": free.dynamic, "verbose": False}
    try:
        with _quiet_failure():
            program = torch.onnx.export(module, given, kwargs=free.kwargs, **options)
    except Exception as error:
        raise OctavError(_why(error, dynamic_batch, dynamic_axes)) from error
    assert program is not None
    model = program.model_proto
    _check_free(model, free.named, free.dynamic, dynamic_batch, dynamic_axes)
    return model, parts


@contextlib.contextmanager
def _quiet_failure() -> Iterator[None]:
    """Drop what is printed for an error that becomes one text: torch prints the graph, of thousands of lines."""
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        yield
    sys.stderr.write(printed.getvalue())


def _check_scales(module: nn.Module) -> None:
    """Raise OctavError for an attention with a scale of which PyTorch's exporter, which takes its root, makes NaN."""
    for part in module.modules():
        if not isinstance(part, fx.GraphModule):
            continue
        for node in part.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention):
            scale = node.kwargs.get("scale")
            if isinstance(scale, (int, float)) and scale < 0:
                raise OctavError(
                    f"{node.name}: PyTorch's exporter has no scale below zero, {scale}: negate the query and the "
                    "scale, or quantize with attention='full'"
                )


def _give_four_axes(module: nn.Module) -> None:
    """Let attentions have the four axes that PyTorch's exporter knows them with."""
    for part in module.modules():
        if not isinstance(part, IntegerModule):
            continue
        for node in part.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention):
            node.target = _attention
        part.octav_guarded.set_function(function_of(part.graph))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """Compute F.scaled_dot_product_attention of any number of axes, by one of four."""
    axes, outer = query.dim(), query.shape[:-2]

    def of_four(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask, *args, **kwargs)

    if axes == _AXES:
        return of_four(query, key, value)
    if axes < _AXES:
        first = (None,) * (_AXES - axes)
        return of_four(query[first], key[first], value[first]).flatten(0, _AXES - axes)
    if attn_mask is not None and attn_mask.dim() >= _AXES:
        attn_mask = attn_mask.expand(*outer, *attn_mask.shape[-2:]).flatten(0, axes - _AXES)
    last = axes - _AXES
    return of_four(query.flatten(0, last), key.flatten(0, last), value.flatten(0, last)).unflatten(0, outer[:-1])


def _check_divisors(module: nn.Module) -> None:
    """Raise OctavError for a pool with a divisor of its own, which PyTorch's exporter leaves out (torch 2.13)."""
    for name, part in module.named_modules():
        nodes = list(part.graph.nodes) if isinstance(part, fx.GraphModule) else []
        calls = [n for n in nodes if n.op == "call_function" and n.target in (F.avg_pool2d, F.avg_pool3d)]
        found = [call.name for call in calls if argument(call, "divisor_override") is not None]
        if getattr(part, "divisor_override", None) is not None and isinstance(part, nn.AvgPool2d | nn.AvgPool3d):
            found.append(name)
        if found:
            raise OctavError(
                f"{found[0]}: PyTorch's exporter leaves out divisor_override: multiply what the pool returns instead"
            )


class _Constant(nn.Module):
    """A node without inputs in place of an IntegerWeight or IntegerBias."""

    def __init__(self, kind: str, key: str, shape: Sequence[int]) -> None:
        super().__init__()
        self.kind, self.key, self.shape = kind, key, list(shape)

    def forward(self) -> Tensor:
        name = f"{DOMAIN}::{self.kind}"
        return torch.onnx.ops.symbolic(name, (), {"key": self.key}, dtype=torch.float32, shape=self.shape, version=1)


class _Activation(nn.Module):
    """A node in place of a StaticQuantizer."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key

    def forward(self, x: Tensor) -> Tensor:
        name = f"{DOMAIN}::Activation"
        return torch.onnx.ops.symbolic(name, (x,), {"key": self.key}, dtype=x.dtype, shape=x.shape, version=1)


def _stand_ins(module: nn.Module) -> dict[str, Part]:
    """Put stand-ins in the places of the quantizers; return the quantizers by path."""
    found: dict[str, Part] = {}
    for name, part in list(module.named_modules()):
        match part:
            case IntegerWeight():
                stand_in: nn.Module = _Constant("Weight", name, part.shape)
            case StoredWeight():
                if not isinstance(part.spec.format, Grid):
                    raise OctavError(
                        f"{name}: ONNX has no levels of {part.spec.format.name}; give this weight "
                        "weight_format='int', or leave it float, by an override"
                    )
                stand_in = _Constant("Weight", name, part.shape)
            case FakeQuantizer():
                raise OctavError(
                    f"{name}: ONNX has no op that rounds to {part.spec}; give this activation activation_format='int' "
                    "and activation_granularity='tensor', or activation_bits=None, by an override"
                )
            case IntegerBias():
                stand_in = _Constant("Bias", name, part.codes.shape)
            case StaticQuantizer():
                stand_in = _Activation(name)
            case _:
                continue
        module.set_submodule(name, stand_in, strict=True)
        found[name] = part
    return found


def _in_order(module: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return keyword arguments in the order of the inputs of a graph, gaps filled: torch.export goes by position."""
    if not isinstance(module, fx.GraphModule) or not kwargs:
        return kwargs
    inputs = {str(n.target): n.args[0] if n.args else None for n in module.graph.find_nodes(op="placeholder")}
    names = list(inputs)
    last = max((names.index(name) for name in kwargs if name in inputs), default=-1)
    return {name: kwargs.get(name, inputs[name]) for name in names[: last + 1]} | kwargs


def _batch_size(inputs: Any) -> int | None:
    """Return the first size of the first tensor."""
    leaves = pytree.tree_leaves(inputs)
    return next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), None)


def _at_least_two(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the inputs with a batch of at least two, as one would be taken for a constant."""
    if _batch_size((args, kwargs)) != 1:
        return args, kwargs
    return pytree.tree_map(lambda x: torch.cat([x, x]) if _has_batch(x, 1) else x, (args, kwargs))


def _has_batch(leaf: Any, size: int | None) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == size


def _free_axes(
    named: Mapping[str, Any],
    kwargs: dict[str, Any],
    dynamic_batch: bool,
    dynamic_axes: Mapping[str, Sequence[int]],
) -> Any:
    """Return for each leaf of the inputs its free axes, as torch.export takes them; None where there is none at all."""
    if not dynamic_batch and not dynamic_axes:
        return None
    for name, axes in dynamic_axes.items():
        if not has_axes(named.get(name), axes):
            there = ", ".join(f"{held} {list(x.shape)}" for held, x in named.items() if isinstance(x, Tensor))
            raise OctavError(f"dynamic_axes={{{name!r}: {axes!r}}}: no such axes; the inputs are {there}")
    batch, size = torch.export.Dim("batch"), _batch_size(named)

    def free(leaf: Any, axes: Sequence[int]) -> Any:
        if not isinstance(leaf, Tensor):
            return None
        found: dict[int, Any] = {axis % leaf.dim(): torch.export.Dim.DYNAMIC for axis in axes}
        return found | ({0: batch} if dynamic_batch and _has_batch(leaf, size) else {}) or None

    marks = {
        name: pytree.tree_map(functools.partial(free, axes=dynamic_axes.get(name, ())), value)
        for name, value in named.items()
    }
    return marks if kwargs else tuple(marks.values())


def _check_free(
    model: Any,
    named: Mapping[str, Any],
    dynamic: Any,
    dynamic_batch: bool,
    dynamic_axes: Mapping[str, Sequence[int]],
) -> None:
    """Raise OctavError where a file fixes an axis that is to be free: the exporter tells nobody."""
    if dynamic is None:
        return
    marks = dynamic.values() if isinstance(dynamic, dict) else dynamic
    wanted: list[tuple[str, Any]] = []
    for (name, value), mark in zip(named.items(), marks, strict=True):
        leaves, spec = pytree.tree_flatten(value)
        found = zip(leaves, spec.flatten_up_to(mark), strict=True)
        wanted += [(name, axes or ()) for leaf, axes in found if isinstance(leaf, Tensor)]
    # Of a model with numbers among its inputs the file may have others.
    for (name, axes), value in zip(wanted, model.graph.input, strict=False):
        sizes = value.type.tensor_type.shape.dim
        for axis in axes:
            if not sizes[axis].dim_param:
                raise OctavError(
                    f"PyTorch's exporter writes axis {axis} of {name} for size {sizes[axis].dim_value} alone: Python "
                    f"around graphs, or a graph, computes for that size{_fixed_advice(dynamic_batch, dynamic_axes)}"
                )


def has_axes(value: Any, axes: Any) -> bool:
    """Tell whether a value is a tensor that has some axes, of which users may give anything."""
    is_there = isinstance(value, Tensor) and isinstance(axes, Iterable)
    return is_there and all(isinstance(axis, int) and -value.dim() <= axis < value.dim() for axis in axes)


def names_of(module: nn.Module, count: int) -> list[str]:
    """Return the names of so many positional inputs; those of *args have numbers."""
    parameters = inspect.signature(module.forward).parameters.values()
    named = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL][:count]
    return [*named, *map(str, range(len(named), count))]


def cause_of(error: BaseException) -> BaseException:
    """Return the error that all others were raised from, or the error itself."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _why(error: BaseException, dynamic_batch: bool, dynamic_axes: Mapping[str, Sequence[int]]) -> str:
    """Return the innermost cause, which names the op; the exporter's own messages are pages long."""
    error = cause_of(error)
    detail = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"PyTorch's exporter cannot write this model as ONNX: {detail}. {_advice(error, dynamic_batch, dynamic_axes)}"
    )


def _advice(error: BaseException, dynamic_batch: bool, dynamic_axes: Mapping[str, Sequence[int]]) -> str:
    """Say what to do: most often the op that the exporter names is the cause."""
    if isinstance(error, OctavError):
        return "Python around blocks passes them other arguments in this export. Quantize and calibrate with blocks=()"
    if (returned := re.search(r"Found <class '(.*)'> in output", str(error))) is not None:
        kind = returned[1].rpartition(".")[2]
        return f"Have forward return no {kind}; models of transformers return caches unless use_cache=False is passed"
    if "data-dependent expression" in str(error):
        return (
            "It goes by numbers that it computes, as detectors do behind their heads: export the part before that, "
            "such as q.backbone"
        )
    return f"Write the op that it names with others{_fixed_advice(dynamic_batch, dynamic_axes)}"


def _fixed_advice(dynamic_batch: bool, dynamic_axes: Mapping[str, Sequence[int]]) -> str:
    fixed = ["with dynamic_batch=False"] * dynamic_batch + ["without dynamic_axes"] * bool(dynamic_axes)
    return f"; if the model is for one size only, export it {' and '.join(fixed)}" if fixed else ""
