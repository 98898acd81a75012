"""How nodes without a module of their own are named for the user."""

from collections.abc import Container

from torch import fx


def in_scope(node: fx.Node, name: str) -> str:
    """Return the path of the module whose forward calls a node, with a name behind it."""
    stack = node.meta.get("nn_module_stack") or {}
    scope = next(reversed(stack.values()))[0] if stack else ""
    return f"{scope}.{name}".lstrip(".")


def in_model(site: str, path: str, is_op: bool) -> str:
    """Return the name in the model of a node of the module with a path; of one that is a single op, the path."""
    if is_op:
        return path
    return f"{path}.{site}" if path else site


def numbered(site: str, taken: Container[str]) -> str:
    """Return the site, with :1, :2, ... for further calls of the same module."""
    name, count = site, 0
    while name in taken:
        count += 1
        name = f"{site}:{count}"
    return name
