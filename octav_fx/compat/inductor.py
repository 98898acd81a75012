"""Inductor and Dynamo, as a backend of torch.compile needs them."""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._dynamo.exc import ShortenTraceback
from torch._guards import TracingContext
from torch._inductor import ir, list_mode_options, list_options
from torch._inductor.codegen import cpp
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.lowering import fallback_handler, lowerings, make_pointwise, register_lowering
from torch._inductor.virtualized import V, ops
from torch.utils._ordered_set import OrderedSet

__all__ = [
    "Bound",
    "CustomGraphPass",
    "ShortenTraceback",
    "compile_fx",
    "drop_guards",
    "fallback_handler",
    "get_hash_for_files",
    "ir",
    "list_mode_options",
    "list_options",
    "lowerings",
    "make_pointwise",
    "ops",
    "planned_fake_mode",
    "register_lowering",
    "vectorize_where",
    "writes_python",
    "writes_several",
    "written_into",
]


def planned_fake_mode() -> Any:
    """Return the mode in which the values of the graph that Inductor lowers are fake tensors."""
    return V.graph.fake_mode


def drop_guards(objects: Iterable[str]) -> None:
    """Let Dynamo guard none of some objects, nor what they hold, in the graph that it is compiling.

    objects: where they come from, L['self']._modules['fc']. Whether two tensors are one is guarded still.
    """
    context = TracingContext.try_get()
    if context is None:
        return
    within = tuple(f"{name}{end}" for name in objects for end in (".", "["))

    def is_kept(guard: Any) -> bool:
        return not f"{guard.name}.".startswith(within) or guard.inner_create_fn().__name__ == "DUPLICATE_INPUT"

    guards = context.guards_context.dynamo_guards
    context.guards_context.dynamo_guards = type(guards)(OrderedSet(filter(is_kept, guards)))


def writes_python() -> bool:
    """Tell whether the code that Inductor generates calls ops in Python, and not in C++."""
    return not V.graph.cpp_wrapper


def writes_several() -> bool:
    """Tell whether one call can write several tensors of planned memory: torch 2.13 has that, in Python."""
    return writes_python() and hasattr(ir, "ExternKernelMultiOut")


def written_into(
    op: Any, into: Any, example: tuple[Tensor, ...], tensors: Any, constants: Any, unflatten: Any
) -> tuple[ir.TensorBox, ...]:
    """Return the results, like those of example, that the out= variant of an op writes; the rest is process_kernel's.

    What Inductor itself makes of such an op does not know symbolic shapes.
    """
    outs = [argument.name for argument in into._schema.arguments if argument.is_out]
    layout = ir.MultiOutputLayout(device=example[0].device)
    call = ir.ExternKernelMultiOut(layout, op, tensors, constants, unflatten, out_op=into, out_arg_names=outs)
    layouts = map(ir.FallbackKernel.tensor_to_layout, example)
    results = [ir.AllocatingMultiOutput(layout, call, [(tuple, i)]) for i, layout in enumerate(layouts)]
    call.out_variant_output_nodes = call.outputs = results
    return tuple(map(ir.TensorBox.create, results))


class Bound(ir.ExternKernelAlloc):
    """A call of an object that the generated module makes when it is loaded: function(constants)(tensors)."""

    def __init__(self, layout: ir.Layout, tensors: list[ir.IRNode], function: str, constants: str) -> None:
        super().__init__(layout, tensors)
        self._function, self._constants = function, constants
        self.python_kernel_name = f"bound_{self.get_name()}"

    def codegen(self, wrapper: Any) -> None:
        """Write the object and its call."""
        module, _, name = self._function.rpartition(".")
        wrapper.add_import_once(f"from {module} import {name}")
        wrapper.header.writeline(f"{self.python_kernel_name} = {name}({self._constants})")
        super().codegen(wrapper)


class _Vectorizable(list[torch.dtype]):
    """What Inductor's code for a CPU vectorizes loops over, and another dtype in some graphs."""

    def __init__(
        self, dtypes: Iterable[torch.dtype], other: torch.dtype, where: Callable[[fx.GraphModule], bool]
    ) -> None:
        super().__init__(dtypes)
        self._other, self._where = other, where

    def __contains__(self, dtype: object) -> bool:
        return super().__contains__(dtype) or (
            dtype is self._other and self._where(cast(fx.GraphModule, V.graph.module))
        )


class _CountedTile(cpp.CppTile2DKernel):
    """A square of a transposed copy, each row of which is stored by its length."""

    def store(self, name: str, index: Any, value: Any, mode: Any = None) -> None:
        """Store a row: a vector of two-byte elements is longer, and Inductor stores it whole where it has no tail."""
        tail = self.tail_size
        if V.graph.get_dtype(name).itemsize == 2:
            self.tail_size = tail or self.num_elems
        try:
            super().store(name, index, value, mode)
        finally:
            self.tail_size = tail


def vectorize_where(dtype: torch.dtype, where: Callable[[fx.GraphModule], bool]) -> None:
    """Have Inductor's code for a CPU vectorize loops over a dtype in those graphs; twice does no harm."""
    if not isinstance(cpp.VECTORIZABLE_DTYPES, _Vectorizable):
        cpp.VECTORIZABLE_DTYPES = _Vectorizable(cpp.VECTORIZABLE_DTYPES, dtype, where)
        cpp.CppKernelProxy.tile2d_kernel_cls = _CountedTile
