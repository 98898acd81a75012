"""integer_conv: sums of products of codes are exact, and what follows them is float32 in a known order."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octav_fx.errors import OctavError
from octav_fx.formats.packing import pack
from octav_fx.ops import onednn
from octav_fx.ops.integer_conv import op, reference
from octav_fx.ops.integer_conv.op import integer_conv
from tests.support.integers import ends, needs_onednn, numbers


@st.composite
def operands(draw: st.DrawFn) -> tuple:
    """The arguments of integer_conv up to groups: any window, grouped, depthwise, packed or not."""
    rank, generator = draw(st.integers(1, 3)), torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    groups, per_group = draw(st.sampled_from([(1, 1), (1, 3), (1, 16), (2, 4), (3, 1), (16, 1)]))
    rows = groups * draw(st.sampled_from([1, 2, 5, 16]))
    x_bits, w_bits, x_signed = draw(st.integers(2, 8)), draw(st.integers(2, 8)), draw(st.booleans())
    kernel, stride, dilation = (
        draw(st.lists(st.integers(1, largest), min_size=rank, max_size=rank)) for largest in (3, 3, 2)
    )
    padding = draw(st.lists(st.integers(0, 2), min_size=rank, max_size=rank))
    size = [draw(st.integers(d * (k - 1) + 1, 9)) for k, d in zip(kernel, dilation, strict=True)]
    shape = (rows, per_group, *kernel)
    # Not only noise: all codes at their ends give the largest sums.
    at_end = draw(st.booleans())
    x = torch.randint(2**x_bits - 1 if at_end else 0, 2**x_bits, (2, groups * per_group, *size), generator=generator)
    steps = 2 ** (w_bits - 1)
    w = torch.randint(-steps, 1 - steps if at_end else steps, shape, generator=generator).to(torch.int8)
    w_scale = numbers(generator, rows) if draw(st.booleans()) else numbers(generator)
    bias = numbers(generator, rows) * 10 if draw(st.booleans()) else None
    x = x.to(torch.uint8)
    if rank == 2 and draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    stored = pack(w) if w_bits <= 4 else w
    x_scale = numbers(generator).abs()
    return (x, x_scale, x_bits, x_signed, stored, w_scale, list(shape), bias, stride, padding, dilation, groups)


@needs_onednn
@settings(max_examples=200)
@given(given=operands(), end=ends())
def test_the_kernel_is_the_reference_bit_for_bit(given, end):
    y = integer_conv(*given, *end)
    expected = reference.integer_conv(*given, *end)
    assert y.dtype is expected.dtype is (torch.float32 if end[2] is None else torch.uint8)
    assert torch.equal(y, expected)


@settings(max_examples=60)
@given(given=operands())
def test_the_reference_is_a_convolution_of_levels(given):
    x, x_scale, x_bits, x_signed, stored, w_scale, shape, bias, *window = given
    levels = (x.double() - (2 ** (x_bits - 1) if x_signed else 0)) * x_scale.double()
    scale = w_scale.double() if w_scale.dim() == 0 else w_scale.double().reshape(-1, *[1] * (len(shape) - 1))
    weight = onednn.integers(stored, tuple(shape)).double() * scale
    conv = reference.CONVOLUTIONS[x.dim()]
    expected = conv(levels, weight, None if bias is None else bias.double(), *window)
    y = reference.integer_conv(*given)
    # The product of the scales, the sum as a float32, their product and the sum with the bias are rounded: four times.
    size = conv(levels.abs(), weight.abs(), None if bias is None else bias.double().abs(), *window)
    assert ((y.double() - expected).abs() <= 4 * 2.0**-24 * size + 1e-40).all()


def test_a_filter_that_fits_into_the_padding():
    x = torch.randint(0, 256, (2, 4, 5, 9), dtype=torch.uint8)
    w = torch.randint(-128, 128, (20, 1, 2, 2), dtype=torch.int8)
    window = [1, 2], [2, 1], [1, 1], 4
    given = (x, torch.tensor(0.1), 8, True, w, torch.rand(20), [20, 1, 2, 2], None, *window)
    assert torch.equal(integer_conv(*given), reference.integer_conv(*given))


def arguments(x_bits: int = 8, w_bits: int = 8, rank: int = 2) -> tuple:
    x = torch.randint(0, 2**x_bits, (2, 8, *[6] * rank), dtype=torch.uint8)
    shape = [5, 8, *[3] * rank]
    w = torch.randint(-(2 ** (w_bits - 1)), 2 ** (w_bits - 1), shape, dtype=torch.int8)
    one = [1] * rank
    return (x, torch.tensor(0.1), x_bits, True, w, torch.rand(5), shape, torch.randn(5), one, one, one, 1)


def test_ties_go_to_the_even_code():
    codes = torch.arange(8, dtype=torch.uint8).reshape(1, 1, 1, 8)
    one = torch.tensor(1.0)
    args = (codes, one / 2, 8, False, torch.ones(1, 1, 1, 1, dtype=torch.int8), one, [1, 1, 1, 1], None)
    y = integer_conv(*args, [1, 1], [0, 0], [1, 1], 1, step=one)
    assert y.flatten().tolist() == [0, 0, 1, 2, 2, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("step", [None, torch.tensor(0.3)])
def test_opcheck(rank, step):
    torch.library.opcheck(integer_conv.default, arguments(rank=rank), {"step": step})
    given = arguments(rank=rank)
    y = integer_conv(*given)
    assert y.stride() == integer_conv(*given, low=0.0).stride()


def test_a_new_weight_is_packed_anew():
    given = arguments()
    first = integer_conv(*given)
    given[4].mul_(0)
    assert torch.equal(integer_conv(*given), given[7].reshape(-1, 1, 1).expand_as(first))


def test_packed_weights_go_with_their_codes():
    given = arguments()
    integer_conv(*given)
    weight = given[4].untyped_storage()._cdata
    gone = [key for key in onednn._DERIVED if any(weight in place for place in key[:-1])]
    assert len(gone) == 1
    del given
    # Looked for when another is packed.
    integer_conv(*(other := arguments()))
    assert not [key for key in gone if key in onednn._DERIVED]
    del other


def test_a_weight_that_reads_several_inputs_is_packed_once_for_each(monkeypatch):
    """The heads of a detector: one filter, and levels of a pyramid with a scale each."""
    first, scales = arguments(), [torch.tensor(0.1), torch.tensor(0.2)]
    calls = [(first[0], scale, *first[2:]) for scale in scales]
    expected = [integer_conv(*call) for call in calls]
    monkeypatch.setattr(op, "_run", None)
    assert all(torch.equal(integer_conv(*call), y) for call, y in zip(calls, expected, strict=True))


def test_no_images():
    x, *rest = arguments()
    assert integer_conv(x[:0], *rest).shape == (0, 5, 6, 6)


@pytest.mark.parametrize(
    ("position", "value"),
    [
        (0, torch.zeros(2, 8, 6, 6)),
        (4, torch.zeros(5, 8, 3, 3)),
        (5, torch.ones(4)),
        (7, torch.ones(1)),
        (1, torch.ones(2)),
    ],
)
def test_operands_that_do_not_fit(position, value):
    given = list(arguments())
    given[position] = value
    with pytest.raises(OctavError, match=r"codes are uint8|takes scales \[\] and \[5\]"):
        integer_conv(*given)


# On any CPU.


def test_products_that_saturate_run_the_reference(monkeypatch):
    monkeypatch.setattr(onednn, "largest_product", lambda: 16383)
    assert onednn.refusal(8, 128) == "8-bit codes times 128 saturate in 16 bits on this CPU, which has no VNNI"
    assert [onednn.refusal(*widths) for widths in ((4, 8), (8, 64), (7, 128), (8, 8), (4, 128))] == [None] * 5
    calls = []
    monkeypatch.setattr(onednn, "derived", lambda codes, key, make: calls.append(made := make()) or made)
    for bits, runs in ((8, False), (7, True)):
        given = arguments(x_bits=bits)
        assert torch.equal(integer_conv(*given), reference.integer_conv(*given))
        assert (calls.pop() is not None) is runs


@pytest.mark.slow
@needs_onednn
@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_results_stay_right_where_products_saturate(isa):
    """oneDNN reads what it may use once, before its first kernel: in a process of its own."""
    code = """
