"""A layer on codes with those of its arguments that are no tensors, as compiled code calls it: past the dispatcher.

The dispatcher, and the look for what was prepared for a layer, take as long as a small layer.
"""

import weakref
from typing import Any, Final

import torch
from torch import Tensor

from octav_fx.compat.tensors import versions_of
from octav_fx.ops.integer_conv.op import prepared as prepared_conv
from octav_fx.ops.integer_linear.op import prepared as prepared_linear
from octav_fx.ops.onednn import Run

_PREPARED: Final = {"integer_conv": prepared_conv, "integer_linear": prepared_linear}


class Bound:
    """Codes x and the other tensors of a layer -> its result: what torch.ops.octav.integer_conv or _linear returns.

    given: the arguments of the op in their order, `...` where a tensor goes; x is the first. What is prepared for the
    other tensors is kept until one of them is written into, or another takes its place.
    """

    def __init__(self, op: str, *given: Any) -> None:
        self._op, self._given = op, given
        # Read and written at once: models of one code share this object, and may run in several threads.
        self._prepared: tuple[tuple[int, ...], Run | None, list[weakref.ref[Tensor]]] = (), None, []

    def __call__(self, x: Tensor, *others: Tensor) -> Tensor:
        """See the class."""
        (state, run, _), now = self._prepared, (*map(id, others), *versions_of(others))
        if state != now:
            run = _PREPARED[self._op](*self._arguments(x, others))
            # What is gone calls back: another tensor may have its id then.
            self._prepared = now, run, [weakref.ref(tensor, self._forget) for tensor in others]
        y = run(x) if run is not None and x.numel() else None
        if y is None:
            y = getattr(torch.ops.octav, self._op).default(*self._arguments(x, others))
        return y

    def _forget(self, reference: weakref.ref[Tensor]) -> None:
        self._prepared = (), None, []

    def _arguments(self, x: Tensor, others: tuple[Tensor, ...]) -> list[Any]:
        tensors = iter((x, *others))
        return [next(tensors) if value is ... else value for value in self._given]
