"""Inductor and Dynamo, as a backend of torch.compile needs them."""

from typing import Any

from torch._dynamo.exc import ShortenTraceback
from torch._inductor import ir, list_mode_options, list_options
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.lowering import fallback_handler, lowerings, make_pointwise, register_lowering
from torch._inductor.virtualized import V, ops

__all__ = [
    "CustomGraphPass",
    "ShortenTraceback",
    "compile_fx",
    "fallback_handler",
    "get_hash_for_files",
    "ir",
    "list_mode_options",
    "list_options",
    "lowerings",
    "make_pointwise",
    "ops",
    "planned_fake_mode",
    "register_lowering",
]


def planned_fake_mode() -> Any:
    """Return the mode in which the values of the graph that Inductor lowers are fake tensors."""
    return V.graph.fake_mode
