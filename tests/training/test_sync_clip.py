"""Config(sync_clip=True): ranks with parts of a batch find the clip of all of it; two processes, gloo."""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import octav_fx
from octav_fx import Config, OctavError, quantize
from octav_fx.clips.methods import SYNCED
from octav_fx.formats.grid import Grid
from octav_fx.formats.packing import integer_codes
from octav_fx.formats.scales import SCALES
from octav_fx.formats.spec import integers, spec_of
from octav_fx.nn import FakeQuantizer, Settings
from octav_fx.ops.optimal_clip.op import optimal_clip
from tests.support.nets import ConvNet as Net
from tests.support.ranks import same_everywhere, spawn
from tests.support.settings import settings_of

# Sums of a few thousand float32, in parts: some 2**-24 * log2(4096) = 7e-7 of them, twice, and the same of the clip.
CLOSE = {"rtol": 2e-6, "atol": 0}
# How the first axis of 100 is split: with halves, with unequal parts, with nothing on one rank.
PARTS = [50, 93, 0]


def solve(rank: int) -> None:
    for method in SYNCED:
        for signed in (True, False):
            for bits in (2, 4, 8):
                for first in PARTS:
                    torch.manual_seed(bits)
                    x = 3 * torch.randn(100, 40) if signed else torch.randn(100, 40).relu()
                    grid, part = Grid(bits, signed), x[:first] if rank == 0 else x[first:]
                    quantizer = FakeQuantizer(settings_of(bits, signed, None, method, "pwl", sync=True), running=True)
                    # Whatever it is, and another one on each rank.
                    quantizer.hint.fill_(0.7 * rank)
                    y, name = quantizer(part), f"{method} {signed} {bits} {first}"
                    expected = optimal_clip(x, torch.tensor(0.0), integers(bits, signed, None), method)
                    torch.testing.assert_close(quantizer.hint, expected, **CLOSE, msg=name)
                    assert same_everywhere(quantizer.hint)
                    assert same_everywhere(quantizer.mean)
                    if signed:
                        codes = integer_codes(part, quantizer.hint, grid, None)
                        assert torch.equal(codes, integer_codes(part, expected, grid, None)), name
                        assert torch.equal(y, codes * grid.step(quantizer.hint)), name


@pytest.mark.ranks
def test_each_rank_finds_the_clip_and_the_codes_of_the_whole():
    spawn(solve)


def store(rank: int) -> None:
    torch.manual_seed(0)
    x = 3 * torch.randn(100, 40)
    for form in ("int4", "uint4", "e2m1"):
        for scale in SCALES:
            for method in SYNCED if form != "e2m1" else ("max",):
                spec = spec_of(f"{form}/tensor/{scale}")
                quantizer, name = FakeQuantizer(Settings(spec, method, "pwl", sync=True)), f"{spec} {method}"
                quantizer(x[rank::2])
                assert same_everywhere(quantizer.hint)
                expected = optimal_clip(x, torch.tensor(0.0), str(spec), method)
                # Beside float32 a scale has so few numbers that what is left of the order of sums is rounded away.
                close = CLOSE if scale == "float32" else {"rtol": 0, "atol": 0}
                torch.testing.assert_close(quantizer.hint, expected, **close, msg=name)


@pytest.mark.ranks
def test_the_clip_of_all_ranks_is_a_number_of_the_format_of_scales():
    spawn(store)


def special(rank: int) -> None:
    for method in SYNCED:
        settings = settings_of(4, True, None, method, "pwl", sync=True)
        # What is not finite on one rank takes part on none; nor do zeros.
        torch.manual_seed(0)
        x = torch.randn(1000)
        bad = torch.cat([x[:500], torch.tensor([torch.inf, torch.nan])]) if rank else x[500:]
        quantizer = FakeQuantizer(settings)
        y = quantizer(bad)
        torch.testing.assert_close(
            quantizer.hint, optimal_clip(x, torch.tensor(0.0), integers(4, True, None), method), **CLOSE
        )
        assert torch.equal(y.isfinite(), bad.isfinite())
        for value in (torch.zeros(5), torch.empty(0), torch.full((3,), torch.nan)):
            quantizer(value)
            assert quantizer.hint.item() == 0
        # Magnitudes whose squares float32 does not hold, and of bfloat16.
        huge = x[rank::2] * 1e30
        quantizer(huge)
        torch.testing.assert_close(
            quantizer.hint, optimal_clip(x * 1e30, torch.tensor(0.0), integers(4, True, None), method), **CLOSE
        )
        half = x.bfloat16()
        assert quantizer(half[rank::2]).dtype is torch.bfloat16
        torch.testing.assert_close(
            quantizer.hint, optimal_clip(half, torch.tensor(0.0), integers(4, True, None), method), **CLOSE
        )


@pytest.mark.ranks
def test_what_is_not_finite_empty_huge_or_half_precise():
    spawn(special)


def counted(calls: list[int]):
    reduce = dist.all_reduce

    def all_reduce(*args, **kwargs):
        calls.append(1)
        return reduce(*args, **kwargs)

    return all_reduce


