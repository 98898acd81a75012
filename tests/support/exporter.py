"""PyTorch's ONNX exporter reads its table of functions at each call, for a second or more: here once a process."""

import copy
import functools
import sys
from typing import Any

_MODULE = "torch.onnx._internal.exporter._registration"


def read_its_table_once() -> None:
    """Have all exports share one table, once a first of them has imported the exporter."""
    module = sys.modules.get(_MODULE)
    if module is None or hasattr(module.ONNXRegistry.from_torchlib, "__wrapped__"):
        return
    read = functools.cache(module.ONNXRegistry.from_torchlib)

    @functools.wraps(read)
    def shared(*args: Any, **kwargs: Any) -> Any:
        table = copy.copy(read(*args, **kwargs))
        # An export with functions of its own puts them into lists of its own.
        table.functions = {name: [*functions] for name, functions in table.functions.items()}
        return table

    module.ONNXRegistry.from_torchlib = staticmethod(shared)
