"""Update the state of all quantizers at once, at the end of forward, on a GPU: three launches and not three for each.

    copy_(h1, c1)                                  c     = _foreach_mul([c1, c2, ..], 1)      a copy: nothing is rounded
    copy_(m1, m1 + 0.1 * (c1 - m1))                d     = _foreach_sub([c1, c2, ..], [m1, m2, ..])
    copy_(t1, t1 + 1)                          ->  m     = _foreach_add([m1, m2, ..], d, alpha=0.1)
    copy_(h2, c2)                                  t     = _foreach_add([t1, t2, ..], 1)
    ...                                            copy_(h1, c[0]); copy_(m1, m[0]); copy_(t1, t[0]); copy_(h2, c[1])

on the half of the graph that AOTAutograd writes them in: hints h, running means m and their steps t are inputs of it,
scalars or one number for each channel, and c the clips of the call. Inductor writes each list by one kernel. The values
are those of before.
"""

import operator
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import fx

from octav_fx.ir.calls import arguments_of
from octav_fx.ir.edits import Edit, insert_aten
from octav_fx.ir.meta import fake

octav, aten = torch.ops.octav, torch.ops.aten

# What one launch writes: Inductor gives a kernel so many arguments at most.
_AT_ONCE: Final = 64


def update_at_once(gm: fx.GraphModule, device: str = "cuda") -> list[Edit]:
    """See the module's docstring. Inputs on other devices are not looked at."""
    writes = gm.graph.find_nodes(op="call_function", target=aten.copy_.default)
    ours = [write for write in writes if _is_state(_target(write), device)]
    groups: dict[tuple[Callable[..., Any], Any], list[fx.Node]] = {}
    for write in ours:
        for is_one, update in _UPDATES:
            detail = is_one(_target(write), _source(write))
            if detail is not None:
                groups.setdefault((update, detail), []).append(write)
                break
    edits = []
    for (update, detail), found in groups.items():
        for first in range(0, len(found), _AT_ONCE):
            part = found[first : first + _AT_ONCE]
            if len(part) > 1:
                edits.append(_gather(gm.graph, part, update, detail))
    gm.graph.eliminate_dead_code()
    return edits


def _target(write: fx.Node) -> fx.Node:
    return arguments_of(write)["self"]


def _source(write: fx.Node) -> fx.Node:
    return arguments_of(write).src


def _is_state(node: fx.Node, device: str) -> bool:
    value = fake(node)
    fits = value.dtype is torch.float32 and value.device.type == device and value.dim() <= 1
    return node.op == "placeholder" and fits


def _is_clip(node: fx.Node) -> bool:
    """Tell whether a node is a clip of ours: solved, or cut out of those of all weights."""
    if node.target is aten.slice.Tensor:
        parts = arguments_of(node)["self"]
        sources = [source.target for source in parts.all_input_nodes]
        return parts.target is operator.getitem and sources == [octav.fake_quantize_weights.default]
    return node.target in (octav.optimal_clip.default, octav.synced_clip.default)


def _is_hint(state: fx.Node, source: fx.Node) -> float | None:
    return 1.0 if _is_clip(source) else None


def _is_count(state: fx.Node, source: fx.Node) -> float | None:
    if source.target is not aten.add.Tensor or fake(state).dim():
        return None
    call = arguments_of(source)
    return 1.0 if call["self"] is state and call.other == 1 else None


def _is_mean(state: fx.Node, source: fx.Node) -> float | None:
    """Return the share of the clip in the new mean, if it is one."""
    if source.target is not aten.add.Tensor:
        return None
    call = arguments_of(source)
    moved = call.other
    if call["self"] is not state or not isinstance(moved, fx.Node) or moved.target is not aten.sub.Tensor:
        return None
    difference = arguments_of(moved)
    is_one = _is_clip(difference["self"]) and difference.other is state and difference.alpha == 1
    return float(call.alpha) if is_one else None


def _hints(graph: fx.Graph, writes: list[fx.Node], one: float) -> fx.Node:
    return insert_aten(graph, aten._foreach_mul.Scalar, [_source(write) for write in writes], one)


def _counts(graph: fx.Graph, writes: list[fx.Node], one: float) -> fx.Node:
    return insert_aten(graph, aten._foreach_add.Scalar, [_target(write) for write in writes], one)


def _means(graph: fx.Graph, writes: list[fx.Node], share: float) -> fx.Node:
    means = [_target(write) for write in writes]
    clips = [arguments_of(arguments_of(_source(write)).other)["self"] for write in writes]
    moved = insert_aten(graph, aten._foreach_sub.List, clips, means)
    parts = [insert_aten(graph, operator.getitem, moved, i) for i in range(len(means))]
    return insert_aten(graph, aten._foreach_add.List, means, parts, alpha=share)


_UPDATES: Final = ((_is_hint, _hints), (_is_count, _counts), (_is_mean, _means))


def _gather(graph: fx.Graph, writes: list[fx.Node], update: Callable[..., fx.Node], detail: float) -> Edit:
    with graph.inserting_before(_first(graph, writes)):
        results = update(graph, writes, detail)
        for i, write in enumerate(writes):
            write.replace_input_with(_source(write), insert_aten(graph, operator.getitem, results, i))
    return Edit(str(_target(writes[0])), "update at once", f"{len(writes)} {update.__name__.strip('_')}")


def _first(graph: fx.Graph, writes: list[fx.Node]) -> fx.Node:
    return next(node for node in graph.nodes if node in writes)
