"""Multiply-accumulates, counted while code runs; the work of most ops is what torch's own flop counter says."""

import contextlib
import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from octav_fx.compat.tensors import (
    TorchDispatchMode,
    body_of,
    composed,
    functional,
    is_higher_order,
    packet_of,
    pytree,
)

aten = torch.ops.aten


def _attention_on_cpu(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Count both products; queries in groups share heads of keys, whose number counts for nothing."""
    return 2 * math.prod(query.shape[:-1]) * key.shape[-2] * (key.shape[-1] + value.shape[-1])


def _trilinear(first: Tensor, weight: Tensor, second: Tensor, *_: Any, **__: Any) -> int:
    """Count a bilinear layer: first [..., 1, I], weight [O, I, J], second [..., 1, J] after torch's expansions."""
    return 2 * math.prod(first.shape[:-1]) * weight.numel()


def _conv_tbc(x: Tensor, weight: Tensor, bias: Tensor, pad: int = 0) -> int:
    """Count a convolution with time first: x [T, B, I], weight [K, I, O]."""
    return 2 * (x.shape[0] + 2 * pad - weight.shape[0] + 1) * x.shape[1] * weight.numel()


def _lstm_layer(x: Tensor, weight: Tensor, recurrent_weight: Tensor, *_: Any, **__: Any) -> int:
    """Count one layer and direction: both weights meet each of the [T, B] vectors."""
    return 2 * math.prod(x.shape[:-1]) * (weight.numel() + recurrent_weight.numel())


def _grouped(mat_a: Tensor, mat_b: Tensor, *_: Any, **__: Any) -> int:
    """Count rows [S, I] times their expert's weights [E, I, O], or a batch of products [G, S, I], [G, I, O]."""
    return 2 * mat_a.numel() * mat_b.shape[-1]


def _vector(matrix: Tensor, vector: Tensor) -> int:
    """Count a matrix [O, I] times a vector [I], or one vector times another."""
    return 2 * matrix.numel()


def _plus_vector(bias: Tensor, matrix: Tensor, vector: Tensor, **_: Any) -> int:
    return 2 * matrix.numel()


def _plus_outer(bias: Tensor, first: Tensor, second: Tensor, **_: Any) -> int:
    return 2 * first.numel() * second.numel()


def _plus_batches(bias: Tensor, first: Tensor, second: Tensor, **_: Any) -> int:
    """Count products of batches, [B, N, I] times [B, I, O], that are added up."""
    return 2 * first.numel() * second.shape[-1]


def _distances(first: Tensor, second: Tensor, *_: Any, **__: Any) -> int:
    """Count a term for each pair of rows and each of their elements: [..., N, I], [..., M, I]."""
    return 2 * first.numel() * second.shape[-2]


# Missing from torch's table.
_OURS: Final[dict[Any, Callable[..., int]]] = {
    aten.mv: _vector,
    aten.dot: _vector,
    aten.vdot: _vector,
    aten.addmv: _plus_vector,
    aten.addr: _plus_outer,
    aten.addbmm: _plus_batches,
    aten._cdist_forward: _distances,
    aten._euclidean_dist: _distances,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_on_cpu,
    aten._trilinear: _trilinear,
    aten.conv_tbc: _conv_tbc,
    aten.mkldnn_rnn_layer: _lstm_layer,
    aten._grouped_mm: _grouped,
}
# Operators that call what they are given and count as a whole, by name: what the table of torch 2.11 lacks.
_HIGHER: Final[dict[str, Callable[..., int]]] = {"flex_attention": _attention_on_cpu}


class MacCounter(TorchDispatchMode):
    """With MacCounter() as counter: ...; counter.macs is what matmuls and convolutions inside took.

    Not torch's FlopCounterMode itself, which follows modules by gradient hooks that expanded parameters cannot have.
    """

    # torch.while_loop and its like call what they are given, which is counted; flex_attention has an entry.
    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let what forward compiles be compiled inside, and count what that runs.

        Code that was not compiled once, as a mode was on, is never compiled later: flex_attention and while_loop, which
        compile themselves, would fail in the user's model, too.
        """
        return True

    def __init__(self) -> None:
        super().__init__()
        self._operations = 0

    @property
    def macs(self) -> int:
        """Return the multiply-accumulates so far; each is two operations."""
        return self._operations // 2

    def _count_inside(self, func: Any, args: Any, kwargs: Any) -> None:
        """Count what the Python code of a custom op multiplies, where that code runs on these tensors."""
        body = body_of(func)
        if body is not None:
            # It may want memory, or a device, that fake tensors do not have.
            with contextlib.suppress(Exception), self:
                body(*args, **kwargs)

    def _run_higher_order(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator, and count it by its entry, else what it calls."""
        if (operations := flop_registry.get(func) or _HIGHER.get(func.name())) is not None:
            result = func(*args, **kwargs)
            self._operations += int(operations(*args, **kwargs, out_val=result))
            return result
        args, kwargs = pytree.tree_map_only(callable, self._counted, (args, kwargs))
        return func(*args, **kwargs)

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with self:
                return function(*args)

        return run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an op and add its work; an op without an entry counts by what it is made of."""
        kwargs = kwargs or {}
        if is_higher_order(func):
            return self._run_higher_order(func, args, kwargs)
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            # What wraps tensors, as a nested tensor does, comes back with these.
            return NotImplemented
        packet = functional(packet_of(func))
        if packet not in _OURS and packet not in flop_registry and func is not torch.ops.prim.device.default:
            with self:
                result = composed(func, args, kwargs)
            if result is not NotImplemented:
                return result
            self._count_inside(func, args, kwargs)
        result = func(*args, **kwargs)
        if packet in _OURS:
            self._operations += _OURS[packet](*args, **kwargs)
        elif packet in flop_registry:
            self._operations += int(flop_registry[packet](*args, **kwargs, out_val=result))
        return result
