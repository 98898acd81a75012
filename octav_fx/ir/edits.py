"""What a pass did, and the few ways in which passes change a graph."""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from octav_fx.compat.tensors import FakeTensor, detect_fake_mode, pytree
from octav_fx.ir.macs import MacCounter
from octav_fx.ir.rules import Operand


@dataclass(frozen=True, slots=True)
class Edit:
    """One thing a pass did, or declined to do and why. The list of them is the report."""

    node: str
    verb: str
    detail: str
    # The operand it is about, if it is about one.
    operand: str | None = None

    @property
    def declined(self) -> bool:
        """Whether the graph is as it was."""
        return self.verb == "skip"


def skip(node: fx.Node | str, reason: str, operand: str | None = None) -> Edit:
    """A refusal: the graph is as it was, and the user's table says why."""
    return Edit(node if isinstance(node, str) else site_of(node), "skip", reason, operand)


def site_of(node: fx.Node) -> str:
    """The name a user knows a node by: its module's path, set by canonicalize; else the name of the node."""
    return str(node.meta.get("site", node.name))


def operand_of(node: fx.Node, operand: Operand) -> Any:
    """The current value of an operand of a canonical node."""
    return node.args[operand.index]


def set_operand(node: fx.Node, operand: Operand, value: fx.Node) -> None:
    """Replace one operand, by position: replace_input_with would change both inputs of matmul(x, x)."""
    node.update_arg(operand.index, value)


def copy_meta(source: fx.Node, target: fx.Node) -> fx.Node:
    """What is known of a node's value holds for the node that replaces it."""
    target.meta = dict(source.meta)
    return target


def insert_captured(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    """A call of a function, or of a method by its name, with its fake value and its work as a capture leaves them."""
    node = graph.call_method(target, args) if isinstance(target, str) else graph.call_function(target, args)
    values = fx.node.map_arg(args, lambda argument: argument.meta["value"])
    # That of the values: in a backend the tracing context has another.
    mode = next((leaf.fake_mode for leaf in pytree.tree_leaves(values) if isinstance(leaf, FakeTensor)), None)
    with mode or contextlib.nullcontext(), torch.no_grad(), MacCounter() as counter:
        node.meta["value"] = (getattr(torch.Tensor, target) if isinstance(target, str) else target)(*values)
    node.meta["macs"] = counter.macs
    return node


def insert_aten(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A call in an aten graph, with its fake value in meta["val"] as AOTAutograd leaves it on every node."""
    node = graph.call_function(target, args, kwargs)
    values = fx.node.map_arg(args, lambda argument: argument.meta["val"])
    with detect_fake_mode(values) or contextlib.nullcontext():
        node.meta["val"] = target(*values, **kwargs)
    return node
