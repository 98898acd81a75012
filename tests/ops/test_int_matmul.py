import dataclasses
import math
import re
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octav_fx.errors import OctavError
from octav_fx.formats.grid import Grid
from octav_fx.ops.int_matmul import configs, reference
from octav_fx.ops.int_matmul.op import int_matmul
from octav_fx.ops.int_matmul.range import (
    FLOAT32,
    SLICE,
    TENSOR_CORE,
    largest_k,
    largest_k_in_float8,
    largest_k_in_halves,
    offset,
)
from tests.support.compare import EXACT
from tests.support.examples import examples
from tests.support.interpreter import DEVICE
from tests.support.offline import ROWS, compiled, loops_with

kernel = pytest.importorskip("octav_fx.ops.int_matmul.kernel")

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRIDS = [(bits, signed) for bits in range(2, 9) for signed in (True, False)]
CONFIGS = sorted(
    {(name, config, of.halves) for name, of in configs.ARCHITECTURES.items() for config in of.configs},
    key=lambda row: (row[0], -row[1].block_m * row[1].block_n),
)


def codes(rows, k, bits, signed, generator=None):
    """All codes of a grid, as they are handed to the op: int8."""
    grid = Grid(bits, signed)
    drawn = torch.randint(grid.low, grid.high + 1, (rows, k), generator=generator)
    return (drawn - offset(bits, signed)).to(torch.int8).to(DEVICE)


def arguments(m, n, k, x_bits=8, x_signed=True, w_bits=8, dtype=torch.float32):
    x, w = codes(m, k, x_bits, x_signed), codes(n, k, w_bits, True)
    x_scale, w_scale = torch.rand((), device=DEVICE), torch.rand(n, device=DEVICE)
    return x, x_scale, w, w_scale, torch.randn(n, device=DEVICE), x_bits, x_signed, w_bits, dtype


def by_kernel(*args, out=None, of=None):
    """What the kernel writes into memory full of NaN."""
    out = reference.int_matmul(*args).fill_(math.nan) if out is None else out
    assert kernel.int_matmul(*args, out=out, of=of)
    return out


FLOAT8 = torch.float8_e4m3fn
# Tiles of whole slices on a GPU.
IN_FLOAT8 = (
    configs.architecture(torch.device(DEVICE))
    if DEVICE == "cuda"
    else configs.Architecture((), float8=(configs.Config(64, 64, SLICE, num_warps=4, num_stages=2),))
)


def how(halves):
    """As the interpreter multiplies, or whatever GPU is here; in half precision where that is exact, if asked for."""
    return dataclasses.replace(configs.architecture(torch.device(DEVICE)), halves=halves)


def test_by_hand():
    x, w = torch.tensor([[1, -2, 3]], dtype=torch.int8), torch.tensor([[4, 5, 6], [0, -1, 127]], dtype=torch.int8)
    args = (x, torch.tensor(0.5), w, torch.tensor([2.0, 0.25]), torch.tensor([10.0, 0.0]))
    assert int_matmul(*args, 4, True, 8, torch.float32).tolist() == [[22, 383 / 8]]
    # Codes 129, 126 and 131, each 128 less in a byte.
    assert int_matmul(*args, 8, False, 8, torch.float32).tolist() == [[12 + 10 + 128 * 15, (383 + 128 * 126) / 8]]


