"""All passes of LOWER and FUSE on quantizers of any format, rows, scales, clip and gradient: results stay the same."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.nn import functional as F

from octav_fx.clips.gradients import GRADIENTS
from octav_fx.clips.learned import LEARNED
from octav_fx.clips.methods import METHODS
from octav_fx.formats.registry import CODEBOOKS
from octav_fx.formats.scales import SCALES
from octav_fx.formats.spec import Spec, spec_of
from octav_fx.ops.dynamic_fake_quantize.op import dynamic_fake_quantize
from octav_fx.ops.learned_fake_quantize.op import learned_fake_quantize
from octav_fx.passes import FUSE, lower_passes
from tests.support.joint import joint, leaf, lower, results

SIGNED = [*(f"int{bits}" for bits in range(2, 9)), "int8-narrow", *CODEBOOKS, "kmeans3"]
UNSIGNED = [f"uint{bits}" for bits in range(2, 9)]
# In one graph.
CASES = 16
# What comes before the quantizer: of both signs, none below zero, none above six.
BEFORE: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
}
# What each layer sums over is axis 1 of both operands.
LAYERS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "linear": (F.linear, (6, 16), (8, 16)),
    "conv": (F.conv2d, (2, 8, 4, 4), (8, 8, 2, 2)),
    "grouped": (lambda x, w: F.conv2d(x, w, groups=2), (2, 16, 4, 4), (8, 8, 2, 2)),
}


def settings(chance: random.Random, forms: list[str], shared: list[str]) -> tuple[Spec, str, str]:
    """A spec, a method that takes it, and a gradient."""
    form, gradient = chance.choice(forms), chance.choice([*GRADIENTS])
    if form.startswith("kmeans"):
        return spec_of(f"{form}/tensor"), "octav", gradient
    rows = chance.choice(shared)
    is_even = form in {*SIGNED[:7], *UNSIGNED}
    methods = [method for method in METHODS if is_even or not METHODS[method].even]
    method = chance.choice([*methods, *([] if rows.startswith("token") else LEARNED)])
    if method in LEARNED:
        return spec_of(f"{form}/{rows}"), method, "pwl"
    return spec_of(f"{form}/{rows}/{chance.choice([*SCALES])}"), method, gradient


def rounded(x: Tensor, state: Tensor, spec: Spec, method: str, gradient: str, is_data: bool) -> Tensor:
    if method in LEARNED:
        return learned_fake_quantize(x, state, str(spec), method, is_data)
    y, _ = dynamic_fake_quantize(x, state, str(spec), method, gradient)
    return y


def state_of(spec: Spec, method: str, shape: tuple[int, ...]) -> Tensor:
    """A hint, which says nothing yet, or a parameter."""
    if method in LEARNED:
        return torch.full(spec.clip_shape(shape), 0.8 if method == "pact" else 0.8 / spec.format.steps).requires_grad_()
    return torch.zeros(() if spec.granularity.is_short else spec.clip_shape(shape))


def in_halves(gm: fx.GraphModule, inputs: tuple[Tensor, ...]) -> list[Tensor | None]:
    """What results() returns, of the two halves that the partitioner makes, each after the passes of FUSE."""
    forward, backward = min_cut_rematerialization_partition(gm, None, num_fwd_outputs=CASES)
    for half in (forward, backward):
        lower(half, *FUSE)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        found = forward(*inputs)
        outputs, saved = found[:CASES], found[CASES:]
        return [*outputs, *backward(*saved, *(torch.randn(y.shape, generator=generator) for y in outputs))]


Case = tuple[str, str, tuple[Spec, str, str], tuple[Spec, str, str]]


def drawn(chance: random.Random) -> Case:
    """A layer, what comes before it, and how its input and its weight are quantized."""
    before = chance.choice([*BEFORE])
    # Signed grids are for anything.
    forms = [*SIGNED, *UNSIGNED] if before.startswith("relu") else SIGNED
    activation = settings(chance, forms, ["tensor", "token.1", "group-4.1"])
    return chance.choice([*LAYERS]), before, activation, settings(chance, SIGNED, ["tensor", "channel.0", "group-4.1"])


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["codes", "levels"])
@pytest.mark.parametrize("seed", range(3))
def test_lowered_they_compute_the_same(seed: int, keep: str) -> None:
    chance = random.Random(f"{seed} {keep}")
    cases = [drawn(chance) for _ in range(CASES)]
    inputs: list[Tensor] = []
    for layer, _, activation, weight in cases:
        _, shape, of_weight = LAYERS[layer]
        inputs += leaf(*shape), leaf(*of_weight), state_of(*activation[:2], shape), state_of(*weight[:2], of_weight)

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = []
        for i, (layer, before, activation, weight) in enumerate(cases):
            x, w, state, of_weight = inputs[4 * i : 4 * i + 4]
            # Beyond the ceiling of a relu6, too.
            read = rounded(BEFORE[before](x * 4), state, *activation, True)
            outputs.append(LAYERS[layer][0](read, rounded(w, of_weight, *weight, False)))
        return tuple(outputs)

    gm = joint(function, *inputs)
    expected = results(gm, tuple(inputs))
    lower(gm, *lower_passes(keep=keep))
    assert_same(results(gm, tuple(inputs)), expected)
    assert_same(in_halves(gm, tuple(inputs)), expected)


def assert_same(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for one, two in zip(found, expected, strict=True):
        assert (one is None) == (two is None)
        if one is not None and two is not None:
            # A convolution of filters that lie channels last adds up in another order: at most 32 products, rounded on
            # both sides. A code more or less is some hundredth of the largest number at 8 bits.
            torch.testing.assert_close(one, two, rtol=0, atol=64 * 2.0**-24 * float(two.abs().max()))
