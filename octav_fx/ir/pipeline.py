"""Running passes in order.

In the environment, for whoever works on a pass: OCTAV_FX_VERIFY=1 checks graph and invariants after each (verify.py),
and OCTAV_FX_DUMP=folder writes the graph before and after each (dump.py).
"""

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

from torch import fx

from octav_fx.ir import dump, verify
from octav_fx.ir.edits import Edit

Pass = Callable[[fx.GraphModule], list[Edit]]


def name_of(graph_pass: Pass) -> str:
    """Return the name of a pass; with options bound it is a functools.partial, which has none of its own."""
    function = graph_pass.func if isinstance(graph_pass, functools.partial) else graph_pass
    return str(getattr(function, "__name__", function))


def run(gm: fx.GraphModule, passes: Iterable[Pass]) -> list[Edit]:
    """Run the passes, check the graph, and return every edit. An error says which pass, after which.

    The graph is checked after each pass where OCTAV_FX_VERIFY=1, and else after the last.
    """
    edits: list[Edit] = []
    done: list[str] = []
    files, verifies = dump.requested(), verify.is_wanted()
    for graph_pass in passes:
        name = name_of(graph_pass)
        try:
            step: AbstractContextManager[list[Edit]] = files.of(name, gm.graph) if files else nullcontext([])
            with step as made:
                made += graph_pass(gm)
            if verifies:
                gm.graph.lint()
                verify.verify(gm, [*edits, *made], [*done, name])
        except Exception as error:
            error.add_note(f"in pass {name}, after {', '.join(done) or 'none'}")
            raise
        edits += made
        done.append(name)
    if not verifies:
        gm.graph.lint()
    if any(not edit.declined for edit in edits):
        gm.recompile()
    return edits
