"""Running one pass the way the pipeline does."""

from collections.abc import Callable

from torch import fx

from octav_fx.ir.edits import Edit
from octav_fx.ir.pipeline import run


def made(gm: fx.GraphModule, graph_pass: Callable[[fx.GraphModule], list[Edit]]) -> list[Edit]:
    """The edits of one run that changed the graph."""
    return [edit for edit in run(gm, [graph_pass]) if not edit.declined]


def declined(
    gm: fx.GraphModule, graph_pass: Callable[[fx.GraphModule], list[Edit]]
) -> list[tuple[str, str | None, str]]:
    """(node, operand, reason) of what one run declined to do."""
    return [(edit.node, edit.operand, edit.detail) for edit in run(gm, [graph_pass]) if edit.declined]
