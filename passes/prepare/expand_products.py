"""Write what multiplies more than two matrices, or in a way of its own, as single products.

    einsum("ab,bc,cd->ad", x, y, z)  ->  einsum("ac,cd->ad", einsum("ab,bc->ac", x, y), z)
    multi_dot([x, y, z])             ->  matmul(matmul(x, y), z), or matmul(x, matmul(y, z)) if that is less work
    matrix_power(x, 3)               ->  matmul(matmul(x, x), x)
    inner(x, y), tensordot(x, y, 1)  ->  matmul(x, y.t()), matmul(x, y), or the einsum that says the same
    vdot(x, y)                       ->  matmul(x, y), of real numbers
    x.addmm_(y, z)                   ->  x.copy_(addmm(x, y, z))

Products are associative, so all of these are equal but for the rounding of sums. Each then has two operands that are
quantized like any others; left as it was, what lies between two products would stay float.
"""

import math
import string
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, fx

from octav_fx.ir.arguments import spread_operands
from octav_fx.ir.edits import Edit, insert_captured
from octav_fx.ir.einsum import terms_of
from octav_fx.ir.meta import fake, info
from octav_fx.ir.ops import OPS


def expand_products(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits = []
    for node in list(gm.graph.nodes):
        expand = _EXPANSIONS.get(node.target)
        if expand is None or info(node).op is not None or node.kwargs.get("out") is not None:
            continue
        with gm.graph.inserting_before(node):
            new = expand(node)
        if new is not None:
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
            edits.append(Edit(new.name, "expand", node.name))
    return edits


def _value(argument: Any) -> Tensor | None:
    value = fake(argument) if isinstance(argument, fx.Node) else argument
    return value if isinstance(value, Tensor) and value.is_floating_point() else None


def _matmul(x: Any, y: Any) -> fx.Node:
    return insert_captured((x if isinstance(x, fx.Node) else y).graph, torch.matmul, x, y)


def _arguments(node: fx.Node, *names: str, **defaults: Any) -> list[Any]:
    """Return the arguments of a call by the names of its parameters, of which "self" may be the first."""
    given = dict(zip((*names, *defaults), node.args, strict=False))
    kwargs = {names[0] if word == "self" else word: value for word, value in node.kwargs.items() if word != "out"}
    return list({**dict.fromkeys(names), **defaults, **given, **kwargs}.values())


def _einsum(node: fx.Node) -> fx.Node | None:
    equation, *operands = spread_operands(node)
    if not isinstance(equation, str) or len(operands) < 3:
        return None
    terms, output = terms_of(equation)
    result, term = operands[0], terms[0]
    for i, (operand, other) in enumerate(zip(operands[1:], terms[1:], strict=True), start=2):
        later = "".join(terms[i:]) + output
        kept = [c for c in dict.fromkeys((term + other).replace(".", "")) if c in later]
        between = ("..." if "." in term + other else "") + "".join(kept)
        between = output if i == len(operands) else between
        result = insert_captured(node.graph, torch.einsum, f"{term},{other}->{between}", result, operand)
        term = between
    return result


def _tensordot(node: fx.Node) -> fx.Node | None:
    x, y, dims = _arguments(node, "a", "b", dims=2)
    first, second = _value(x), _value(y)
    if first is None or second is None or isinstance(dims, (fx.Node, Tensor)):
        return None
    if isinstance(dims, int):
        dims = (range(first.dim() - dims, first.dim()), range(dims))
    of_first, of_second = ([dim % value.dim() for dim in of] for of, value in zip(dims, (first, second), strict=True))
    return _contract(x, y, of_first, of_second)


def _inner(node: fx.Node) -> fx.Node | None:
    x, y = _arguments(node, "input", "other")
    first, second = _value(x), _value(y)
    if first is None or second is None or 0 in (first.dim(), second.dim()):
        return None
    return _contract(x, y, [first.dim() - 1], [second.dim() - 1])


def _contract(x: fx.Node, y: fx.Node, of_x: Sequence[int], of_y: Sequence[int]) -> fx.Node:
    """Sum products over these axes; as a matmul, whose weight has a channel axis, where that says the same."""
    first, second = _value(x), _value(y)
    assert first is not None and second is not None
    if list(of_x) == [first.dim() - 1] and len(of_y) == 1 and second.dim() <= 2:
        return _matmul(x, y if of_y[0] == 0 else insert_captured(y.graph, "t", y))
    letters = iter(string.ascii_letters)
    labels = [next(letters) for _ in range(first.dim())]
    others = [next(letters) for _ in range(second.dim())]
    for i, j in zip(of_x, of_y, strict=True):
        others[j] = labels[i]
    summed = {labels[i] for i in of_x}
    output = "".join(c for c in (*labels, *others) if c not in summed)
    return insert_captured(x.graph, torch.einsum, f"{''.join(labels)},{''.join(others)}->{output}", x, y)


def _vdot(node: fx.Node) -> fx.Node | None:
    x, y = _arguments(node, "input", "other")
    return None if _value(x) is None or _value(y) is None else _matmul(x, y)


def _matrix_power(node: fx.Node) -> fx.Node | None:
    x, n = _arguments(node, "input", "n")
    if _value(x) is None or not isinstance(n, int) or n < 2:
        return None
    square, result = x, None
    while n:
        if n & 1:
            result = square if result is None else _matmul(result, square)
        n >>= 1
        square = _matmul(square, square) if n else square
    return result


def _chain(node: fx.Node) -> fx.Node | None:
    given: Any = node.args
    matrices = list(given[0] if isinstance(given[0], (list, tuple)) else given)
    values = [_value(matrix) for matrix in matrices]
    if len(matrices) < 2 or any(value is None for value in values):
        return None
    shapes = [tuple(value.shape) for value in values if value is not None]
    # A vector at an end is a row, or a column.
    sizes = [1 if len(shapes[0]) == 1 else shapes[0][0], *(shape[0] for shape in shapes[1:])]
    sizes.append(1 if len(shapes[-1]) == 1 else shapes[-1][1])
    return _multiplied(matrices, _best_order(sizes), 0, len(matrices) - 1)


def _multiplied(matrices: list[fx.Node], order: dict[tuple[int, int], int], i: int, j: int) -> fx.Node:
    if i == j:
        return matrices[i]
    middle = order[i, j]
    return _matmul(_multiplied(matrices, order, i, middle), _multiplied(matrices, order, middle + 1, j))


def _best_order(sizes: list[int]) -> dict[tuple[int, int], int]:
    """Return the last matrix of the left factor in the cheapest product of the matrices i to j, of sizes[i:i + 2]."""
    count = len(sizes) - 1
    cost: dict[tuple[int, int], float] = {(i, i): 0 for i in range(count)}
    order = {}
    for length in range(1, count):
        for i in range(count - length):
            j = i + length
            cost[i, j] = math.inf
            for k in range(i, j):
                total = cost[i, k] + cost[k + 1, j] + sizes[i] * sizes[k + 1] * sizes[j + 1]
                if total < cost[i, j]:
                    cost[i, j], order[i, j] = total, k
    return order


def _in_place(name: str) -> Callable[[fx.Node], fx.Node | None]:
    def expand(node: fx.Node) -> fx.Node | None:
        # A method's own tensor comes first.
        target = node.all_input_nodes[0]
        if _value(target) is None:
            return None
        product = insert_captured(node.graph, OPS[name].target, *node.args, **node.kwargs)
        return insert_captured(node.graph, "copy_", target, product)

    return expand


_EXPANSIONS: Final[dict[Any, Callable[[fx.Node], fx.Node | None]]] = {
    **dict.fromkeys((torch.einsum, torch.functional.einsum), _einsum),
    **dict.fromkeys((torch.tensordot, torch.functional.tensordot), _tensordot),
    **dict.fromkeys((torch.inner, "inner"), _inner),
    **dict.fromkeys((torch.vdot, "vdot"), _vdot),
    **dict.fromkeys((torch.matrix_power, torch.linalg.matrix_power, "matrix_power"), _matrix_power),
    **dict.fromkeys((torch.linalg.multi_dot, torch.chain_matmul, torch.functional.chain_matmul), _chain),
    **{f"{name}_": _in_place(name) for name in ("addmm", "addmv", "addbmm", "baddbmm")},
}
