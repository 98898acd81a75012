"""PyTorch's exporters read tables of all ops and functions at each call, for a second or more: here once a process."""

import copy
import functools
import sys
from typing import Any

import torch

_FUNCTIONS = "torch.onnx._internal.exporter._registration"
_DECOMPOSITIONS = "torch.onnx._internal.exporter._decomp"
_COMPOSITES = ("torch.export.decomp_utils", "torch.export.exported_program")


def read_its_tables_once() -> None:
    """Have all exports share their tables, once a first of them has imported the exporter."""
    registration = sys.modules.get(_FUNCTIONS)
    if registration is not None and not hasattr(registration.ONNXRegistry.from_torchlib, "__wrapped__"):
        registration.ONNXRegistry.from_torchlib = staticmethod(_functions(registration.ONNXRegistry.from_torchlib))
    for name in _COMPOSITES:
        _share(sys.modules.get(name), "_collect_all_valid_cia_ops")
    _share(sys.modules.get(_DECOMPOSITIONS), "create_onnx_friendly_decomposition_table")


def _functions(read: Any) -> Any:
    cached = functools.cache(read)

    @functools.wraps(read)
    def shared(*args: Any, **kwargs: Any) -> Any:
        table = copy.copy(cached(*args, **kwargs))
        # An export with functions of its own puts them into lists of its own.
        table.functions = {name: [*functions] for name, functions in table.functions.items()}
        return table

    return shared


def _share(module: Any, name: str) -> None:
    """Have a function of a module return a copy of what it returned while there were the same ops."""
    read = getattr(module, name, None)
    if read is None or hasattr(read, "__wrapped__"):
        return
    known: dict[Any, Any] = {}

    @functools.wraps(read)
    def shared(*args: Any) -> Any:
        ops = torch._C._dispatch_get_all_op_names()
        key = (len(ops), hash(frozenset(ops)), *map(frozenset, args))
        if key not in known:
            known[key] = read(*args)
        return copy.copy(known[key])

    setattr(module, name, shared)
