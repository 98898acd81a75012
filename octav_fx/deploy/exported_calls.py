"""The calls that the blocks of a model get while it is exported, where Python around them knows that it is.

Models of transformers, for one, leave out a mask of nothing but ones, which is a branch on data, and pass it on where
they are exported. What is exported holds for calls of one kind, so a copy of the model runs once as the exporter would
run it, and its blocks are captured anew where their graphs do not hold.
"""

import copy
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from octav_fx.capture.inputs import as_inputs
from octav_fx.capture.modules import quantized_modules
from octav_fx.capture.rerun import run_once
from octav_fx.compat.graphs import set_exporting
from octav_fx.deploy.freeze import note_frozen


def led_by_exported_calls(q: nn.Module, example_inputs: Any) -> nn.Module:
    """Return a copy of a frozen model whose blocks are led by the graphs of the calls that an export makes of them.

    Raises what forward raises.
    """
    led = copy.deepcopy(q).eval()
    args, kwargs = as_inputs(example_inputs)
    modules = quantized_modules(led)
    outer: list[bool] = []

    def enter(*_: Any) -> None:
        outer.append(set_exporting(False))

    def leave(*_: Any) -> None:
        set_exporting(outer.pop())

    with ExitStack() as stack:
        # A block itself runs, and is captured, as ever.
        for module in modules:
            stack.callback(module.owner.register_forward_pre_hook(enter).remove)
            stack.callback(module.owner.register_forward_hook(leave, always_call=True).remove)
            stack.enter_context(module.led_by_used())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(set_exporting, set_exporting(True))
        run_once(led, args, kwargs)
    for module in modules:
        note_frozen(module)
    return led
