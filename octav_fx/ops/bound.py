"""A layer on codes with those of its arguments that are no tensors, as compiled code calls it: past the dispatcher.

The dispatcher, and the look for what was prepared for a layer, take as long as a small layer.
"""

import weakref
from collections.abc import Sequence
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
        self._run: Run | None = None
        # The other tensors and their versions; an id is no tensor's while the reference lives.
        self._state: tuple[int, ...] | None = None
        self._references: list[weakref.ref[Tensor]] = []

    def __call__(self, x: Tensor, *others: Tensor) -> Tensor:
        """See the class."""
        if (*map(id, others), *versions_of(others)) != self._state:
            self._prepare(x, others)
        y = self._run(x) if self._run is not None and x.numel() else None
        if y is None:
            y = getattr(torch.ops.octav, self._op).default(*self._arguments(x, others))
        return y

    def _prepare(self, x: Tensor, others: Sequence[Tensor]) -> None:
        self._run = _PREPARED[self._op](*self._arguments(x, others))
        self._references = [weakref.ref(tensor, self._forget) for tensor in others]
        self._state = (*map(id, others), *versions_of(others))

    def _forget(self, reference: weakref.ref[Tensor]) -> None:
        self._state = None

    def _arguments(self, x: Tensor, others: Sequence[Tensor]) -> list[Any]:
        tensors = iter((x, *others))
        return [next(tensors) if value is ... else value for value in self._given]
