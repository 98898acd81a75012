"""tables_into_layers: layers that look up the codes they multiply."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from octav_fx.deploy.codes import codes_of_quantizers
from octav_fx.ir.printer import graph_text
from octav_fx.passes import codes_between_layers, functions_of_codes, tables_into_layers
from tests.support.on_codes import X, on_codes
from tests.support.passes import made

pytestmark = pytest.mark.usefixtures("as_with_vnni")


def looking_up(forward, **parts: nn.Module):
    c = on_codes(forward, **parts)
    for graph_pass in (functions_of_codes, codes_between_layers):
        made(c, graph_pass)
    return c


def test_a_convolution_behind_a_function():
    c = looking_up(lambda self, x: self.b(F.silu(self.a(x))))
    expected, codes = c(X), codes_of_quantizers(c, (X,), {})
    assert [edit.node for edit in made(c, tables_into_layers)] == ["integer_conv_1"]
    text = graph_text(c.graph)
    assert "lookup" not in text
    assert "integer_conv_1 = integer_conv(integer_conv, quantizers_b_input_scale, 8, True, " in text
    assert "fraction=0, table=quantizers_b_input_table)" in text
    assert torch.equal(c(X), expected)
    assert made(c, tables_into_layers) == []
    # Those of the quantizer are still found, and still what the layer computes from.
    found = codes_of_quantizers(c, (X,), {})
    assert found.keys() == codes.keys()
    assert all(torch.equal(*pair) for name in codes for pair in zip(found[name], codes[name], strict=True))


def test_codes_that_two_layers_read_are_those_of_one_call():
    both = {name: nn.Conv2d(3, 5, 1, stride=2) for name in "bc"}
    c = looking_up(lambda s, x: s.b(y := F.silu(s.a(x))) + s.c(y), **both)
    expected = c(X)
    assert len(made(c, tables_into_layers)) == 2
    assert torch.equal(c(X), expected)
    codes = codes_of_quantizers(c, (X,), {})
    (looked_up,) = codes["quantizers.b_input"]
    # What is given in their place is what both layers read: no product is left.
    zero = {name: [torch.full_like(one, 128) for one in calls] for name, calls in codes.items()}
    found = codes_of_quantizers(c, (X,), {}, zero)
    assert found.keys() == codes.keys()
    assert len(found["quantizers.b_input"]) == 1
    assert not torch.equal(found["quantizers.b_input"][0], looked_up)


def test_a_linear_layer():
    parts = {"b": nn.Linear(5, 4)}
    c = looking_up(lambda self, x: self.b(F.gelu(self.a(x))), **parts)
    expected = c(X)
    assert len(made(c, tables_into_layers)) == 1
    assert torch.equal(c(X), expected)


OTHERS = {
    "filters of several elements": lambda s, x: s.three(F.silu(s.a(x))),
    "padding": lambda s, x: s.padded(F.silu(s.a(x))),
    "groups": lambda s, x: s.grouped(F.silu(s.a(x))),
    "another reader": lambda s, x: (s.b(y := F.silu(s.a(x))), s.three(y)),
}


@pytest.mark.parametrize("forward", OTHERS.values(), ids=list(OTHERS))
def test_lookups_that_stay(forward):
    parts = {
        "three": nn.Conv2d(3, 3, 3),
        "padded": nn.Conv2d(3, 3, 1, padding=1),
        "grouped": nn.Conv2d(3, 3, 1, groups=3),
    }
    c = looking_up(forward, **parts)
    expected = c(X)
    assert "lookup(" in graph_text(c.graph)
    assert made(c, tables_into_layers) == []
    torch.testing.assert_close(c(X), expected, rtol=0, atol=0)


def test_a_quantizer_of_several_values():
    c = looking_up(lambda self, x: self.b(F.silu(self.a(x))))
    c.get_submodule("quantizers.b_input").register_buffer("table_1", torch.zeros(256, dtype=torch.uint8))
    assert made(c, tables_into_layers) == []
