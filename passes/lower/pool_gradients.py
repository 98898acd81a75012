"""Compute gradients of max pools by torch's own kernel, on a CPU, and not by code that Inductor generates.

    zeros = full([N * C, H * W], 0)
    dx = scatter_add(zeros, 1, view(indices), view(g))  ->  dx = max_pool_gradient(g, indices, [N, C, H, W], ..)
    dx = view(dx, [N, C, H, W])

on the half of the graph that it is in, where indices are those of a max pool. The left side is what AOTAutograd makes
of the gradient. The values are the same, but for the order in which windows that share a maximum add up. It counts
places by channel, whereas convolutions run with channels last: in code that Inductor generates it took 30 ms of a step
of ResNet-18, the kernel takes 1. Other devices and free sizes are not looked at.
"""

from typing import Final

import torch
from torch import fx

from octav_fx.compat.graphs import is_indices_of_pool
from octav_fx.ir.calls import Arguments, arguments_of, insert_call
from octav_fx.ir.edits import Edit, insert_aten
from octav_fx.ir.joint import CONVERT, COPIES, erase_unread, origin, replace
from octav_fx.ir.meta import fake

octav, aten = torch.ops.octav, torch.ops.aten

_SHAPES: Final = frozenset({aten.view.default, aten.reshape.default})


def pool_gradients(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits = []
    for node in gm.graph.find_nodes(op="call_function", target=aten.scatter_add.default):
        call = arguments_of(node)
        indices, (result, *others) = origin(call.index, _SHAPES | COPIES), node.users
        value = fake(result)
        is_pool = is_indices_of_pool(indices) and not others and result.target in _SHAPES and _is_zeros(call["self"])
        if not is_pool or value.device.type != "cpu" or not all(isinstance(size, int) for size in value.shape):
            continue
        pool, size, grad = arguments_of(indices), list(value.shape), origin(call.src, _SHAPES | COPIES | {CONVERT})
        if value.dim() != 4 or fake(grad).shape != fake(indices).shape:
            continue
        with gm.graph.inserting_before(result):
            if fake(grad).dtype is not value.dtype:
                grad = insert_aten(gm.graph, CONVERT, grad, value.dtype)
            ceil_mode = _is_ceil(pool, size, fake(grad).shape)
            named = {"grad": grad, "indices": indices, "size": size, "ceil_mode": ceil_mode}
            new = insert_call(gm.graph, octav.max_pool_gradient.default, pool, named)
        edits.append(Edit(node.name, "pool gradient", f"{size}"))
        replace(result, new)
        erase_unread(node, _SHAPES | COPIES | {aten.scatter_add.default, aten.full.default, CONVERT})
    return edits


def _is_zeros(node: fx.Node) -> bool:
    return node.target is aten.full.default and arguments_of(node).fill_value == 0


def _is_ceil(pool: Arguments, size: list[int], pooled: torch.Size) -> bool:
    """Return whether windows may go beyond the border, which shows where there are more of them than fit."""
    windows = zip(size[2:], pool.kernel_size, pool.stride, pool.padding, pool.dilation, strict=True)
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in windows] != list(pooled[2:])