@examples(30)
@given(data=st.data())
def test_the_reference_is_the_exact_result_rounded_once(data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    bits, signed = data.draw(st.sampled_from(GRIDS))
    x, w = codes(2, 50, bits, signed, generator).cpu(), codes(3, 50, 8, True, generator).cpu()
    rows, columns, bias = (torch.rand(size, generator=generator) for size in (2, 3, 3))
    y = reference.int_matmul(x, rows, w, columns, bias, bits, signed, 8, torch.float32)
    for i in range(2):
        for j in range(3):
            total = sum((a + offset(bits, signed)) * b for a, b in zip(x[i].tolist(), w[j].tolist(), strict=True))
            product = total * Fraction(rows[i].item()) * Fraction(columns[j].item())
            exact = product + Fraction(bias[j].item())
            # Half of the distance to the next float32, and of two roundings in float64.
            last = torch.tensor(abs(y[i, j].item()))
            allowed = Fraction((last.nextafter(torch.tensor(torch.inf)) - last).item()) / 2
            allowed += (abs(product) + abs(exact)) * Fraction(2) ** -53
            assert abs(Fraction(y[i, j].item()) - exact) <= allowed


SIZES = [0, 1, 2, 3, 31, 64, 65, 100]


# A float16 that is infinite in the reference is one in the interpreter, too.
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
# On a GPU most of them are another kernel to compile.
@examples(150 if DEVICE == "cpu" else 40)
@given(data=st.data())
def test_the_kernel_is_the_reference_bit_for_bit(data):
    m, n, k = (data.draw(st.sampled_from(SIZES)) for _ in "mnk")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    (x_bits, x_signed), w_bits = data.draw(st.sampled_from(GRIDS)), data.draw(st.integers(2, 8))
    x, w = codes(m, k, x_bits, x_signed, generator), codes(n, k, w_bits, True, generator)
    x_scale, w_scale = (
        torch.rand(data.draw(st.sampled_from([(), (rows,)])), generator=generator).to(DEVICE) for rows in (m, n)
    )
    bias_dtype = data.draw(st.sampled_from([None, torch.float32, torch.bfloat16]))
    bias = None if bias_dtype is None else torch.randn(n, generator=generator).to(DEVICE, bias_dtype)
    args = (x, x_scale, w, w_scale, bias, x_bits, x_signed, w_bits, data.draw(st.sampled_from(DTYPES)))
    y = by_kernel(*args, of=how(data.draw(st.booleans())))
    torch.testing.assert_close(y, reference.int_matmul(*args), **EXACT)


@pytest.mark.parametrize(("name", "config", "halves"), CONFIGS)
def test_every_pinned_tile(name, config, halves, monkeypatch):
    del name
    of = configs.Architecture((config,), halves=halves)
    monkeypatch.setattr(kernel, "architecture", lambda device: of)
    # More tiles in each direction than programs take turns in.
    m, n = (
        (9 * config.block_m + 3, config.block_n + 1) if DEVICE == "cuda" else (config.block_m + 3, config.block_n + 1)
    )
    args = arguments(m, n, config.block_k + 16, 4, False, 4, torch.bfloat16)
    torch.testing.assert_close(by_kernel(*args), reference.int_matmul(*args), **EXACT)


@pytest.mark.parametrize(("tiles_m", "tiles_n"), [(1, 3), (9, 1), (17, 2)])
def test_every_tile_is_computed_once(tiles_m, tiles_n):
    args = arguments(64 * tiles_m - 1, 64 * tiles_n - 1, 16)
    torch.testing.assert_close(by_kernel(*args), reference.int_matmul(*args), **EXACT)


@pytest.mark.parametrize("halves", [False, True])
def test_memory_in_any_order(halves):
    m, n, k = 5, 7, 40
    x, x_scale, w, w_scale, bias, *rest = arguments(m, n, k)
    expected = reference.int_matmul(x, x_scale, w, w_scale, bias, *rest)
    spread = torch.full((m, 3 * k), 99, dtype=torch.int8, device=DEVICE)
    spread[:, k : 2 * k] = x
    columns = torch.stack([w_scale, w_scale], 1)[:, 0]
    for given_x in (x.t().contiguous().t(), spread[:, k : 2 * k]):
        for given_w in (w.t().contiguous().t(), torch.stack([w, w], 2)[:, :, 1]):
            y = by_kernel(given_x, x_scale, given_w, columns, torch.stack([bias, bias], 1)[:, 1], *rest, of=how(halves))
            torch.testing.assert_close(y, expected, **EXACT)
    one_row = by_kernel(x[:1].expand(m, k), x_scale, w, w_scale, bias, *rest)
    torch.testing.assert_close(one_row, expected[:1].expand(m, n), **EXACT)


def test_out_is_written_in_its_own_layout():
    args = arguments(5, 7, 40)
    expected = reference.int_matmul(*args)
    for out in (
        torch.full((7, 5), math.nan, device=DEVICE).t(),
        torch.full((5, 20), math.nan, device=DEVICE)[:, 3:10],
        torch.full((5, 14), math.nan, device=DEVICE)[:, ::2],
    ):
        stride = out.stride()
        by_kernel(*args, out=out)
        assert out.stride() == stride
        torch.testing.assert_close(out, expected, **EXACT)
    torch.testing.assert_close(int_matmul(*args), expected, **EXACT)
    assert int_matmul(*args, out=out.fill_(math.nan)) is None
    torch.testing.assert_close(out, expected, **EXACT)


def test_rows_far_apart():
    # The third row begins beyond 2**31; pages that nobody touches cost nothing.
    far = torch.empty(2**31 + 64, dtype=torch.int8, device=DEVICE).as_strided((3, 32), (2**30, 1))
    args = arguments(3, 5, 32)
    expected = reference.int_matmul(*args)
    far.copy_(args[0])
    torch.testing.assert_close(by_kernel(far, *args[1:]), expected, **EXACT)
    x, x_scale, w, w_scale, _, *rest = args
    y = by_kernel(w, w_scale, far, x_scale, None, *rest)
    torch.testing.assert_close(y, reference.int_matmul(w, w_scale, x, x_scale, None, *rest), **EXACT)


def ends(bits, signed):
    return Grid(bits, signed).low, Grid(bits, signed).high


def extremes(k, x_bits, x_signed, w_bits):
    """Two rows each: the products that are largest in magnitude, of either sign."""
    x_grid, w_grid = Grid(x_bits, x_signed), Grid(w_bits, True)
    x = torch.tensor([x_grid.low, x_grid.high]) - offset(x_bits, x_signed)
    w = torch.tensor([w_grid.low, w_grid.high])
    x, w = (ends.to(DEVICE, torch.int8)[:, None].repeat(1, k) for ends in (x, w))
    one = torch.ones((), device=DEVICE)
    return x, one, w, one, None, x_bits, x_signed, w_bits, torch.float32


@pytest.mark.parametrize(("x_bits", "x_signed", "k"), [(8, True, 131071), (8, False, 65793)])
def test_no_sum_overflows_up_to_the_largest_k(x_bits, x_signed, k):
    assert largest_k(x_bits, x_signed, 8) == k
    args = extremes(k, x_bits, x_signed, 8)
    y = by_kernel(*args)
    torch.testing.assert_close(y, reference.int_matmul(*args), **EXACT)
    grid = Grid(x_bits, x_signed)
    expected = torch.tensor([[a * b * k for b in (-128, 127)] for a in (grid.low, grid.high)], dtype=torch.float64)
    torch.testing.assert_close(y.cpu(), expected.float(), **EXACT)
    # One more would not fit 32 bits any more: the reference has it.
    more = extremes(k + 1, x_bits, x_signed, 8)
    y = torch.full_like(y, math.nan)
    assert not kernel.int_matmul(*more, out=y)
    assert y.isnan().all()
    assert int_matmul(*more).double().abs().max() == (2**31 if x_signed else 255 * 128 * (k + 1))


@pytest.mark.parametrize(("bits", "signed"), GRIDS)
@pytest.mark.parametrize("w_bits", [2, 4, 8])
def test_the_largest_k_is_the_last_that_fits(bits, signed, w_bits):
    grid, w_grid = Grid(bits, signed), Grid(w_bits, True)
    products = [a * b for a in (grid.low, grid.high) for b in (w_grid.low, w_grid.high)]
    k, ends = largest_k(bits, signed, w_bits), torch.iinfo(torch.int32)
    assert all(ends.min <= k * product <= ends.max for product in products)
    assert any(abs((k + 1) * product) > ends.max for product in products)
    shift = offset(bits, signed)
    assert grid.low - shift >= -128
    assert grid.high - shift <= 127
    largest = max(abs((a - shift) * b) for a in (grid.low, grid.high) for b in (w_grid.low, w_grid.high))
    assert (
        largest_k_in_halves(bits, signed, w_bits) * largest
        <= 2**24
        < (largest_k_in_halves(bits, signed, w_bits) + 1) * largest
    )


@pytest.mark.parametrize(("x_bits", "x_signed"), [(8, True), (8, False), (7, False)])
def test_half_precision_is_exact_up_to_its_largest_k(x_bits, x_signed):
    k = largest_k_in_halves(x_bits, x_signed, 8)
    assert k == (1024 if x_bits == 8 else 1032)
    args = extremes(k, x_bits, x_signed, 8)
    # 2**24 has an even neighbour: an odd sum next to it is the first that float32 would lose.
    args[0][0, -1] += 1
    args[2][0, -1] += 1
    torch.testing.assert_close(by_kernel(*args, of=how(True)), reference.int_matmul(*args), **EXACT)
    # Beyond it the same call multiplies integers.
    more = extremes(k + 1, x_bits, x_signed, 8)
    torch.testing.assert_close(by_kernel(*more, of=how(True)), reference.int_matmul(*more), **EXACT)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scale_that_is_nan_stays_in_its_row_or_column(dtype):
    x, _, w, w_scale, bias, *bits, _ = arguments(5, 7, 20)
    rows = torch.ones(5, device=DEVICE)
    rows[2], w_scale[4] = math.nan, math.nan
    x[3] = 0
    args = (x, rows, w, w_scale, bias, *bits, dtype)
    y = by_kernel(*args)
    torch.testing.assert_close(y, reference.int_matmul(*args), **EXACT)
    assert y[2].isnan().all()
    assert y[:, 4].isnan().all()
    assert y.isnan().sum() == 7 + 5 - 1


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(5, 19, dtype=torch.int8), "takes codes"),
        (0, torch.zeros(5, 20), "takes codes"),
        (0, torch.zeros(5, 20).to(torch.float8_e4m3fn), "both int8 or both float8_e4m3fn"),
        (2, torch.zeros(20, dtype=torch.int8), "takes codes"),
        (1, torch.ones(4), "x_scale has shape"),
        (3, torch.ones(8), "w_scale has shape"),
        (4, torch.ones(()), "bias has shape"),
    ],
)
def test_shapes_that_do_not_fit(position, value, message):
    args = list(arguments(5, 7, 20))
    args[position] = value.to(DEVICE)
    with pytest.raises(OctavError, match=message):
        int_matmul(*args)