def count(rank: int) -> None:
    calls: list[int] = []
    with patch.object(dist, "all_reduce", counted(calls)):
        count_calls(rank, calls)


def count_calls(rank: int, calls: list[int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(100_000)
    for method, cold, warm in (("max", 1, 1), ("octav", 12, 4), ("octav-grid", 13, 5), ("octav-tight", 12, 5)):
        quantizer = FakeQuantizer(settings_of(4, True, None, method, "pwl", sync=True))
        for most in (cold, warm):
            calls.clear()
            quantizer(x[rank::2])
            assert 1 <= len(calls) <= most, (method, len(calls))
        # Alone, nothing is sent: eval mode, and what only one rank runs.
        calls.clear()
        quantizer.eval()(x)
        assert not calls


@pytest.mark.ranks
def test_how_many_collectives_there_are():
    spawn(count)


class Forked(nn.Module):
    """Two layers that read one value, so that independent solves follow each other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.b(self.a(x)) + self.b(x)


def clips(q: nn.Module) -> dict[str, Tensor]:
    return {name: m.hint.clone() for name, m in q.named_modules() if isinstance(m, FakeQuantizer)}


def train(rank: int, clip: str, compiled: bool) -> None:
    torch.manual_seed(0)
    model, x = Forked(), torch.randn(64, 16)
    q = quantize(model, x[rank * 32 :][:32], Config(clip=clip, sync_clip=True))
    alone = quantize(model, x, Config(clip=clip))
    # One rank by itself: nothing waits for the other.
    if rank == 0:
        octav_fx.table(q)
        octav_fx.calibrate(q, [x[:32]])
        q.eval()(x)
        q.train()
    wrapped = DistributedDataParallel(q)
    run = torch.compile(wrapped, backend="octav") if compiled else wrapped
    y = run(x[rank * 32 :][:32])
    expected = alone(x)
    # A matmul of half the rows may add up in another order, and so may one after it.
    for name, value in clips(q).items():
        torch.testing.assert_close(value, clips(alone)[name], rtol=1e-5, atol=0, msg=name)
    torch.testing.assert_close(y, expected[rank * 32 :][:32], rtol=1e-4, atol=1e-5)
    y.square().mean().backward()
    expected.square().mean().backward()
    for one, two in zip(q.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.ranks
@pytest.mark.parametrize("clip", SYNCED)
def test_a_step_of_two_ranks_is_the_step_of_the_whole_batch(clip):
    spawn(train, clip, False)


@pytest.mark.ranks
def test_a_compiled_step_is_the_same():
    spawn(train, "octav", True)


def train_by_row(rank: int, config: Config) -> None:
    torch.manual_seed(0)
    model, x = Forked(), torch.randn(64, 16)
    q, alone = quantize(model, x[rank * 32 :][:32], config), quantize(model, x, config)
    # A row is whole on its rank, so there is nothing to agree on.
    assert not any(m.settings.sync for m in q.modules() if isinstance(m, FakeQuantizer))
    wrapped = DistributedDataParallel(q)
    y, expected = wrapped(x[rank * 32 :][:32]), alone(x)
    # A matmul of half the rows may add up in another order.
    torch.testing.assert_close(y, expected[rank * 32 :][:32], rtol=1e-4, atol=1e-5)
    y.square().mean().backward()
    expected.square().mean().backward()
    for one, two in zip(q.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.ranks
@pytest.mark.parametrize("granularity", ["token", "group-8"])
def test_rows_need_no_collective(granularity):
    config = Config(activation_granularity=granularity, weight_granularity="group-8", edge_bits=None, sync_clip=True)
    spawn(train_by_row, config)


def test_without_other_processes_nothing_changes():
    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 3, 8, 8)
    all_reduced_clip, plain = quantize(model, x, Config(sync_clip=True)), quantize(model, x)
    assert torch.equal(all_reduced_clip(x), plain(x))
    assert all_reduced_clip.quantizers.conv_input.settings.sync
    # Weights are the same on every rank.
    assert not all_reduced_clip.quantizers.conv_weight.settings.sync


@pytest.mark.parametrize("clip", ["percentile", "percentile-99.99", "mse"])
def test_methods_that_need_all_values_are_refused(clip):
    with pytest.raises(OctavError, match=f"sync_clip=True with clip='{clip}', which needs all values in one place"):
        Config(clip=clip, sync_clip=True)
    with pytest.raises(OctavError, match="needs all values in one place"):
        Config(sync_clip=True, overrides={"fc": {"clip": clip}})


@pytest.mark.parametrize("clip", ["pact", "lsq"])
def test_learned_clips_are_the_same_everywhere_anyhow(clip):
    q = quantize(Net(), torch.randn(4, 3, 8, 8), Config(clip=clip, sync_clip=True))
    assert not any(m.settings.sync for m in q.modules() if isinstance(m, FakeQuantizer))


def test_a_float_model_that_is_compiled_cannot_have_it():
    compiled = torch.compile(Net(), backend="octav", options={"sync_clip": True})
    with pytest.raises(OctavError, match=r"sync_clip=True: .* compile what octav_fx\.quantize returned"):
        compiled(torch.randn(4, 3, 8, 8))
