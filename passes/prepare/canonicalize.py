"""Give every contraction one spelling: a function call with its operands in place.

    self.conv(x)              ->  conv2d(x, self.conv.weight, self.conv.bias, stride, padding, dilation, groups)
    self.fc(x)                ->  linear(x, self.fc.weight, self.fc.bias)
    x @ y, x.bmm(y), mm(x, y) ->  matmul(x, y)
    einsum(equation, [x, y])  ->  einsum(equation, x, y)

Each contraction also gets its site: the name by which users, overrides and tables know it.
"""

from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from octav_fx.compat.modules import has_backward_hooks, has_forward_hooks, padding_of
from octav_fx.ir.dataflow import state_name
from octav_fx.ir.edits import Edit, copy_meta, site_of, skip
from octav_fx.ir.ops import CONTRACTIONS, Op, module_of, op_of
from octav_fx.ir.rules import LEAF, OWN, RULES

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def canonicalize(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits: list[Edit] = []
    taken: set[str] = set()
    # A tied parameter has one value and several names; the first is its name, so that its readers share one node.
    names = {id(value): name for name, value in gm.named_parameters()}
    for node in list(gm.graph.nodes):
        op = op_of(node)
        if (own := node.meta.get(OWN)) is not None:
            node.meta["site"] = _unique(_in_scope(node, own.op), taken)
        if op not in CONTRACTIONS:
            continue
        node.meta["site"] = _unique(_site(node, op), taken)
        if reason := _refusal(node):
            edits.append(skip(node, reason))
        elif not _is_canonical(node, op):
            site = site_of(node)
            _rewrite(gm.graph, node, op, names)
            edits.append(Edit(site, "canonicalize", op.name))
    return edits


def _refusal(node: fx.Node) -> str | None:
    """Why a contraction keeps its spelling, or None."""
    if LEAF in node.meta:
        return "one of the leaves"
    if "out" in node.kwargs:
        return "writes into out="
    if node.op != "call_module":
        return None
    module = module_of(node)
    if has_forward_hooks(module) or has_backward_hooks(module):
        return "the module has hooks, which a function call would not run"
    if isinstance(module, _TRANSPOSED) and len(node.args) + len(node.kwargs) > 1:
        return "called with output_size"
    return None


def _is_canonical(node: fx.Node, op: Op) -> bool:
    if node.op != "call_function" or node.target is not op.target:
        return False
    rule = RULES[op.name]
    if rule.variadic:
        return not isinstance(node.args[rule.operands[0].index], (list, tuple))
    return len(node.args) > max(operand.index for operand in rule.operands)


def _rewrite(graph: fx.Graph, node: fx.Node, op: Op, names: dict[int, str]) -> None:
    args, kwargs = _of_module(node, names) if node.op == "call_module" else _of_call(node, op)
    with graph.inserting_before(node):
        new = copy_meta(node, graph.call_function(op.target, args, kwargs))
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    # The name stays: goldens, tables and a reader's eye find it where it was.
    new.name = node.name


def _of_call(node: fx.Node, op: Op) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a function or method call, with every operand moved to its position."""
    args, kwargs = list(node.args), dict(node.kwargs)
    rule = RULES[op.name]
    if rule.variadic:
        equation, *operands = args
        if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
            operands = list(operands[0])
        return (equation, *operands), kwargs
    names = [(operand.index, (operand.name, *operand.aliases)) for operand in rule.operands]
    # addmm and its kin: what is added comes before the operands.
    if names[0][0] == 1:
        names.insert(0, (0, ("input", "self")))
    for index, aliases in names:
        if len(args) <= index:
            args.append(next(kwargs.pop(alias) for alias in aliases if alias in kwargs))
    return tuple(args), kwargs


def _of_module(node: fx.Node, names: dict[int, str]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the function that a module calls, with its parameters as get_attr nodes."""
    module: Any = module_of(node)
    x: Any = node.args[0] if node.args else node.kwargs["input"]
    weight, bias = (
        None if value is None else parameter(node, names.get(id(value), f"{node.target}.{kind}"), value)
        for kind, value in (("weight", module.weight), ("bias", module.bias))
    )
    if isinstance(module, nn.Linear):
        return (x, weight, bias), {}
    if isinstance(module, _TRANSPOSED):
        rest = (module.padding, module.output_padding, module.groups, module.dilation)
        return (x, weight, bias, module.stride, *rest), {}
    padding: Any = module.padding
    if module.padding_mode != "zeros":
        with node.graph.inserting_before(node):
            pad = node.graph.call_function(F.pad, (x, padding_of(module)), {"mode": module.padding_mode})
        # The padded value differs from x, so it is what the quantizer has to see.
        pad.meta["value"] = F.pad(x.meta["value"], padding_of(module), mode=module.padding_mode)
        x, padding = pad, (0,) * len(module.kernel_size)
    return (x, weight, bias, module.stride, padding, module.dilation, module.groups), {}


def parameter(node: fx.Node, name: str, value: torch.Tensor) -> fx.Node:
    """The get_attr node of a parameter for a reader: the one that is there, or a new one just before the reader."""
    graph = node.graph
    for existing in graph.find_nodes(op="get_attr", target=name):
        if existing > node:
            node.prepend(existing)
        return existing
    with graph.inserting_before(node):
        new = graph.get_attr(name)
    new.meta["value"] = value.detach()
    return new


def _site(node: fx.Node, op: Op) -> str:
    """The path of the module, or of the parameter's owner, else of the enclosing module with the op's name."""
    if node.op == "call_module":
        return str(node.target)
    if op.name == "linear" or op.name.startswith("conv"):
        weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
        name = state_name(weight) if isinstance(weight, fx.Node) else None
        if name is not None and name.endswith(".weight"):
            return name.removesuffix(".weight")
    return _in_scope(node, op.name)


def _in_scope(node: fx.Node, name: str) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    scope = next(reversed(stack.values()))[0] if stack else ""
    return f"{scope}.{name}".lstrip(".")


def _unique(site: str, taken: set[str]) -> str:
    """The site, with :1, :2, ... for further calls of the same module."""
    name, count = site, 0
    while name in taken:
        count += 1
        name = f"{site}:{count}"
    taken.add(name)
    return name
