"""Running passes in order."""

import functools
from collections.abc import Callable, Iterable

from torch import fx

from octav_fx.ir.edits import Edit

Pass = Callable[[fx.GraphModule], list[Edit]]


def name_of(graph_pass: Pass) -> str:
    """The name of a pass; with options bound it is a functools.partial, which has none of its own."""
    function = graph_pass.func if isinstance(graph_pass, functools.partial) else graph_pass
    return str(getattr(function, "__name__", function))


def run(gm: fx.GraphModule, passes: Iterable[Pass]) -> list[Edit]:
    """Run the passes, check the graph after each, and return every edit. An error says which pass, after which."""
    edits: list[Edit] = []
    done: list[str] = []
    for graph_pass in passes:
        name = name_of(graph_pass)
        try:
            made = graph_pass(gm)
            gm.graph.lint()
        except Exception as error:
            error.add_note(f"in pass {name}, after {', '.join(done) or 'none'}")
            raise
        if any(not edit.declined for edit in made):
            gm.recompile()
        edits += made
        done.append(name)
    return edits
