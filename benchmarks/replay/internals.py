"""All that the replay touches of octav_fx beside its public names: a move or a renaming is one edit, here.

What is imported here must do the same on both sides of a comparison, for the replay runs the recorder of each commit.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from octav_fx import zoo
from octav_fx.backend import entry
from octav_fx.ir.printer import graph_text

__all__ = ["graph_text", "lowered_graphs", "zoo"]

# The key under which the backend hands LOWER to Inductor.
_LOWER = "joint_custom_pre_pass"


@contextmanager
def lowered_graphs(text: Callable[[fx.Graph], str]) -> Iterator[list[str]]:
    """Collect the text of each graph that LOWER has rewritten inside; they then run as they are, no code is made."""
    found: list[str] = []

    def instead(gm: fx.GraphModule, inputs: Sequence[Any], *, config_patches: dict[str, Any]) -> Any:
        recorded = _Recorded(config_patches[_LOWER], text, found)
        # Nothing that comes behind LOWER is recorded, and Inductor's patterns take longer than all the rest.
        patches = {**config_patches, _LOWER: recorded, "pattern_matcher": False, "joint_graph_constant_folding": False}
        return compile_fx(gm, inputs, inner_compile=_as_it_is, config_patches=patches)

    torch.compiler.reset()
    with (
        mock.patch.object(entry, "compile_fx", instead),
        # A graph that comes out of a cache does not pass LOWER.
        torch._functorch.config.patch(enable_autograd_cache=False),
        torch._inductor.config.patch(force_disable_caches=True),
        mock.patch("torch._inductor.fx_passes.joint_graph.lazy_init", _nothing),
    ):
        yield found
    torch.compiler.reset()


class _Recorded(CustomGraphPass):
    """LOWER, and then the text of what it left."""

    def __init__(self, lower: Callable[[fx.Graph], None], text: Callable[[fx.Graph], str], found: list[str]) -> None:
        self._lower, self._text, self._found = lower, text, found

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite a joint graph in place."""
        self._lower(graph)
        self._found.append(self._text(graph))

    def uuid(self) -> Any:
        """Nothing: there is no cache."""
        return None


def _as_it_is(gm: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
    # Inductor's calling convention: one list, which the graph may empty.
    return functools.partial(_unpacked, gm) if not hasattr(gm, "_boxed_call") else gm


def _unpacked(gm: fx.GraphModule, inputs: list[Any]) -> Any:
    return gm(*inputs)


def _nothing(*arguments: Any) -> None:
    pass
