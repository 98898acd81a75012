"""recode: a narrower quantizer on the levels of a wider one."""

import torch
from torch import nn
from torch.nn import functional as F

from octav_fx import Config, calibrate, freeze, quantize
from octav_fx.deploy.convert import rewritten
from octav_fx.ir.printer import graph_text
from octav_fx.passes import CONVERT, combine_codes, integer_layers, recode
from tests.support.graphs import model
from tests.support.passes import made


def test_a_layer_of_four_bits_reads_a_residual_of_eight():
    x = torch.randn(2, 3, 5, 5)
    parts = {"a": nn.Conv2d(3, 3, 1), "b": nn.Conv2d(3, 3, 1)}
    net = model(lambda self, x: self.b(y := F.relu(self.a(x) + x)) + y, **parts).eval()
    q = quantize(net, x, Config(4, 4, edge_bits=None, residual_bits=8))
    c = rewritten(freeze(calibrate(q, [x])), CONVERT)
    for graph_pass in (combine_codes, integer_layers):
        made(c, graph_pass)
    expected = c(x)
    assert len(made(c, recode)) == 2
    text = graph_text(c.graph)
    assert (
        "recode_1 = recode(code_sum, quantizers_add_1_y_scale, quantizers_b_input_scale, 8, False, 4, False)\n" in text
    )
    assert text.count("= integer_codes(") == 2
    assert torch.equal(c(x), expected)
    assert made(c, recode) == []
