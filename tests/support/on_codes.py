"""A small model on codes, as the passes of convert leave it before they look at functions of codes."""

import torch
from torch import nn

from octav_fx import Config, calibrate, freeze, quantize
from octav_fx.deploy.convert import rewritten
from octav_fx.passes import CONVERT, combine_codes, integer_layers
from tests.support.graphs import model
from tests.support.passes import made

X = torch.randn(2, 3, 5, 5)


def on_codes(forward, bits: int = 8, residual_bits: int | None = 8, **parts: nn.Module):
    """A model whose forward is given, with 1x1 convolutions a and b from 3 to 3 channels, and other parts."""
    torch.manual_seed(0)
    parts = {"a": nn.Conv2d(3, 3, 1), "b": nn.Conv2d(3, 3, 1), **parts}
    q = quantize(model(forward, **parts).eval(), X, Config(bits, bits, edge_bits=None, residual_bits=residual_bits))
    c = rewritten(freeze(calibrate(q, [X])), CONVERT)
    for graph_pass in (combine_codes, integer_layers):
        made(c, graph_pass)
    return c
