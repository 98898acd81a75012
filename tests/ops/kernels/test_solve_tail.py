import math

import pytest
import torch

from octav_fx.formats.spec import integers
from octav_fx.ops.optimal_clip import reference
from tests.support.interpreter import DEVICE
from tests.support.pairwise import pairwise
from tests.support.samples import fixed_point

kernel = pytest.importorskip("octav_fx.ops.kernels.solve_tail.kernel")

pytestmark = pytest.mark.gpu
DTYPES = list(kernel.PATTERNS)
# Counts and sums are exact up to roundings of float64; what is left is the rounding of the clip to float32, 2**-24.
EXACT = 2**-24 + 1e-12
COLD = 0.0


def solved(x, hint, bits=4, signed=True, block=256):
    out = torch.full((), math.nan, device=DEVICE)
    assert kernel.solve_tail(x, torch.tensor(hint, device=DEVICE), bits, signed, out=out, block=block)
    return out.item()


def expected(x, bits=4, signed=True):
    return fixed_point(x[x.isfinite()].flatten().float().cpu(), bits, signed)


TENSORS = {
    "gaussian": lambda: torch.randn(1301),
    "two halves a word": lambda: torch.randn(1302),
    "uniform, all bins hot": lambda: torch.rand(1301) * 2 - 1,
    "one magnitude": lambda: torch.full((700,), 0.7),
    "one bin of float32": lambda: 1 + torch.rand(700) * 2**-8,
    "a ceiling": lambda: (4 * torch.randn(1301)).clamp(0, 6),
    "outliers": lambda: torch.cat([torch.randn(700), torch.tensor([3e4, -2e4])]),
    "outliers above all bins of the first launch": lambda: torch.cat([torch.randn(700) * 1e-3, torch.tensor([3e4])]),
    "one non-zero": lambda: torch.zeros(700).index_fill(0, torch.tensor(300), 0.3),
    "not finite": lambda: torch.cat([torch.randn(700), torch.tensor([math.inf, -math.inf, math.nan, -math.nan])]),
    "tiny": lambda: torch.randn(700) * 1e-6,
}


@pairwise({"kind": TENSORS, "bits, signed": [(2, True), (5, False), (8, True)], "dtype": DTYPES})
def test_every_tail_has_the_exact_fixed_point(kind, bits, signed, dtype):
    x = TENSORS[kind]().to(DEVICE, dtype)
    clip = expected(x, bits, signed)
    assert solved(x, clip * 1.1, bits, signed) == pytest.approx(clip, rel=EXACT)


# Interpreted each takes 17 s: every dtype, and each kind in the dtypes that it is for.
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *(("two halves a word", torch.bfloat16), ("two halves a word", torch.float16)),
        *(("one bin of float32", torch.float32), ("outliers", torch.float32), ("outliers", torch.bfloat16)),
    ],
)
def test_every_hint_gives_the_same_bits(kind, dtype):
    x = TENSORS[kind]().to(DEVICE, dtype)
    cold = solved(x, COLD)
    for hint in (-1.0, math.inf, math.nan, *(factor * cold for factor in (1e-30, 0.999, 1.34, 1.7, 1e30))):
        assert solved(x, hint) == cold, hint


@pytest.mark.parametrize(
    ("factor", "solved_at_once"), [(0, True), (0.5, True), (1.2, True), (1.5, False), (1e9, False)]
)
def test_only_a_hint_that_is_too_high_costs_a_second_pass(monkeypatch, factor, solved_at_once):
    x, cold = torch.randn(1302, device=DEVICE).bfloat16(), []

    class Recorded:
        def __getitem__(self, grid):
            def launch(x, hint, out, bins, merged, every_bin, counters, *args, STAGE, **kwargs):
                if STAGE == kernel.COLD:
                    cold.append(bool(counters[kernel.SOLVED.value]))
                    # What it must not read then.
                    x = torch.full_like(x, 0x3F803F80) if cold[0] else x
                launched[grid](x, hint, out, bins, merged, every_bin, counters, *args, STAGE=STAGE, **kwargs)

            return launch

    launched = kernel.solve_tail_kernel
    monkeypatch.setattr(kernel, "solve_tail_kernel", Recorded())
    assert solved(x, expected(x) * factor) == pytest.approx(expected(x), rel=EXACT)
    assert cold == [solved_at_once]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_programs_and_of_replicas_changes_no_bit(monkeypatch, dtype):
    x, clips = torch.randn(1301, device=DEVICE).to(dtype), set()
    for programs, replicas in ((1, 1), (2, 1), (5, 5), (7, 3)):
        monkeypatch.setattr(kernel, "program_count", lambda x, block, count=programs: count)
        monkeypatch.setattr(kernel, "REPLICAS", replicas)
        clips.add(solved(x, 2.5, block=128))
    assert len(clips) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hint", [COLD, 1.0, 1e-40])
