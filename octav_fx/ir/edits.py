"""What a pass did, or declined to do, and the few ways in which passes add to a graph."""

import contextlib
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import fx

from octav_fx.compat.tensors import FakeTensor, detect_fake_mode, pytree
from octav_fx.ir.macs import MacCounter
from octav_fx.ir.meta import fake, info, set_fake, update


class Kind(Enum):
    """What an edit is to the user."""

    APPLIED = "applied"
    # Declined because the Config says so: nothing to tell but in the row of the operand.
    BY_CONFIG = "by config"
    # Declined although asked for: the row of the node says why, and a compiled model, which has no rows, warns.
    UNSUPPORTED = "unsupported"
    # Declined, and nothing stays float because of it: a note below the table.
    INFO = "info"


@dataclass(frozen=True, slots=True)
class Edit:
    """One thing a pass did, or declined to do and why. The list of them is the report."""

    node: str
    verb: str
    detail: str
    # The operand it is about, if it is about one.
    operand: str | None = None
    kind: Kind = Kind.APPLIED

    @property
    def declined(self) -> bool:
        """Return whether the graph is as it was."""
        return self.kind is not Kind.APPLIED

    @classmethod
    def by_config(cls, node: fx.Node | str, reason: str, operand: str | None = None) -> "Edit":
        """Return what was left as it is because the Config says so."""
        return cls(_name(node), "skip", reason, operand, Kind.BY_CONFIG)

    @classmethod
    def unsupported(cls, node: fx.Node | str, reason: str, operand: str | None = None) -> "Edit":
        """Return what stays float, or as it is, for this reason."""
        return cls(_name(node), "skip", reason, operand, Kind.UNSUPPORTED)

    @classmethod
    def info(cls, node: fx.Node | str, reason: str, operand: str | None = None) -> "Edit":
        """Return what was not done, without a loss to what is quantized."""
        return cls(_name(node), "skip", reason, operand, Kind.INFO)


def site_of(node: fx.Node) -> str:
    """Return the name a user knows a node by: its module's path, set by canonicalize; else the name of the node."""
    return info(node).site or node.name


def _name(node: fx.Node | str) -> str:
    return node if isinstance(node, str) else site_of(node)


def insert_captured(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Insert a call of a function, or of a method by its name, with its fake value and its work as capture does."""
    is_method = isinstance(target, str)
    node = graph.call_method(target, args, kwargs) if is_method else graph.call_function(target, args, kwargs)
    values, named = fx.node.map_arg((args, kwargs), fake)
    # That of the values: in a backend the tracing context has another.
    mode = next((leaf.fake_mode for leaf in pytree.tree_leaves(values) if isinstance(leaf, FakeTensor)), None)
    with mode or contextlib.nullcontext(), torch.no_grad(), MacCounter() as counter:
        set_fake(node, (getattr(torch.Tensor, target) if is_method else target)(*values, **named))
    update(node, macs=counter.macs)
    return node


def erase_unused(*values: Any) -> None:
    """Erase, in the given order, those nodes among some arguments that nothing reads."""
    for value in values:
        if isinstance(value, fx.Node) and not value.users:
            value.graph.erase_node(value)


def erase_with_sources(node: fx.Node) -> None:
    """Erase a node that nothing reads, and what only it read; inputs of the model stay."""
    if node.users or node.op == "placeholder":
        return
    sources = node.all_input_nodes
    node.graph.erase_node(node)
    for source in sources:
        erase_with_sources(source)


def insert_aten(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Insert a call into an aten graph, with its fake value in meta["val"] as AOTAutograd leaves it on every node."""
    node = graph.call_function(target, args, kwargs)
    values, named = fx.node.map_arg((args, kwargs), lambda argument: argument.meta["val"])
    with detect_fake_mode((values, named)) or contextlib.nullcontext():
        node.meta["val"] = target(*values, **named)
    return node
