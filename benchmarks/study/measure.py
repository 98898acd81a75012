"""What a quantizer does to its operand during training, measured: the true error, and how many Newton steps it took."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

import octav_fx
from octav_fx.capture.modules import QuantizedModule, graphs_of
from octav_fx.clips import newton
from octav_fx.formats.grid import Grid
from octav_fx.ir.edits import site_of
from octav_fx.ir.op import Role
from octav_fx.ir.ops import module_of, op_of
from octav_fx.nn import FakeQuantizer
from octav_fx.nn.fake_quantizer import QUANTIZERS

# Steps are counted until the clip moves by less than this share.
SETTLED: Final = 1e-3
MOST: Final = 50
_STEPS: Final[dict[str, newton.NewtonStep]] = {"octav": newton.octav_step, "octav-grid": newton.octav_grid_step}
# Ops that leave values as they are, or take some of them.
_PASSING: Final = frozenset(
    {
        "max_pool",
        "flatten",
        "reshape",
        "permute",
        "transpose",
        "squeeze",
        "unsqueeze",
        "expand",
        "contiguous",
        "dropout",
    }
    | {"getitem", "chunk", "identity"}
)


def operands(q: nn.Module, x: Tensor) -> list[dict[str, Any]]:
    """Return a row for each quantized operand on a batch, in q's mode: SQNR in dB, steps of Newton, cold and hinted.

    kind: what weights belong to ("depthwise", "1x1", "3x3", "linear") or what an activation comes after ("after relu").
    steps: of the row that took most, with Newton's plain steps; None where a method has none. Nothing in q changes.
    """
    graphs = graphs_of(q)
    assert graphs is not None
    counted: dict[nn.Module, tuple[int, int]] = {}

    def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(module, FakeQuantizer)
        step = _STEPS.get(module.settings.method)
        if step is None or module.clip is not None:
            return
        grid = module.spec.format
        assert isinstance(grid, Grid)
        rows = module.spec.granularity.rows(args[0].detach())
        cold = torch.zeros(len(rows), device=rows.device)
        counted[module] = (newton_steps(rows, cold, grid, step), newton_steps(rows, module.hint.view(-1), grid, step))

    handles = [m.register_forward_pre_hook(count) for m in q.modules() if isinstance(m, FakeQuantizer)]
    try:
        with same_hints(q):
            measured = octav_fx.rows(q, x)
    finally:
        for handle in handles:
            handle.remove()
    kind_of = kinds(graphs)
    rows = []
    for record, row in zip(graphs.records, measured, strict=True):
        if record.quantizer is None:
            continue
        cold, hinted = counted.get(q.get_submodule(record.quantizer), (None, None))
        named = {"node": row.node, "operand": row.operand, "kind": kind_of[row.node, row.operand], "bits": row.bits}
        rows.append({**named, "sqnr": row.sqnr, "cold": cold, "hinted": hinted})
    return rows


@contextmanager
def same_hints(model: nn.Module) -> Iterator[None]:
    """Let Newton start afterwards where it would have: what is read inside leaves no trace in the training."""
    hints = {module: module.hint.clone() for module in model.modules() if isinstance(module, FakeQuantizer)}
    try:
        yield
    finally:
        for quantizer, hint in hints.items():
            quantizer.hint.copy_(hint)


def newton_steps(rows: Tensor, hint: Tensor, grid: Grid, step: newton.NewtonStep) -> int:
    """Count plain Newton steps [R, N], from hint [R] or cold where it is 0, until every row's clip has settled.

    Rows that alternate between two clips around the crossing never do; they count as settled when a step leads back
    to the clip before the last. Other cycles end at MOST: newton() leaves them through its bracket.
    """
    mean = newton.mean_magnitude(rows, grid)
    clip = torch.where(hint > 0, hint, mean)
    before = torch.zeros_like(clip)
    for count in range(1, MOST + 1):
        numerator, denominator = step(rows, clip, grid)
        # As newton() does from a clip beyond every value: back to the mean.
        moved = torch.where(numerator > 0, numerator / denominator.clamp(min=1e-30), mean)
        near = (moved - clip).abs() <= SETTLED * clip
        if bool((near | ((moved - before).abs() <= SETTLED * before)).all()):
            return count
        before, clip = clip, moved
    return MOST


def kinds(q: QuantizedModule) -> dict[tuple[str, str], str]:
    """Return (node, operand) -> what kind of operand it is, for every quantized one."""
    found = {}
    for node in q.graph.nodes:
        rule = op_of(node)
        for operand in rule.operands if rule is not None else ():
            value = node.args[operand.index]
            if isinstance(value, fx.Node) and value.op == "call_module" and str(value.target).startswith(QUANTIZERS):
                source = value.args[0]
                assert isinstance(source, fx.Node)
                kind = _layer(q, node) if operand.role is Role.WEIGHT else f"after {_origin(source)}"
                found[site_of(node), operand.name] = kind
    return found


def _layer(q: QuantizedModule, node: fx.Node) -> str:
    """Return depthwise, 1x1, 3x3, linear, ..."""
    op = op_of(node)
    assert op is not None
    if op.name != "conv2d":
        return op.name
    groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
    weight = q.get_parameter(f"{site_of(node)}.weight")
    return "depthwise" if groups == weight.shape[0] else "x".join(map(str, weight.shape[2:]))


def _origin(node: fx.Node) -> str:
    """Return the op that made the values."""
    op = op_of(node)
    while op is not None and op.name in _PASSING:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node, op = source, op_of(source)
    if op is not None:
        return op.name
    if node.op == "call_module":
        return type(module_of(node)).__name__
    return "input" if node.op == "placeholder" else str(getattr(node.target, "__name__", node.target))
