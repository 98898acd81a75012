"""moves_on_codes: bytes are moved in place of levels, on the way to another quantizer."""

import pytest
import torch
from torch.nn import functional as F

from octav_fx.ir.printer import graph_text
from octav_fx.passes import functions_of_codes, moves_on_codes
from tests.support.on_codes import X, on_codes
from tests.support.passes import made

pytestmark = pytest.mark.usefixtures("as_with_vnni")


def test_halves_and_a_pool():
    def forward(self, x):
        one, two = self.a(x).chunk(2, 2)
        return self.b(one)[:, :, :2] + F.max_pool2d(two, (1, 1))

    c = on_codes(forward, bits=4)
    expected = c(X)
    assert [edit.node for edit in made(c, moves_on_codes)] == ["chunk"]
    text = graph_text(c.graph)
    assert (
        """\
integer_codes_2 = integer_codes(integer_conv, quantizers_chunk_x_scale, 8, True)
chunk = integer_codes_2.chunk(2, 2)
"""
        in text
    )
    assert (
        """\
getitem = getitem(chunk, 0)
levels_3 = levels(getitem, quantizers_chunk_x_scale, 8, True)
getitem_1 = getitem(chunk, 1)
levels_4 = levels(getitem_1, quantizers_chunk_x_scale, 8, True)
"""
        in text
    )
    assert torch.equal(c(X), expected)
    assert made(c, moves_on_codes) == []
    # What is quantized again is a function of one code.
    assert [edit.node for edit in made(c, functions_of_codes)] == ["quantizers.b_input"]
    assert torch.equal(c(X), expected)


MOVES = {
    "the largest": lambda s, x: s.b(F.max_pool2d(y := s.a(x), 2)) + y.mean((2, 3), keepdim=True),
    "a flip of two axes, then a part": lambda s, x: s.b((y := s.a(x)).transpose(2, 3)[:, :, :2]).mean() + y[:, 0],
    "the nearest": lambda s, x: s.b(F.interpolate(y := s.a(x), scale_factor=2)).mean() + F.max_pool2d(y, 3),
    "zeros around": lambda s, x: s.b(F.pad(F.max_pool2d(y := s.a(x), 2), (0, 1, 0, 1))).mean() + y.reshape(-1, 1, 1, 1),
    "sizes are read": lambda s, x: s.b((y := s.a(x)).reshape(y.shape[0], 3, y.shape[2], -1)).mean() + y[0],
}


@pytest.mark.parametrize("forward", MOVES.values(), ids=list(MOVES))
def test_the_codes_stay_what_they_were(forward):
    c = on_codes(forward, bits=4)
    expected = c(X)
    assert made(c, moves_on_codes)
    assert torch.equal(c(X), expected)
    made(c, functions_of_codes)
    assert "= lookup(" in graph_text(c.graph)
    assert torch.equal(c(X), expected)


OTHERS = {
    "nothing quantizes it": lambda s, x: s.b(y := s.a(x)).mean() + F.max_pool2d(y, 2),
    "it is computed with": lambda s, x: s.b(F.max_pool2d(y := s.a(x), 2).exp()).mean() + y[0],
    "a mean": lambda s, x: s.b(F.avg_pool2d(y := s.a(x), 2)).mean() + y[0],
    "between two of them": lambda s, x: s.b(F.interpolate(y := s.a(x), scale_factor=2, mode="bilinear")).mean() + y[0],
}


@pytest.mark.parametrize("forward", OTHERS.values(), ids=list(OTHERS))
def test_what_stays(forward):
    assert made(on_codes(forward, bits=4), moves_on_codes) == []


WRITES = {
    "a copy of them": lambda s, x: (z := (y := s.a(x)).clone(), z.add_(y), s.b(F.max_pool2d(z, 2)))[-1],
    "a view of a copy": lambda s, x: (z := (y := s.a(x)).clone(), z[:, 1:].mul_(2), s.b(F.max_pool2d(z, 2)) + y.mean())[
        -1
    ],
}


@pytest.mark.parametrize("forward", WRITES.values(), ids=list(WRITES))
def test_what_is_written_into_them_is_read_later(forward):
    c = on_codes(forward, bits=4)
    expected = c(X)
    made(c, moves_on_codes)
    made(c, functions_of_codes)
    assert torch.equal(c(X), expected)
