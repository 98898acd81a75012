"""solve_by_one_step: sums in place of a solve, and how far their clips are from the exact ones."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import octav_fx
from octav_fx.clips.newton import mean_magnitude, octav_step, squared_error
from octav_fx.formats.grid import Grid
from octav_fx.formats.spec import integers
from octav_fx.nn import FakeQuantizer
from octav_fx.ops.optimal_clip.one_step import one_step
from octav_fx.ops.optimal_clip.op import optimal_clip
from octav_fx.passes import lower_passes, solve_by_one_step, split_quantizers
from tests.support.joint import after_relu, joint, layer_inputs, linear, lower, quantized, targets, weight

octav, aten = torch.ops.octav, torch.ops.aten
# Sums of n numbers in other orders, n * 2**-24 of their sum at most, here far less.
ORDER = {"rtol": 1e-5, "atol": 0.0}


@pytest.mark.parametrize("dims", [None, [0], [1, 2]])
@pytest.mark.parametrize(("bits", "signed"), [(4, True), (8, False)])
def test_it_is_a_step_of_the_recursion(bits: int, signed: bool, dims: list[int] | None) -> None:
    torch.manual_seed(0)
    x, grid = torch.randn(5, 6, 7), Grid(bits, signed)
    numerator, denominator = octav_step(x.reshape(1, -1), torch.tensor([1.5]), grid)
    found = one_step(x, torch.tensor(1.5), integers(bits, signed, None), "octav", dims)
    torch.testing.assert_close(found, (numerator / denominator).squeeze(0), **ORDER)


def test_where_it_begins_and_how_far_it_falls() -> None:
    x = torch.randn(100)
    mean = mean_magnitude(x.unsqueeze(0), Grid(4, True)).squeeze(0)
    torch.testing.assert_close(one_step(x, torch.tensor(0.0), "int4/tensor", "octav"), mean, **ORDER)
    assert one_step(x, torch.tensor(1e6), "int4/tensor", "octav") == x.abs().max()
    assert one_step(x, 1.01 * x.abs().max(), "int8/tensor", "octav") == torch.tensor(0.9) * (1.01 * x.abs().max())
    for hint in (0.0, 1.0):
        assert one_step(torch.zeros(3), torch.tensor(hint), "int4/tensor", "octav") == 0


@pytest.mark.parametrize("method", ["octav", "octav-tight"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_calls_come_to_the_exact_clip(bits: int, method: str) -> None:
    torch.manual_seed(0)
    x, clip = torch.randn(20_000), torch.tensor(0.0)
    spec = integers(bits, True, None)
    for _ in range(12):
        clip = one_step(x, clip, spec, method)
    torch.testing.assert_close(clip, optimal_clip(x, torch.tensor(0.0), spec, method), rtol=1e-4, atol=0.0)


# What is left of a distance, and the squared error beside that of the exact clip.
@pytest.mark.parametrize(("ratio", "left", "worse"), [(0.9, 0.05, 1.1), (0.95, 0.02, 1.05), (1.05, 0.06, 1.06)])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_how_far_it_is_from_the_exact_clip(bits: int, ratio: float, left: float, worse: float) -> None:
    torch.manual_seed(0)
    x, spec, grid = torch.randn(20_000), integers(bits, True, None), Grid(bits, True)
    exact = optimal_clip(x, torch.tensor(0.0), spec, "octav")
    found = one_step(x, ratio * exact, spec, "octav")
    assert abs(found / exact - 1) < left
    before, after = (squared_error(x.unsqueeze(0), clip.unsqueeze(0), grid) for clip in (exact, found))
    assert after < worse * before


def test_graphs() -> None:
    for function in (linear(), after_relu):
        gm = joint(function, *layer_inputs())
        lower(gm, split_quantizers)
        assert [(edit.verb, edit.detail) for edit in lower(gm, solve_by_one_step)] == [("one step", "octav")]
        assert octav.optimal_clip.default not in targets(gm)
        assert lower(gm, solve_by_one_step) == []


def rows_summed(function: Callable[[Tensor], Tensor], x: Tensor) -> list[int]:
    """Of which axes the sums come first when what function computes of x is quantized."""
    gm = joint(lambda x, hint: (quantized(function(x), hint),), x.requires_grad_(), torch.ones(()))
    lower(gm, split_quantizers, solve_by_one_step)
    # amax is the only one that no norm has.
    first, second = gm.graph.find_nodes(op="call_function", target=aten.amax.default)
    assert second.args == (first,)
    axes: list[int] = first.args[1]
    return axes


def test_rows_are_those_of_the_kernel_that_computes_x() -> None:
    tokens, image = torch.randn(2, 9, 64), torch.randn(2, 64, 16, 16)
    assert rows_summed(torch.relu, tokens) == [1, 2]
    assert rows_summed(lambda x: nn.functional.layer_norm(x, (64,)), tokens) == [2]
    # Of 256 positions, and of 8 with their 64 channels.
    assert rows_summed(torch.relu, image) == [1, 2, 3]
    assert rows_summed(torch.relu, image.to(memory_format=torch.channels_last)) == [1, 3]
    assert rows_summed(torch.relu, torch.randn(2, 1, 1, 1024)) == [3]


def test_clips_of_channels_are_solved() -> None:
    def of_weight(x: Tensor, u: Tensor, w: Tensor, hint: Tensor) -> tuple[Tensor]:
        return (x @ weight(w, torch.ones(4)).T,)

    gm = joint(of_weight, *layer_inputs())
    lower(gm, split_quantizers)
    assert lower(gm, solve_by_one_step) == []


def test_it_runs_where_it_is_asked_for() -> None:
    assert solve_by_one_step not in lower_passes()
    assert solve_by_one_step in lower_passes(solve="step")


@pytest.mark.compile
def test_clips_of_a_training_run_are_near_the_exact_ones() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    )
    q = octav_fx.quantize(model, torch.randn(64, 16), octav_fx.Config(edge_bits=None))
    q(torch.randn(64, 16))
    compiled: Any = torch.compile(q, backend="octav", options={"solve": "step"})
    optimizer = torch.optim.SGD(q.parameters(), 0.05)
    quantizers = {
        name: module for name, module in q.named_modules() if isinstance(module, FakeQuantizer) and module.running
    }
    assert len(quantizers) == 3
    for _ in range(20):
        batch, target = torch.randn(512, 16), torch.randn(512, 4)
        exact = copy.deepcopy(q)
        nn.functional.mse_loss(compiled(batch), target).backward()
        # Eager solves exactly. What a quantizer reads differs by the clips before it, which are off by as little.
        exact(batch)
        for name, quantizer in quantizers.items():
            expected = exact.get_submodule(name).hint
            assert abs(quantizer.hint / expected - 1) < 0.03
        optimizer.step()
        optimizer.zero_grad()
