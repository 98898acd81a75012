"""What is held between forward and backward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def saved_for_backward(forward: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The result of one forward, and the tensors that autograd and compiled functions keep of it."""
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    return result, [*saved, *_besides_autograd(result.grad_fn)]


def _besides_autograd(root: Any) -> list[Tensor]:
    """What compiled functions keep without telling autograd."""
    found: list[Tensor] = []
    stack, seen = [root], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found += [t for t in getattr(node, "_tensors_no_vc_check", None) or [] if isinstance(t, Tensor)]
        stack += [following for following, _ in node.next_functions]
    return found
