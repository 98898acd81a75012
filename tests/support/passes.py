"""Running one pass the way the pipeline does, and quantizing at four bits by hand."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from octav_fx.capture.modules import QuantizedModule
from octav_fx.formats.spec import integers
from octav_fx.ir.edits import Edit
from octav_fx.ir.pipeline import run
from octav_fx.nn import Settings
from octav_fx.passes import Place, canonicalize, quantize_operands
from tests.support.graphs import captured
from tests.support.settings import settings_of


def made(gm: fx.GraphModule, graph_pass: Callable[[fx.GraphModule], list[Edit]]) -> list[Edit]:
    """The edits of one run that changed the graph."""
    return [edit for edit in run(gm, [graph_pass]) if not edit.declined]


def declined(
    gm: fx.GraphModule, graph_pass: Callable[[fx.GraphModule], list[Edit]]
) -> list[tuple[str, str | None, str]]:
    """(node, operand, reason) of what one run declined to do."""
    return [(edit.node, edit.operand, edit.detail) for edit in run(gm, [graph_pass]) if edit.declined]


def four_bits(place: Place) -> Settings:
    """What quantize_operands may choose for any place."""
    return settings_of(4, place.signed, place.dim, "octav", "pwl")


def canonical(float_module: nn.Module, **arguments: Any) -> QuantizedModule:
    """The graph of a module, each contraction a call with its operands in place."""
    gm = captured(float_module, **arguments)
    made(gm, canonicalize)
    return gm


def quantize_with(choose: Callable[[Place], Settings | str]) -> Callable[[Any], list[Edit]]:
    """The pass with this choice."""
    return functools.partial(quantize_operands, choose=choose)


def on_grid(x: Tensor, signed: bool, dim: int | None) -> Tensor:
    """The values that a quantizer chosen by four_bits returns."""
    hint = x.new_zeros(() if dim is None else (x.shape[dim],))
    return torch.ops.octav.dynamic_fake_quantize(x, hint, integers(4, signed, dim), "octav", "pwl")[0]
