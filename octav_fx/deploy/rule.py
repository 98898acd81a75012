"""What a frozen model computes: integers by their definition, as convert(q, integers=False) has them."""

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn

from octav_fx.capture.frozen import fix_numbers, uses_of
from octav_fx.capture.guards import Guards
from octav_fx.capture.integer_module import IntegerModule
from octav_fx.capture.modules import QuantizedModule, graphs_of
from octav_fx.ir.pipeline import Pass, run
from octav_fx.ir.records import graph_info, update_graph_info
from octav_fx.passes import COMPUTE, CONVERT


def integer_module(working: Any, passes: Iterable[Pass], guards: Guards | None = None) -> IntegerModule:
    """Return what the passes make of the eval graph of a copy of a frozen module, which is used up."""
    # What is deployed holds for the numbers on its modules as they are.
    fix_numbers(working.graph, working.owner)
    run(working, passes)
    made = IntegerModule(working, working.graph, working.user_class.__name__, {}, working.plain_attributes, guards)
    known = graph_info(working)
    update_graph_info(made, path=known.path, is_op=known.is_op, records={False: known.records[False]})
    return made


def led_by(copied: nn.Module, index: int) -> Any:
    """Return the graphs of a copy of a module, which are used up, with one of eval mode as the first."""
    working = graphs_of(copied)
    assert working is not None
    graphs = working.graphs_of(False)
    graphs.insert(0, graphs.pop(index))
    working.follow(False)
    return working


def rule_of(module: QuantizedModule, index: int) -> IntegerModule:
    """Return what a graph of eval mode of a frozen module computes, on the definition of its integers.

    What stays float in it are the parameters, buffers and other tensors of the module themselves. Raises OctavError for
    a weight with inf or NaN in it.
    """
    uses = uses_of(module.graphs_of(False)[index].graph)
    plain = [tensor for tensors in uses.plain(module).values() for tensor in tensors]
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers(), *plain)}
    return integer_module(led_by(copy.deepcopy(module.owner, shared), index), (*CONVERT, *COMPUTE))


QuantizedModule.make_rule = rule_of