@pytest.mark.parametrize("values", [[], [0.0, -0.0], [math.nan, math.inf, 0.0]])
def test_nothing_to_clip_is_a_clip_of_zero(dtype, hint, values):
    assert solved(torch.tensor(values, dtype=dtype, device=DEVICE), hint) == 0


@pytest.mark.parametrize("values", [[3e38] * 3, [1e-40, 2e-40, -3e-40], [-0.7]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ends_of_the_range(dtype, values):
    x = torch.tensor(values, device=DEVICE).to(dtype)
    assert solved(x, COLD) == pytest.approx(expected(x), rel=EXACT, abs=1e-45)


def test_numbers_below_zero_take_no_part_on_an_unsigned_grid():
    x = torch.cat([torch.randn(500), torch.full((500,), -100.0)])[torch.randperm(1000)].to(DEVICE, torch.bfloat16)
    assert solved(x, 2.0, 4, False) == pytest.approx(expected(x.clamp(min=0), 4, False), rel=EXACT)


def test_a_tensor_in_any_memory_layout():
    x = torch.randn(10, 12, 10, device=DEVICE)
    for same in (x.permute(2, 0, 1).contiguous().permute(1, 2, 0), torch.stack([x, -x], -1)[..., 0]):
        assert solved(same, 2.5) == solved(x, 2.5)


def test_halves_that_begin_within_a_word():
    x = torch.randn(1303, device=DEVICE).bfloat16()
    assert solved(x[1:], 2.5) == solved(x[1:].clone(), 2.5)


def test_it_agrees_with_the_reference():
    x = torch.randn(1301, device=DEVICE)
    clip = reference.optimal_clip(x, torch.tensor(COLD, device=DEVICE), integers(4, True, None), "octav").item()
    # The reference rounds each of its sums to float32.
    assert solved(x, 2.5) == pytest.approx(clip, rel=1e-6)


def test_counters_of_float32_hold_what_a_replica_gets(monkeypatch):
    x = torch.full((1300,), 1.9, device=DEVICE)
    # 4 programs of 3 tiles and less, a counter that holds 600 elements: each needs a replica of its own.
    monkeypatch.setattr(kernel, "program_count", lambda x, block: 4)
    monkeypatch.setattr(kernel, "REPLICAS", 1)
    monkeypatch.setattr(kernel, "PACKED", 600)
    assert solved(x, 2.0, block=128) == pytest.approx(expected(x), rel=EXACT)
    # 3 tiles of 128 do not fit 300: another solve has to.
    monkeypatch.setattr(kernel, "PACKED", 300)
    out = torch.empty((), device=DEVICE)
    assert not kernel.solve_tail(x, torch.tensor(2.0, device=DEVICE), 4, True, out=out, block=128)


def test_what_others_do_is_declined():
    x, hint, out = torch.randn(4, device=DEVICE), torch.tensor(1.0, device=DEVICE), torch.empty((), device=DEVICE)
    assert not kernel.solve_tail(x.double(), hint, 4, True, out=out)
    assert not kernel.solve_tail(x, hint, 4, True, out=out.double())
    huge = torch.empty(1, dtype=torch.bfloat16, device=DEVICE).expand(2**31)
    assert not kernel.solve_tail(huge, hint, 4, True, out=out)
