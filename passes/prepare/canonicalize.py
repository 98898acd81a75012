"""Give every contraction one spelling: a function call with its operands in place.

    self.conv(x)              ->  conv2d(x, self.conv.weight, self.conv.bias, stride, padding, dilation, groups)
    self.fc(x)                ->  linear(x, self.fc.weight, self.fc.bias)
    x @ y, x.bmm(y), mm(x, y) ->  matmul(x, y)
    einsum(equation, [x, y])  ->  einsum(equation, x, y)

Each contraction also gets its site: the name by which users, overrides and tables know it.
"""

import functools
import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized

from octav_fx.capture.hooks import after_call, before_call, effective_weight
from octav_fx.compat.modules import (
    forward_hooks_of,
    forward_pre_hooks_of,
    parametrization_of,
    weight_hooks_of,
)
from octav_fx.ir.arguments import argument, spread_operands
from octav_fx.ir.dataflow import state_name
from octav_fx.ir.edits import Edit, insert_captured, site_of
from octav_fx.ir.macs import MacCounter
from octav_fx.ir.meta import copy_meta, fake, info, set_fake, update
from octav_fx.ir.op import Op, Role
from octav_fx.ir.ops import module_of, op_of
from octav_fx.ir.sites import in_scope, numbered


def canonicalize(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits: list[Edit] = []
    taken: set[str] = set()
    # A tied parameter has one value and several names; the first is its name, so that its readers share one node.
    names = {id(value): name for name, value in gm.named_parameters()}
    for node in list(gm.graph.nodes):
        op = op_of(node)
        if op is None or not op.operands:
            if node.op == "call_module" and info(node).macs:
                # A name for each call, so that tables count each.
                update(node, site=_unique(str(node.target), taken))
            continue
        update(node, site=_unique(_site(node, op), taken))
        if reason := _refusal(node, op):
            edits.append(Edit.unsupported(node, reason))
        elif not _is_canonical(node, op):
            site = site_of(node)
            _rewrite(gm.graph, node, op, names)
            edits.append(Edit(site, "canonicalize", op.name))
    return edits


def _refusal(node: fx.Node, op: Op) -> str | None:
    """Return why a contraction keeps its spelling, or None."""
    if info(node).is_leaf:
        return "one of the leaves"
    if "out" in node.kwargs and info(node).op is None:
        return "writes into out="
    if node.op != "call_module":
        return None
    if op.call_of is None:
        return f"the row of {op.name!r} has no call_of to say with what its module calls it"
    if further := list(_given(node))[len(_inputs_of(op.call_of)) :]:
        return f"called with {', '.join(further)}"
    return None


def _is_canonical(node: fx.Node, op: Op) -> bool:
    if node.op != "call_function" or node.target is not op.target:
        return False
    if op.variadic:
        return node.args == spread_operands(node)
    return len(node.args) > max(operand.index for operand in op.operands)


def _rewrite(graph: fx.Graph, node: fx.Node, op: Op, names: dict[int, str]) -> None:
    assert op.target is not None
    with graph.inserting_before(node):
        args, kwargs = (_of_module(node, op, names), {}) if node.op == "call_module" else _of_call(node, op)
        new = copy_meta(node, graph.call_function(op.target, args, kwargs))
        result = new
        if node.op == "call_module":
            if _computes_more(module_of(node)):
                _count_alone(new)
            if forward_hooks_of(module_of(node)):
                result = insert_captured(graph, after_call, _itself(node), new, *args[: len(_given(node))])
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    # The name stays: goldens, tables and a reader's eye find it where it was.
    new.name = node.name


def _of_call(node: fx.Node, op: Op) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a function or method call, with every operand moved to its position."""
    if op.variadic:
        return spread_operands(node), dict(node.kwargs)
    last = max(operand.index for operand in op.operands)
    moved = list(op.parameters)[len(node.args) : last + 1]
    kwargs = {word: value for word, value in node.kwargs.items() if op.keywords.get(word) not in moved}
    return (*node.args, *(argument(node, name) for name in moved)), kwargs


def _of_module(node: fx.Node, op: Op, names: dict[int, str]) -> tuple[Any, ...]:
    """Return the arguments of the function that a module calls, with its parameters as get_attr nodes."""
    assert op.call_of is not None
    inputs = list(_given(node).values())
    if forward_pre_hooks_of(module_of(node)):
        left = insert_captured(node.graph, before_call, _itself(node), *inputs)
        inputs = [insert_captured(node.graph, operator.getitem, left, i) for i in range(len(inputs))]
    return op.call_of(_StateReads(node, names), functools.partial(insert_captured, node.graph), *inputs)


@dataclass(frozen=True, slots=True)
class _StateReads:
    """A module as call_of of a row sees it: a tensor is the node that reads it, any other attribute is itself."""

    _call: fx.Node
    # Of parameters, by identity.
    _names: dict[int, str]

    def __getattr__(self, name: str) -> Any:
        module, graph = module_of(self._call), self._call.graph
        if name in weight_hooks_of(module):
            return insert_captured(graph, effective_weight, _itself(self._call), name)
        if (computed := parametrization_of(module, name)) is not None and isinstance(fake(self._call), Tensor):
            return _computed(self._call, f"{self._call.target}.parametrizations.{name}", computed)
        value = getattr(module, name)
        if not isinstance(value, Tensor):
            return value
        return parameter(self._call, self._names.get(id(value), f"{self._call.target}.{name}"), value)


def _itself(call: fx.Node) -> fx.Node:
    """Return the node of the module that a node calls."""
    module = call.graph.get_attr(str(call.target))
    set_fake(module, module_of(call))
    return module


def _computed(call: fx.Node, path: str, parametrization: nn.Module) -> fx.Node:
    """Return the call of what computes a parameter of a module; the work is its own."""
    new = call.graph.call_module(path)
    mode = fake(call).fake_mode
    with mode, torch.no_grad(), MacCounter() as counter:
        state = {name: mode.from_tensor(p) for name, p in parametrization.state_dict(keep_vars=True).items()}
        set_fake(new, torch.func.functional_call(parametrization, state, ()))
    update(new, macs=counter.macs, site=path if counter.macs else None)
    return new


def _computes_more(layer: nn.Module) -> bool:
    """Tell whether a call of a layer computes more than its product: a weight, or what hooks do."""
    hooks = (*forward_pre_hooks_of(layer), *forward_hooks_of(layer), *weight_hooks_of(layer))
    return bool(hooks) or is_parametrized(layer)


def _count_alone(product: fx.Node) -> None:
    """Count the work of a product without that of computing its weight, which a call of the module had in it."""
    if not isinstance(fake(product), Tensor):
        # It comes after what depends on data.
        return
    args, kwargs = fx.node.map_arg((product.args, product.kwargs), fake)
    with fake(product).fake_mode, torch.no_grad(), MacCounter() as counter:
        product.target(*args, **kwargs)  # type: ignore[operator]
    update(product, macs=counter.macs)


def _given(node: fx.Node) -> dict[str, Any]:
    """Return what a module is called with, by the names of its forward."""
    return dict(inspect.signature(module_of(node).forward).bind(*node.args, **node.kwargs).arguments)


def _inputs_of(call_of: Callable[..., Any]) -> list[str]:
    _module, _make_call, *inputs = inspect.signature(call_of).parameters
    return inputs


def parameter(node: fx.Node, name: str, value: Tensor) -> fx.Node:
    """Return the get_attr node of a parameter for a reader: the one that is there, or a new one just before."""
    graph = node.graph
    for existing in graph.find_nodes(op="get_attr", target=name):
        if existing > node:
            node.prepend(existing)
        return existing
    with graph.inserting_before(node):
        # get_attr() would warn of a parametrized weight, which is a property.
        new = graph.create_node("get_attr", name)
    set_fake(new, value.detach())
    return new


def _site(node: fx.Node, op: Op) -> str:
    """Return the path of the module, or of the weight's owner, else of the enclosing module with the op's name."""
    if node.op == "call_module":
        return str(node.target)
    weight = next((operand.name for operand in op.operands if operand.role is Role.WEIGHT), None)
    if weight is not None and info(node).op is None:
        read = argument(node, weight)
        name = state_name(read) if isinstance(read, fx.Node) else None
        if name is not None and name.endswith(f".{weight}"):
            return name.removesuffix(f".{weight}")
    return in_scope(node, op.name)


def _unique(site: str, taken: set[str]) -> str:
    """Return the site, with :1, :2, ... for further calls of the same module."""
    name = numbered(site, taken)
    taken.add(name)
    return name
