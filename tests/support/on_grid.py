"""Seeing from outside that operands are quantized: what the dispatcher is given at each contraction."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_CONVOLUTIONS = (aten.convolution.default, aten._convolution.default)
# Op -> positions of its operands.
_MATMULS = {
    **dict.fromkeys((aten.mm.default, aten.bmm.default, aten._grouped_mm.default), (0, 1)),
    **dict.fromkeys((aten.addmm.default, aten.baddbmm.default), (1, 2)),
}
_ATTENTIONS = (
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
)
# Of larger operands that many elements, evenly spaced: enough to find a float one, few enough to look at every operand
# of models of 600 M parameters.
_ELEMENTS = 2**18
_CHANNELS = 64


class OnGrid(TorchDispatchMode):
    """Collects every operand with more distinct values than levels; checked counts the contractions seen."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.levels, self.checked = 2**bits, 0
        self.off_grid: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CONVOLUTIONS:
            transposed = args[6]
            self._see(func, args[0], None)
            self._see(func, args[1], 1 if transposed else 0)
            self.checked += 1
        elif func in _MATMULS:
            first, second = _MATMULS[func]
            self._see(func, args[first], None)
            # linear and x @ w bring a weight here, its output channels last.
            self._see(func, args[second], -1)
            self.checked += 1
        elif func in _ATTENTIONS:
            for operand in args[:3]:
                self._see(func, operand, None)
            self.checked += 1
        return func(*args, **(kwargs or {}))

    def _see(self, func: Any, x: Tensor, channel: int | None) -> None:
        if has_at_most(spaced(x.reshape(1, -1), _ELEMENTS), self.levels):
            return
        if channel is not None:
            rows = x.movedim(channel, 0).flatten(1)
            if rows.numel() > _ELEMENTS:
                rows = rows[:: max(1, len(rows) // _CHANNELS)]
                rows = spaced(rows, max(_ELEMENTS // len(rows), 16 * self.levels))
            if has_at_most(rows, self.levels):
                return
        self.off_grid.append((str(func), tuple(x.shape)))


def spaced(rows: Tensor, count: int) -> Tensor:
    """About count columns of [R, N], at an odd distance so that no power of two of a layout hides the rest."""
    distance = rows.shape[1] // count
    return rows if distance < 2 else rows[:, :: distance | 1]


def has_at_most(rows: Tensor, levels: int) -> bool:
    """Whether each row [R, N] has at most that many distinct values."""
    # A float tensor shows itself at once.
    if any(len(row.unique()) > levels for row in rows[:1, : 16 * levels]):
        return False
    if len(rows) == 1:
        left = rows.flatten()
        for _ in range(levels):
            if not len(left):
                return True
            left = left[left != left[0]]
        return not len(left)
    ordered = rows.sort(-1).values
    return bool(((ordered[:, 1:] != ordered[:, :-1]).sum(-1) < levels).all())