def test_opcheck():
    args = arguments(5, 7, 20, dtype=torch.bfloat16)
    torch.library.opcheck(int_matmul.default, args)
    torch.library.opcheck(int_matmul.out, args, {"out": torch.empty(5, 7, dtype=torch.bfloat16, device=DEVICE)})


def test_the_largest_tile_that_leaves_no_processor_idle():
    large, medium, small = (configs.Config(size, size, 64, 4, 2) for size in (256, 128, 64))
    every = (large, medium, small)
    assert configs.choose(every, 4096, 4096, 132) is large
    assert configs.choose(every, 4096, 512, 132) is medium if 32 * 4 >= 132 else small
    assert configs.choose(every, 2048, 1024, 128) is medium
    assert configs.choose(every, 1, 1, 132) is small


def test_every_pinned_tile_is_compiled_offline():
    for name, of in configs.ARCHITECTURES.items():
        rows = [row for row in ROWS["int_matmul"] if name in row.targets]
        for tiles, slice_length in ((of.configs, None), (of.float8, SLICE)):
            shapes = {
                (*(row.constexprs[f"BLOCK_{axis}"] for axis in "MNK"), row.num_warps, row.num_stages)
                for row in rows
                if row.constexprs["PROMOTED"] == slice_length
            }
            assert {dataclasses.astuple(config) for config in tiles} <= shapes
        assert of.halves == any(row.constexprs["HALVES"] for row in rows)