import torch
from tests.ops.test_integer_conv import arguments
from octav_fx.ops import onednn
from octav_fx.ops.integer_conv import op, reference
from octav_fx.ops.integer_conv.op import integer_conv
for bits in ((8, 8), (8, 7), (7, 8), (4, 4), (8, 4)):
    x, *rest = arguments(*bits)
    x.fill_(2 ** bits[0] - 1), rest[3].fill_(-(2 ** (bits[1] - 1)))
    assert torch.equal(integer_conv(x, *rest), reference.integer_conv(x, *rest)), bits
print(onednn.largest_product())
"""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["16383"]


@needs_onednn
@pytest.mark.parametrize("rows", [3, 15])
@pytest.mark.parametrize("size", [(6, 4), (9, 5), (10, 3)])
def test_one_input_for_each_group_and_one_column(rows, size):
    x = torch.randint(0, 256, (2, 3, *size)).to(torch.uint8)
    w = torch.randint(-128, 128, (rows, 1, 2, 3)).to(torch.int8)
    given = (x, torch.tensor(1.0), 8, True, w, torch.ones(rows), list(w.shape), None, [1, 3], [0, 0], [1, 1], 3)
    # Sums of integers: exact.
    assert torch.equal(integer_conv(*given), reference.integer_conv(*given))


@needs_onednn
def test_a_stride_over_positions_of_one_row():
    x = torch.randint(0, 256, (2, 16, 1, 5)).to(torch.uint8)
    w = torch.randint(-128, 128, (8, 16, 1, 1)).to(torch.int8)
    given = (x, torch.tensor(1.0), 8, True, w, torch.ones(8), list(w.shape), None, [2, 2], [0, 0], [1, 1], 1)
    assert torch.equal(integer_conv(*given), reference.integer_conv(*given))


def test_an_integer_bias_counts_parts_of_a_product():
    given = arguments()
    codes, scale = torch.randint(-(2**20), 2**20, (5,), dtype=torch.int32), given[1] * given[5]
    expected = integer_conv(*given[:7], codes.float() * (scale / 16), *given[8:], step=torch.tensor(0.3))
    args = (*given[:7], codes, *given[8:], None, None, torch.tensor(0.3), 8, False, 4)
    assert torch.equal(integer_conv(*args), expected)
    assert torch.equal(reference.integer_conv(*args), expected)


def test_another_value_of_any_operand_counts():
    given = (*arguments(), None, None, torch.tensor(0.3))
    for position in (1, 5, 7, 14):
        before = integer_conv(*given)
        given[position].mul_(1.7)
        assert torch.equal(integer_conv(*given), reference.integer_conv(*given))
        assert not torch.equal(integer_conv(*given), before)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_codes_are_looked_up(kernel, stride):
    x, *given = arguments()
    given[3:6] = given[3][:, :, :kernel, :kernel].contiguous(), given[4], [5, 8, kernel, kernel]
    given[7:9] = [stride] * 2, [kernel // 2] * 2
    table = torch.randint(0, 256, (256,), dtype=torch.uint8)
    y = integer_conv(x, *given, table=table)
    assert torch.equal(y, integer_conv(table[x.int()], *given))
    assert torch.equal(y, reference.integer_conv(x, *given, table=table))
    torch.library.opcheck(integer_conv.default, (x, *given), {"table": table})
