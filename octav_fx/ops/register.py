"""How an op is registered: its reference, its kernel where there is one, and out= for Inductor's memory plan.

torch.library.custom_op would do the same with four times the Python in each call, and a network has hundreds of them.
"""

import functools
import importlib.util
import string
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from octav_fx.compat.tensors import pytree

# The kernels take any dense layout and keep it; without the tag Inductor would copy around every op.
LAYOUT_AGNOSTIC = (torch.Tag.flexible_layout,)
# Those on codes are slower where channels are not last, and Inductor would give them the layout of its own max pool.
AS_TRACED = (torch.Tag.needs_fixed_stride_order,)

# Every op that define() has registered, by name.
REGISTERED: dict[str, Any] = {}


def register_op(
    name: str,
    arguments: str,
    *,
    empty: Callable[..., Any],
    reference: Callable[..., Any],
    cpu: Callable[..., bool] | None = None,
    cuda: Callable[..., bool] | None = None,
    outs: tuple[str, ...] = ("out",),
) -> Any:
    """Register octav::name(arguments) -> Tensor and octav::name.out, which writes into out; return the op.

    empty(*args) allocates the result, and is its shape, dtype and layout for tracing; reference(*args) computes it in
    pure torch; cpu(*args, out=) writes it into out, or returns False where only the reference will do. So does
    cuda(*args, out=), which may import Triton: it is called where there is one. With several outs results are tuples.
    """

    def run_reference(*args: Any, **into: Tensor) -> None:
        for result, value in zip(outs, _as_tuple(reference(*args)), strict=True):
            into[result].copy_(value)

    def run_cpu(*args: Any, **into: Tensor) -> None:
        if cpu is None or not cpu(*args, **into):
            run_reference(*args, **into)

    def run_cuda(*args: Any, **into: Tensor) -> None:
        # Triton launches on the current device, whatever the tensors are on.
        with torch.cuda.device(into[outs[0]].device):
            written = cuda is not None and has_triton() and cuda(*args, **into)
        if not written:
            run_reference(*args, **into)

    def allocate(run: Callable[..., None]) -> Callable[..., Any]:
        def allocated(*args: Any) -> Any:
            found = empty(*args)
            run(*args, **dict(zip(outs, _as_tuple(found), strict=True)))
            return found

        return allocated

    functional, into = f"octav::{name}", f"octav::{name}.out"
    returns = "Tensor" if len(outs) == 1 else f"({', '.join(['Tensor'] * len(outs))})"
    written = ", ".join(f"Tensor({letter}!) {out}" for letter, out in zip(string.ascii_lowercase, outs, strict=False))
    torch.library.define(functional, f"({arguments}) -> {returns}", tags=LAYOUT_AGNOSTIC)
    # Neither tagged as an out variant nor returning out: Inductor's own lowering for those does not know symbolic
    # shapes (torch 2.13), so octav_fx/backend/inductor.py has another.
    torch.library.define(into, f"({arguments}, *, {written}) -> ()", tags=LAYOUT_AGNOSTIC)
    for key, run in {"CompositeExplicitAutograd": run_reference, "CPU": run_cpu, "CUDA": run_cuda}.items():
        torch.library.impl(functional, key, allocate(run))
        torch.library.impl(into, key, run)
    torch.library.register_fake(functional, empty)
    torch.library.register_fake(into, lambda *args, **into: None)
    torch.library.register_vmap(functional, functools.partial(_one_by_one, name))
    REGISTERED[name] = getattr(torch.ops.octav, name)
    return REGISTERED[name]


def _one_by_one(name: str, info: Any, axes: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    """Call an op for each index of the axis that vmap takes away, as torch would, without a warning."""
    op = getattr(torch.ops.octav, name)

    def call(i: int) -> tuple[Tensor, ...]:
        return _as_tuple(op(*(x if axis is None else x.select(axis, i) for x, axis in zip(args, axes, strict=True))))

    results = tuple(map(torch.stack, zip(*map(call, range(info.batch_size)), strict=True)))
    return (results[0], 0) if len(results) == 1 else (results, (0,) * len(results))


def _as_tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def register_allocating(
    name: str,
    arguments: str,
    *,
    returns: str = "Tensor",
    empty: Callable[..., Any],
    reference: Callable[..., Any],
    cpu: Callable[..., Any],
    tags: tuple[torch.Tag, ...] = AS_TRACED,
) -> Any:
    """Register octav::name(arguments) -> returns, whose CPU kernel allocates its results itself; return the op.

    cpu(*args) returns None where only the reference will do; its results are of the shape, dtype and layout of empty's.
    """

    def run_reference(*args: Any) -> Any:
        # In the layout that tracing was told.
        return pytree.tree_map(Tensor.copy_, empty(*args), reference(*args))

    def run_cpu(*args: Any) -> Any:
        found = cpu(*args)
        return run_reference(*args) if found is None else found

    torch.library.define(f"octav::{name}", f"({arguments}) -> {returns}", tags=tags)
    for key, run in {"CompositeExplicitAutograd": run_reference, "CPU": run_cpu}.items():
        torch.library.impl(f"octav::{name}", key, run)
    torch.library.register_fake(f"octav::{name}", empty)
    return getattr(torch.ops.octav, name)


@functools.cache
def has_triton() -> bool:
    """Tell whether kernels can be compiled for a GPU; a warning says, once, if not."""
    found = importlib.util.find_spec("triton") is not None
    if not found:
        warnings.warn("octav_fx: no Triton, quantizers on the GPU will be slow: pip install triton", stacklevel=2)
    return found
