"""A converted model as PyTorch's ONNX exporter writes it, with one node of the domain "octav" for each quantizer.

    octav::Weight() {key}          an IntegerWeight, or a StoredWeight of integers
    octav::Bias() {key}            an IntegerBias
    octav::Activation(x) {key}     a StaticQuantizer

The key is the path of the module; a target writes the nodes that stand for it (deploy/targets/).
"""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from octav_fx.capture.inputs import as_inputs
from octav_fx.capture.kinds import same_tensors
from octav_fx.capture.modules import IntegerModule
from octav_fx.compat.tensors import pytree
from octav_fx.errors import OctavError
from octav_fx.formats.grid import Grid
from octav_fx.nn import FakeQuantizer, IntegerBias, IntegerWeight, StaticQuantizer, StoredWeight

OPSET: Final = 21
DOMAIN: Final = "octav"

# What a node of the domain stands for.
Part = IntegerWeight | StoredWeight | IntegerBias | StaticQuantizer


def translated(module: nn.Module, example_inputs: Any, *, dynamic_batch: bool) -> tuple[Any, dict[str, Part]]:
    """Return the onnx.ModelProto of a converted model, and its quantizers by their keys; the module is changed.

    Raises OctavError for an op that ONNX lacks, for an example in which two inputs are one tensor, and for one that the
    model does not hold for.
    """
    args, kwargs = as_inputs(example_inputs)
    same = same_tensors(args, kwargs)
    if len(set(same)) < len(same):
        raise OctavError(
            "two inputs of the example are one tensor, and ONNX has no such inputs: quantize the model and export it "
            "with an example in which one is a copy of the other"
        )
    if isinstance(module, IntegerModule):
        module.check_call(args, kwargs)
    parts = _stand_ins(module)
    kwargs = _in_order(module, kwargs)
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
    return program.model_proto, parts


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


def _free_batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Return the inputs with a batch of at least two, as one would be taken for a constant, and their free axes."""
    sizes = [len(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim()]
    axis = {0: torch.export.Dim("batch")}

    def is_batched(leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == sizes[0]

    dynamic = pytree.tree_map(lambda leaf: axis if is_batched(leaf) else None, kwargs or args)
    if sizes[:1] == [1]:
        args, kwargs = pytree.tree_map(lambda x: torch.cat([x, x]) if is_batched(x) else x, (args, kwargs))
    return args, kwargs, dynamic


def _why(error: BaseException, dynamic_batch: bool) -> str:
    """Return the innermost cause, which names the op; the exporter's own messages are pages long."""
    while error.__cause__ is not None:
        error = error.__cause__
    detail = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    hint = "; if the model is for one batch size only, export it with dynamic_batch=False" if dynamic_batch else ""
    return f"PyTorch's exporter cannot write this model as ONNX: {detail}. Write the op that it names with others{hint}"
