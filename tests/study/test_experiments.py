"""Experiments change the clips that they name, and nothing else."""

from dataclasses import replace

import pytest
import torch

from benchmarks.study import experiments, recipes, train
from benchmarks.study.data import VALIDATION
from benchmarks.study.run import Run
from octav_fx.formats.granularity import Granularity
from octav_fx.formats.grid import Grid
from octav_fx.formats.spec import Spec
from octav_fx.nn import FakeQuantizer
from octav_fx.nn.fake_quantizer import Settings

GROUPS = Spec(Grid(4, signed=True), Granularity("group", 1, 32))


@pytest.fixture
def x():
    return torch.randn(6, 64, generator=torch.Generator().manual_seed(0))


def quantizer(method="octav", running=False):
    return FakeQuantizer(Settings(GROUPS, method, "mad"), (6, 2), running=running)


def changed(name, method="octav", running=False):
    made = torch.nn.Module()
    made.quantizer = quantizer(method, running)
    experiments.apply(made, name)
    return made.quantizer


@pytest.mark.parametrize(("name", "method"), [("max", "max"), ("tight", "octav-tight")])
def test_weights_or_activations_alone_have_the_clips_of_another_method(x, name, method):
    other, plain = quantizer(method)(x), quantizer()(x)
    assert not torch.equal(other, plain)
    for role, running in (("weights", False), ("activations", True)):
        # A kernel may add up in another order.
        torch.testing.assert_close(changed(f"{name}-{role}", running=running)(x), other, rtol=1e-6, atol=0)
        assert torch.equal(changed(f"{name}-{role}", running=not running)(x), plain)


def test_what_is_clipped_is_not_rounded_and_what_is_rounded_is_not_clipped(x):
    x = 3 * x
    clip = torch.ops.octav.optimal_clip(x, torch.zeros(6, 2), str(GROUPS), "octav-tight").repeat_interleave(32, 1)
    assert (x.abs() > clip).any()
    # Half a step of 8 bits; the highest level is a whole one, clip / 128, below the clip.
    clipped = changed("clipped", "octav-tight")(x)
    assert ((clipped - x.clamp(-clip, clip)).abs() <= clip / 127).all()
    assert torch.equal(changed("rounded", "octav-tight")(x), (x / (clip / 8)).round() * (clip / 8))


def test_smoothed_clips_follow_in_training_alone(x):
    made = changed("smoothed-weights", "max").train()
    first = x.unflatten(1, (2, 32)).abs().amax(-1).flatten()
    made(x)
    assert torch.equal(made.smooth, first)
    made.eval()(2 * x)
    assert torch.equal(made.smooth, first)
    made.train()(2 * x)
    assert torch.equal(made.smooth, first.lerp(2 * first, 0.05))
    # A run that goes on has them from its checkpoint.
    again = changed("smoothed-weights", "max")
    again.load_state_dict(made.state_dict(), strict=True)
    assert torch.equal(again.eval()(x), made.eval()(x))


def test_an_error_counts_as_much_as_the_square_of_its_gradient(x):
    made, weight = changed("weighted-weights"), torch.nn.Parameter(x)
    first = made(weight)
    assert torch.equal(first, quantizer()(x))
    # Everything hangs on one weight of each group, which then has no error to speak of.
    alone = torch.zeros_like(x)
    alone[:, ::32] = 1
    (first * alone).sum().backward()
    second = made(weight)
    assert ((second - x).abs() * alone).sum() < 0.2 * ((first - x).abs() * alone).sum()
    assert (second - x).square().sum() > (first - x).square().sum()


def test_jitter_is_a_tenth_at_most_and_the_same_for_the_same_clips(x):
    clips = torch.rand(1000, generator=torch.Generator().manual_seed(1)) + 0.5
    ratio = experiments.jittered(quantizer(), x, clips) / clips
    assert 0.9 <= ratio.min() < 0.91 and 1.09 < ratio.max() <= 1.1 and 0.06 < ratio.std() < 0.08
    assert torch.equal(ratio, experiments.jittered(quantizer(), x, clips) / clips)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["weighted-weights", "jittered", "rounded"])
def test_an_experiment_reaches_what_has_few_bits_alone(name):
    run = Run(
        "text", "transformer", "octav", weight_granularity="group-32", activation_granularity="token", size="tiny"
    )
    run = replace(run, judged=VALIDATION, experiment=name)
    recipe = recipes.of(run)
    data = recipe.data(0, VALIDATION)
    model = train.prepared(run, recipe, data, None)
    x, _ = data.batch(0)
    model(x[:2]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    bits = {m.spec.format.bits for m in model.modules() if isinstance(m, FakeQuantizer) and hasattr(m, "smooth")}
    assert bits == {4}
