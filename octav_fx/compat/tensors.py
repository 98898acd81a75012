"""Trees of tensors, fake tensors, dispatch."""

from typing import Any, Final

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "NEEDS_DATA",
    "TORCH_GROUPED_MM",
    "FakeTensor",
    "FakeTensorMode",
    "OpOverload",
    "TorchDispatchMode",
    "detect_fake_mode",
    "is_functorch_wrapped",
    "is_higher_order",
    "packet_of",
    "pytree",
    "schema_of",
    "storage_id",
]

# F.grouped_mm under its older name.
TORCH_GROUPED_MM: Final = torch._grouped_mm

# What a fake tensor raises where only data could tell the answer.
NEEDS_DATA: Final = (DataDependentOutputException, DynamicOutputShapeException)


def storage_id(tensor: Tensor) -> int:
    """Return a number that two tensors share exactly where they share memory; fake tensors have one, too."""
    return int(tensor.untyped_storage()._cdata)


def is_functorch_wrapped(tensor: Tensor) -> bool:
    """Tell whether a tensor belongs to a transform of torch.func, and must not outlive it."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def is_higher_order(op: Any) -> bool:
    """Tell whether an op takes functions or graphs among its arguments."""
    return isinstance(op, torch._ops.HigherOrderOperator)


def packet_of(op: Any) -> Any:
    """Return the op that an overload belongs to."""
    return op._overloadpacket


def schema_of(op: OpOverload) -> torch.FunctionSchema:
    """Return the schema of an op: its arguments with their names and defaults."""
    return op._schema
