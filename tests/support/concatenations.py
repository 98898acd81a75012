"""Frozen nets of two convolutions, what joins their results, and a third convolution that reads it."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from octav_fx import Config, calibrate, freeze, quantize
from octav_fx.deploy.convert import rewritten
from octav_fx.ir.pipeline import Pass
from tests.support.graphs import model

X = torch.randn(2, 3, 6, 6)


def joined(join: Callable[..., Tensor], passes: Iterable[Pass], residual_bits: int | None = None) -> nn.Module:
    """What passes make of a net; join: of both results and X."""
    parts = {"a": nn.Conv2d(3, 4, 1), "b": nn.Conv2d(3, 4, 3, padding=1), "c": nn.LazyConv2d(2, 1)}
    net = model(lambda self, x: self.c(join(self.a(x), self.b(x), x)), **parts)
    net(X)
    q = quantize(net.eval(), X, Config(edge_bits=None, residual_bits=residual_bits))
    return rewritten(freeze(calibrate(q, [X])), passes)
