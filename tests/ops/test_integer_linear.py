"""integer_linear: exact like integer_conv."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octav_fx.errors import OctavError
from octav_fx.formats.packing import pack
from octav_fx.ops.integer_linear import reference
from octav_fx.ops.integer_linear.op import integer_linear
from tests.support.integers import ends, needs_onednn, numbers


@st.composite
def operands(draw: st.DrawFn) -> tuple:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    leading = draw(st.sampled_from([(), (1,), (7,), (2, 3), (2, 1, 3), (31,), (2, 100)]))
    columns, rows = draw(st.sampled_from([1, 3, 4, 16, 65, 300])), draw(st.sampled_from([1, 2, 16, 33, 60, 130]))
    x_bits, w_bits = draw(st.integers(2, 8)), draw(st.integers(2, 8))
    x = torch.randint(0, 2**x_bits, (*leading, columns), generator=generator).to(torch.uint8)
    steps = 2 ** (w_bits - 1)
    w = torch.randint(-steps, steps, (rows, columns), generator=generator).to(torch.int8)
    w_scale = numbers(generator, rows) if draw(st.booleans()) else numbers(generator)
    bias = numbers(generator, rows) * 10 if draw(st.booleans()) else None
    stored = pack(w) if w_bits <= 4 else w
    return x, numbers(generator).abs(), x_bits, draw(st.booleans()), stored, w_scale, [rows, columns], bias


@needs_onednn
@settings(max_examples=200)
@given(given=operands(), end=ends())
def test_the_kernel_is_the_reference_bit_for_bit(given, end):
    y = integer_linear(*given, *end)
    assert torch.equal(y, reference.integer_linear(*given, *end))
    assert y.is_contiguous()


def arguments() -> tuple:
    x = torch.randint(0, 256, (2, 3, 8), dtype=torch.uint8)
    w = torch.randint(-128, 128, (5, 8), dtype=torch.int8)
    return x, torch.tensor(0.1), 8, True, w, torch.rand(5), [5, 8], torch.randn(5)


def test_the_reference_is_a_matmul_of_levels():
    x, _, _, _, w, *_ = arguments()
    exact = torch.randint(-2, 3, (5,)).double()
    # All of it is exact in float32: scales are powers of two, the bias an integer.
    args = (x, torch.tensor(0.5), 8, True, w, torch.full((5,), 0.25), [5, 8], exact.float())
    expected = ((x.double() - 128) * 0.5) @ (w.double() * 0.25).t() + exact
    assert torch.equal(reference.integer_linear(*args).double(), expected)


def test_rows_that_are_not_contiguous():
    x, *rest = arguments()
    assert torch.equal(integer_linear(x[:, 1], *rest), integer_linear(x, *rest)[:, 1])


@pytest.mark.parametrize("step", [None, torch.tensor(0.3)])
def test_opcheck(step):
    torch.library.opcheck(integer_linear.default, arguments(), {"step": step})


def test_operands_that_do_not_fit():
    x, *rest = arguments()
    with pytest.raises(OctavError, match="codes are uint8"):
        integer_linear(x.to(torch.int8), *rest)


@needs_onednn
@pytest.mark.parametrize("columns", [8, 6])
@pytest.mark.parametrize("rows", [5, 300])
@pytest.mark.parametrize("channels", [5, 150])
def test_codes_are_looked_up(threads, columns, rows, channels):
    threads(2)
    x = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    w = torch.randint(-8, 8, (channels, columns), dtype=torch.int8)
    given = (torch.tensor(0.1), 4, True, w, torch.rand(channels), [channels, columns], torch.randn(channels))
    table = torch.randint(0, 16, (256,), dtype=torch.uint8)
    y = integer_linear(x, *given, table=table)
    assert torch.equal(y, integer_linear(table[x.int()], *given))
    assert torch.equal(y, reference.integer_linear(x, *given, table=table))
    table.copy_(table.flip(0))
    assert torch.equal(integer_linear(x, *given, table=table), integer_linear(table[x.int()], *given))


def test_a_table_of_another_size():
    with pytest.raises(OctavError, match=r"a table of torch.uint8 \(255,\) where codes are looked up in uint8 \[256\]"):
        integer_linear(*arguments(), table=torch.zeros(255, dtype=torch.uint8))


# Each code of the input and of the weight is the largest of 8 bits; a bias is as large as deploying makes one.
@pytest.mark.parametrize("columns, bias", [(70000, None), (40000, torch.full((1,), 2**30, dtype=torch.int32))])
def test_sums_beyond_32_bits_are_the_reference(columns, bias):
    x, w = torch.full((1, columns), 255, dtype=torch.uint8), torch.full((1, columns), 127, dtype=torch.int8)
    one = torch.ones(())
    y = integer_linear(x, one, 8, False, w, one, [1, columns], bias)
    assert y.item() == torch.tensor(columns * 255 * 127 + (0 if bias is None else 2**30)).float().item()