def test_a_sum_of_float8_moves_to_float32_after_every_slice():
    found = [one for one in compiled("int_matmul") if ROWS["int_matmul"][one.row].constexprs["PROMOTED"]]
    assert found
    for one in found:
        row = ROWS["int_matmul"][one.row]
        assert row.constexprs["BLOCK_K"] == SLICE
        (loop,) = loops_with(one.machine, "QGMMA")
        # Each thread holds its share of the tile, and adds all of it once.
        held = row.constexprs["BLOCK_M"] * row.constexprs["BLOCK_N"] // (32 * row.num_warps)
        assert sum("FADD" in text for text in loop) == held


def test_float8_is_exact_up_to_its_largest_k():
    for x_bits, x_signed, w_bits, k in ((4, True, 4, 262144), (4, False, 4, 139810), (5, True, 4, 131072)):
        assert largest_k_in_float8(x_bits, x_signed, w_bits) == k
        products = max(abs(a * b) for a in ends(x_bits, x_signed) for b in ends(w_bits, True))
        # Of 14 bits a slice fills none beyond.
        assert products * SLICE <= TENSOR_CORE
        assert k * products <= FLOAT32 < (k + 1) * products
    # 31 is no float8, and 16 times 16 fills more.
    assert largest_k_in_float8(5, False, 4) == largest_k_in_float8(5, True, 5) == largest_k_in_float8(8, True, 4) == 0


