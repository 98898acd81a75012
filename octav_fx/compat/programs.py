"""What torch.export writes down of a module for free sizes, and what it found that Python asks of them."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.fx.experimental import _config as shape_settings

from octav_fx.compat.tensors import pytree


class Program:
    """A module as torch.export writes it: one graph, which holds where its guards do.

    numbers: those that its Python compares sizes with.
    """

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self.numbers = sorted({int(number) for guard in program._guards_code for number in re.findall(r"\d+", guard)})
        guarded = program.module()
        # There is none where nothing was asked.
        self._guards: Any = getattr(guarded, "_guards_fn", None)
        self._unguarded: Any = program.module(check_guards=False)

    def broken(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        """Return what is asked of the sizes of a call and does not hold, or None."""
        if self._guards is None:
            return None
        try:
            self._guards(*pytree.tree_leaves((args, dict(kwargs))))
        except AssertionError as error:
            return str(error).removeprefix("Guard failed: ")
        return None

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return what the graph computes, past its guards. Raises what ops raise."""
        # The checks are hooks of the call.
        return self._unguarded.forward(*args, **kwargs)


def exported(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_shapes: Any) -> Program:
    """Return what torch.export makes of a module for free axes, in the ways that its ONNX exporter has.

    Raises what the second of them raises.
    """
    # As there: a size of one is no constant.
    settings: Any = shape_settings
    with settings.patch(backed_size_oblivious=True):
        try:
            made = torch.export.export(module, args, dict(kwargs), dynamic_shapes=dynamic_shapes, strict=False)
        except Exception:
            made = torch.export.export(module, args, dict(kwargs), dynamic_shapes=dynamic_shapes, strict=True)
    return Program(made)
