"""A graph as stable text, for tests and for people."""

import hashlib
import re
from typing import Any

from torch import fx


def fingerprint(graph: fx.Graph) -> str:
    """Return a hash of what a graph computes from its inputs and the state under its names."""
    inputs = [f"{node.name} {node.target}" for node in graph.find_nodes(op="placeholder")]
    text = "\n".join([*inputs, graph_text(graph)])
    # An object that prints its address is at another one in a copy.
    return hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", text).encode()).hexdigest()


def graph_text(graph: fx.Graph) -> str:
    """Return one line for each node that is not a placeholder or the output: name = target(arguments)."""
    lines = []
    for node in graph.nodes:
        arguments = [_text(arg) for arg in node.args] + [f"{key}={_text(value)}" for key, value in node.kwargs.items()]
        match node.op:
            case "placeholder":
                continue
            case "output":
                lines.append(f"return {arguments[0]}")
            case "get_attr":
                lines.append(f"{node.name} = self.{node.target}")
            case "call_module":
                lines.append(f"{node.name} = self.{node.target}({', '.join(arguments)})")
            case "call_method":
                lines.append(f"{node.name} = {arguments[0]}.{node.target}({', '.join(arguments[1:])})")
            case _:
                name = getattr(node.target, "__name__", str(node.target))
                lines.append(f"{node.name} = {name}({', '.join(arguments)})")
    return "\n".join(lines)


def _text(argument: Any) -> str:
    if isinstance(argument, fx.Node):
        return argument.name
    if isinstance(argument, (list, tuple)):
        inner = ", ".join(map(_text, argument))
        return f"[{inner}]" if isinstance(argument, list) else f"({inner})"
    return repr(argument)
