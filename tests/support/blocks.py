"""A model of repeated blocks that can be recomputed, and what is kept for its backward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

WIDTH = 16


class Block(nn.Module):
    """A residual MLP with a mean of what it computed, which the user reads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """A stem, blocks that can be recomputed, and a head whose weight is the stem's."""

    def __init__(self, depth: int = 3, recompute: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv1d(WIDTH, WIDTH, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head, self.tied = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.tied.weight = self.head.weight
        self.grad_checkpointing = recompute

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.stem(x.transpose(1, 2)).transpose(1, 2).relu()
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing and self.training else block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.head(self.forward_features(x)))


def batch(size: int = 2) -> Tensor:
    return torch.randn(size, 5, WIDTH)


def saved_bytes(call: Callable[[Any], Any], x: Any, model: nn.Module) -> int:
    """Bytes of the distinct storages that are kept for backward, those of parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call(x)
    del y
    return sum(kept.values())
