"""torch.utils.checkpoint, whatever name user code has for it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch.utils.checkpoint as checkpoints
from torch import nn

# What checkpoint(use_reentrant=True) applies: to a function, whether to keep the state of random numbers, and inputs.
CheckpointFunction: Final = checkpoints.CheckpointFunction


@contextmanager
def watched_checkpoints(called: Callable[[], None]) -> Iterator[None]:
    """Call a function inside wherever checkpoint(use_reentrant=False) is called."""
    original = checkpoints._checkpoint_without_reentrant_generator

    def watched(*args: Any, **kwargs: Any) -> Any:
        called()
        return original(*args, **kwargs)

    checkpoints._checkpoint_without_reentrant_generator = watched
    try:
        yield
    finally:
        checkpoints._checkpoint_without_reentrant_generator = original


def wraps_a_checkpoint(module: nn.Module) -> bool:
    """Tell whether torch's checkpoint_wrapper made a module; what it recomputes is its one child."""
    kind = type(module)
    return kind.__name__ == "CheckpointWrapper" and kind.__module__.startswith("torch.distributed.algorithms.")
