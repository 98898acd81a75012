"""codes_between_layers: what one layer returns is what the next one reads."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from octav_fx.deploy.convert import rewritten
from octav_fx.ir.printer import graph_text
from octav_fx.passes import CONVERT, codes_between_layers, integer_layers
from tests.support.deployable import frozen
from tests.support.graphs import model
from tests.support.passes import made


def layers(between, x: torch.Tensor, second: nn.Module | None = None):
    second = nn.Conv2d(4, 2, 1) if second is None else second
    parts = {"a": nn.Conv2d(3, 4, 3), "b": second}
    c = rewritten(frozen(model(lambda self, x: self.b(between(self.a(x))), **parts), x), CONVERT)
    made(c, integer_layers)
    return c


def test_codes_pass_from_layer_to_layer():
    x = torch.randn(2, 3, 9, 9)
    c = layers(nn.MaxPool2d(3, 2, 1), x)
    expected = c(x)
    assert len(made(c, codes_between_layers)) == 1
    text = graph_text(c.graph)
    assert "integer_codes_1" not in text
    assert (
        """\
quantizers_b_input_scale_1 = self.quantizers.b_input.scale
integer_conv = integer_conv(integer_codes, quantizers_a_input_scale, 4, True, quantizers_a_weight_codes, \
quantizers_a_weight_scale, (4, 3, 3, 3), quantizers_a_bias_codes, [1, 1], [0, 0], [1, 1], 1, fraction=4, \
step=quantizers_b_input_scale_1, bits=4, signed=True)
max_pool = max_pool(integer_conv, [3, 3], [2, 2], [1, 1], [1, 1], False)
"""
        in text
    )
    # A value within 2e-7 of a tie would fall to its other side: not among these.
    assert torch.equal(c(x), expected)
    assert made(c, codes_between_layers) == []


@pytest.mark.parametrize(
    "between",
    [
        lambda y: y,
        lambda y: F.max_pool2d(y, 2),
        lambda y: F.max_pool2d(y, (3, 2), stride=(1, 2), padding=(1, 0), ceil_mode=True),
        lambda y: y.transpose(2, 3),
        lambda y: y.flatten(2).unsqueeze(-1),
        lambda y: y.relu().view(y.size(0), 4, -1, 1),
        lambda y: F.max_pool2d(y.permute(0, 1, 3, 2), 3, dilation=2),
        lambda y: F.pad(y, (0, 1, 2, 0)),
        lambda y: F.pad(F.max_pool2d(y, 2), (-1, y.shape[2] - 6)),
    ],
)
def test_what_moves_or_selects_elements_moves_codes(between):
    x = torch.randn(2, 3, 9, 9)
    c = layers(between, x)
    expected = c(x)
    assert len(made(c, codes_between_layers)) == 1
    assert torch.equal(c(x), expected)


@pytest.mark.parametrize(
    "between",
    [
        lambda y: F.gelu(y),
        lambda y: F.avg_pool2d(y, 2),
        lambda y: y + y.mean(),
        lambda y: F.max_pool2d(y, 2, return_indices=True)[0],
    ],
)
def test_what_computes_stays_float(between):
    assert made(layers(between, torch.randn(2, 3, 9, 9)), codes_between_layers) == []
