"""The arguments of a call by the names of its op's parameters, however they are written. Of captured graphs."""

import inspect
from dataclasses import replace
from typing import Any

from torch import fx, nn

from octav_fx.errors import OctavError
from octav_fx.ir.einsum import summed_axes
from octav_fx.ir.op import REQUIRED, Op, Operand
from octav_fx.ir.ops import module_of, op_of


def arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a call by name and in the order of its op's parameters, defaults included.

    A module's own attributes (running_mean, eps) count as arguments of its call; a default is that of the canonical
    spelling. REQUIRED stands for what is given by a keyword that the row does not know. Raises OctavError for a node of
    no row.
    """
    op = _known(node)
    found = dict(op.parameters)
    if node.op == "call_module":
        module = module_of(node)
        found |= {name: getattr(module, word) for word, name in op.keywords.items() if hasattr(module, word)}
    found |= dict(zip(op.parameters, node.args, strict=False))
    found |= {op.keywords.get(word, word): value for word, value in node.kwargs.items()}
    return found


def argument(node: fx.Node, name: str) -> Any:
    """Return one argument of a call. Raises OctavError where the call, or the row of its op, has none of this name."""
    value = arguments(node).get(name, REQUIRED)
    if value is REQUIRED:
        raise OctavError(
            f"{node.name}: the row of {_known(node).name} in octav_fx/ir/table finds no {name!r} in this call"
        )
    return value


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Replace one argument of a function call where it is written, or add it: as the next one, else by its name."""
    op = _known(node)
    index = list(op.parameters).index(name)
    keyword = next((word for word in node.kwargs if op.keywords.get(word) == name), name)
    if index < len(node.args):
        node.update_arg(index, value)
    elif index == len(node.args) and keyword not in node.kwargs:
        node.args = (*node.args, value)
    else:
        node.update_kwarg(keyword, value)


def called_module(value: Any) -> nn.Module | None:
    """Return the module whose call an argument is; None for any other argument."""
    is_call = isinstance(value, fx.Node) and value.op == "call_module"
    return module_of(value) if is_call else None


def bound_arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a call of a Python function that no row knows, by the names of its parameters."""
    assert callable(node.target)
    return dict(inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments)


def spread_operands(node: fx.Node) -> tuple[Any, ...]:
    """Return the arguments of a call of einsum with its operands one by one, given so or as a list."""
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    return (equation, *operands)


def operands_of(node: fx.Node) -> list[Operand]:
    """Return the operands of this very call; a contraction of one operand has none (einsum as a transpose or a sum).

    Those of an einsum have the reduction axis that its equation says.
    """
    op = op_of(node)
    if op is None or not op.variadic:
        return [] if op is None else list(op.operands)
    first = op.operands[0]
    count = len(node.args) - first.index
    if count < 2:
        return []
    equation = node.args[0]
    axes = summed_axes(equation) if isinstance(equation, str) else [None] * count
    return [
        replace(first, index=first.index + i, name=f"{first.name}{i}", reduction=axis) for i, axis in enumerate(axes)
    ]


def operand_of(node: fx.Node, operand: Operand) -> Any:
    """Return the current value of an operand of a canonical node."""
    value: Any = node.args[operand.index]
    return value if operand.part is None else value[operand.part]


def set_operand(node: fx.Node, operand: Operand, value: fx.Node) -> None:
    """Replace one operand, by position: replace_input_with would change both inputs of matmul(x, x)."""
    if operand.part is None:
        node.update_arg(operand.index, value)
        return
    parts: Any = node.args[operand.index]
    node.update_arg(operand.index, [value if i == operand.part else part for i, part in enumerate(parts)])


def module_input(node: fx.Node) -> fx.Node:
    """Return what a module of one input, such as a quantizer, is called with."""
    (value,) = (*node.args, *node.kwargs.values())
    assert isinstance(value, fx.Node)
    return value


def _known(node: fx.Node) -> Op:
    op = op_of(node)
    if op is None:
        raise OctavError(
            f"{node.name}: no row of octav_fx/ir/table knows {node.target}, so its arguments have no names"
        )
    return op
