"""What a frozen model computes: integers by their definition, as convert(q, integers=False) has them."""

import copy
from collections.abc import Iterable
from typing import Any

from octav_fx.capture.guards import Guards
from octav_fx.capture.integer_module import IntegerModule
from octav_fx.capture.modules import QuantizedModule, graphs_of
from octav_fx.ir.pipeline import Pass, run
from octav_fx.ir.records import update_graph_info
from octav_fx.passes import COMPUTE, CONVERT


def integer_module(working: Any, passes: Iterable[Pass], guards: Guards | None = None) -> IntegerModule:
    """Return what the passes make of the eval graph of a copy of a frozen module, which is used up."""
    run(working, passes)
    made = IntegerModule(working, working.graph, working.user_class.__name__, {}, working.plain_attributes, guards)
    update_graph_info(made, records={False: working.all_records[False]})
    return made


def rule_of(module: QuantizedModule) -> IntegerModule:
    """Return the eval forward of a frozen module, on the definition of its integers.

    What stays float in it are the parameters and buffers of the module themselves. Raises OctavError for a weight with
    inf or NaN in it.
    """
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return integer_module(graphs_of(copy.deepcopy(module.owner, shared)), (*CONVERT, *COMPUTE))


QuantizedModule.make_rule = rule_of
