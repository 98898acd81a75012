"""Frozen graphs of small models, ready for the passes of convert."""

import torch
from torch import Tensor, nn

from octav_fx import Config, calibrate, freeze, quantize
from octav_fx.capture.modules import QuantizedModule

FOUR = Config(edge_bits=None)


def frozen(model: nn.Module, x: Tensor) -> QuantizedModule:
    q = quantize(model.eval(), x, FOUR)
    freeze(calibrate(q, [x]))
    return q


def trained(norm: nn.Module) -> nn.Module:
    """Statistics and factors of a batch norm as after training: of both signs, one of them zero."""
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.2, 3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.weight.data[0], norm.weight.data[1] = -1.5, 0.0
    return norm


@torch.no_grad()
def same(first: QuantizedModule, second: QuantizedModule, x: Tensor) -> bool:
    """Whether two graphs compute the same levels, rewritten or not."""
    return torch.equal(first.simulated_forward(x), second.simulated_forward(x))
