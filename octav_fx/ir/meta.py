"""What our passes know of a node, typed: its fake value, and a NodeInfo under one key of node.meta."""

from dataclasses import dataclass, replace
from typing import Any, Final

from torch import fx

from octav_fx.ir.op import Op

_INFO: Final = "octav"
_VALUE: Final = "value"
# Where capture and our passes, Dynamo and AOTAutograd keep what a node computes for the example inputs.
_DIALECTS: Final = (_VALUE, "example_value", "val")


@dataclass(frozen=True, slots=True)
class State:
    """The parameter or buffer that a placeholder of a Dynamo graph stands for."""

    name: str
    is_parameter: bool


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """What is known of one node besides its value."""

    # The name by which users, overrides and tables know a contraction.
    site: str | None = None
    # The user's rule that it falls under.
    op: Op | None = None
    # It calls a module that the user wants left as it is.
    is_leaf: bool = False
    # Multiply-accumulates for the example inputs.
    macs: int = 0
    # The line of the user's code from which on no value is known.
    unknown_since: str | None = None
    state: State | None = None


_NOTHING: Final = NodeInfo()


def info(node: fx.Node) -> NodeInfo:
    """Return what is known of a node."""
    return node.meta.get(_INFO, _NOTHING)


def update(node: fx.Node, **changes: Any) -> None:
    """Replace fields of what is known of a node."""
    node.meta[_INFO] = replace(info(node), **changes)


def fake(node: fx.Node) -> Any:
    """Return what a node computes for the example inputs: fake tensors, numbers, shapes; None where nothing is known.

    In a graph of any dialect: captured, of Dynamo, of AOTAutograd.
    """
    return next((node.meta[key] for key in _DIALECTS if key in node.meta), None)


def set_fake(node: fx.Node, value: Any) -> None:
    """Say what a node of a captured graph computes for the example inputs."""
    node.meta[_VALUE] = value


def copy_meta(source: fx.Node, target: fx.Node) -> fx.Node:
    """Let what is known of a node hold for the node that replaces it, and return that."""
    target.meta = dict(source.meta)
    return target


def keep_site(node: fx.Node) -> None:
    """Drop what only passes need; kept, fake tensors would stand in the way of copying and pickling."""
    site = info(node).site
    node.meta = {} if site is None else {_INFO: NodeInfo(site)}