@examples(60 if DEVICE == "cpu" else 40)
@given(data=st.data())
def test_float8_is_the_reference_bit_for_bit(data):
    m, n, k = (data.draw(st.sampled_from(SIZES)) for _ in "mnk")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    x_bits, x_signed, w_bits = data.draw(st.sampled_from([(4, True, 4), (4, False, 4), (5, True, 4), (2, False, 5)]))
    x, w = codes(m, k, x_bits, x_signed, generator), codes(n, k, w_bits, True, generator)
    x_scale, w_scale = torch.rand(m, generator=generator).to(DEVICE), torch.rand(n, generator=generator).to(DEVICE)
    rest = (None, x_bits, x_signed, w_bits, data.draw(st.sampled_from(DTYPES)))
    y = by_kernel(x.to(FLOAT8), x_scale, w.to(FLOAT8), w_scale, *rest, of=IN_FLOAT8)
    torch.testing.assert_close(y, reference.int_matmul(x, x_scale, w, w_scale, *rest), **EXACT)
    torch.testing.assert_close(int_matmul(x.to(FLOAT8), x_scale, w.to(FLOAT8), w_scale, *rest), y, **EXACT)


# Of these the sums of a slice are the largest that there are, and odd beside them.
@pytest.mark.parametrize("k", [128, 768, 3072])
def test_the_largest_sums_in_float8(k):
    x, x_scale, w, w_scale, bias, *rest = extremes(k, 4, False, 4)
    x[1, ::2] -= 1
    w[1, ::3] -= 1
    expected = reference.int_matmul(x, x_scale, w, w_scale, bias, *rest)
    y = by_kernel(x.to(FLOAT8), x_scale, w.to(FLOAT8), w_scale, bias, *rest, of=IN_FLOAT8)
    torch.testing.assert_close(y, expected, **EXACT)


def test_what_has_no_exact_sum_in_float8_is_left_to_the_reference():
    x, x_scale, w, w_scale, bias, *rest = arguments(3, 5, 40, 8, True, 8)
    out = torch.empty(3, 5, device=DEVICE)
    assert not kernel.int_matmul(x.to(FLOAT8), x_scale, w.to(FLOAT8), w_scale, bias, *rest, out=out, of=IN_FLOAT8)
    fours = arguments(3, 5, 40, 4, True, 4)
    given = (fours[0].to(FLOAT8), x_scale, fours[2].to(FLOAT8), w_scale, bias, 4, True, 4, torch.float32)
    assert not kernel.int_matmul(*given, out=out, of=configs.ARCHITECTURES["sm_80"])


def test_tensor_cores_multiply():
    instruction = {"sm_80": "mma.sync", "sm_90": "wgmma", "gfx942": "v_mfma_i32"}
    for one in compiled("int_matmul"):
        constexprs = ROWS["int_matmul"][one.row].constexprs
        if constexprs["HALVES"]:
            assert "tcgen05.mma" in one.text
        elif constexprs["PROMOTED"]:
            assert re.search(r"wgmma.mma_async\S*e4m3.e4m3", one.text)
        elif one.target in instruction:
            expected = instruction[one.target]
            assert any(expected in line and ("s8" in line or "i32" in line) for line in one.text.splitlines()), one.row
