"""functions_of_codes: what is computed of one code, from a table of all of them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from octav_fx.ir.printer import graph_text
from octav_fx.passes import functions_of_codes, moves_on_codes
from tests.support.on_codes import X, on_codes
from tests.support.passes import made

pytestmark = pytest.mark.usefixtures("as_with_vnni")


def test_a_function_between_two_layers():
    c = on_codes(lambda self, x: self.b(F.silu(self.a(x))))
    expected = c(X)
    assert [edit.node for edit in made(c, functions_of_codes)] == ["quantizers.b_input"]
    text = graph_text(c.graph)
    assert "integer_codes_2 = integer_codes(integer_conv, quantizers_silu_x_scale, 8, True)\n" in text
    assert (
        """\
quantizers_b_input_table = self.quantizers.b_input.table
lookup = lookup(integer_codes_2, quantizers_b_input_table)
"""
        in text
    )
    assert "silu(" not in text
    assert torch.equal(c(X), expected)
    assert made(c, functions_of_codes) == []


def test_a_layer_of_four_bits_reads_a_residual_of_eight():
    c = on_codes(lambda self, x: self.b(y := F.relu(self.a(x) + x)) + y, bits=4)
    expected = c(X)
    assert len(made(c, functions_of_codes)) == 2
    text = graph_text(c.graph)
    assert "lookup_1 = lookup(code_sum, quantizers_b_input_table)\n" in text
    assert text.count("= integer_codes(") == 2
    assert torch.equal(c(X), expected)
    assert made(c, functions_of_codes) == []


def test_codes_that_stay_what_they_are_need_no_table():
    c = on_codes(lambda self, x: self.b(y := F.relu(self.a(x))) + self.b(F.max_pool2d(y, 1)), bits=4)
    made(c, moves_on_codes)
    expected = c(X)
    assert [(edit.verb, edit.detail) for edit in made(c, functions_of_codes)] == [
        ("remove", "returns the codes that it reads")
    ]
    text = graph_text(c.graph)
    assert "table" not in text
    assert "= integer_conv(max_pool, " in text
    assert torch.equal(c(X), expected)
    assert made(c, functions_of_codes) == []


FUNCTIONS = {
    "hardswish, in place": lambda s, x: s.b(s.f(s.a(x))),
    "swish by hand": lambda s, x: s.b((y := s.a(x)) * torch.sigmoid(y)),
    "hardswish by hand": lambda s, x: s.b((y := s.a(x)) * F.relu6(y + 3) / 6),
    "a clamp behind": lambda s, x: s.b(F.relu6(F.gelu(s.a(x), approximate="tanh"))),
    "read by floats, too": lambda s, x: (s.b(y := F.elu(s.a(x), 0.5)), y),
    "a method": lambda s, x: s.b(s.a(x).tanh()),
}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("forward", FUNCTIONS.values(), ids=list(FUNCTIONS))
def test_the_codes_stay_what_they_were(forward, bits):
    c = on_codes(forward, bits, f=nn.Hardswish(inplace=True))
    expected = c(X)
    (edit,) = made(c, functions_of_codes)
    assert edit.node == "quantizers.b_input" and "lookup = lookup(" in graph_text(c.graph)
    torch.testing.assert_close(c(X), expected, rtol=0, atol=0)


OTHERS = {
    "of floats": (lambda s, x: s.b(F.silu(s.a(x))), None),
    "of two values": (lambda s, x: s.b(s.a(x) * torch.sigmoid(x)), 8),
    "written into on the way": (lambda s, x: s.b((y := F.silu(s.a(x)), y.mul_(1.5))[0]), 8),
    "written into by a view": (lambda s, x: s.b((y := F.silu(s.a(x)), y[:, :1].zero_())[0]), 8),
    "written in place, seen by a view": (lambda s, x: ((y := s.a(x))[:, :2], s.b(F.silu(y, inplace=True))), 8),
    "of an element and its place": (lambda s, x: s.b(torch.cumsum(F.silu(s.a(x)), 1)), 8),
}


@pytest.mark.parametrize(("forward", "residual_bits"), OTHERS.values(), ids=list(OTHERS))
def test_what_is_no_function_of_a_code(forward, residual_bits):
    assert made(on_codes(forward, residual_bits=residual_bits), functions_of_codes) == []


def test_a_quantizer_called_twice_has_a_table_for_each_value():
    c = on_codes(lambda self, x: self.b(F.silu(self.a(x))) + self.b(F.gelu(self.a(x))))
    expected = c(X)
    found = made(c, functions_of_codes)
    assert torch.equal(c(X), expected)
    assert len(found) == 2 and len({line for line in graph_text(c.graph).splitlines() if ".table" in line}) == 2
