"""Each format with each granularity, on nets of small layers: what holds for integers holds for all of them."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import octav_fx
from octav_fx import Config, quantize
from octav_fx.config import PRESETS
from octav_fx.formats.registry import CODEBOOKS
from octav_fx.formats.spec import spec_of
from octav_fx.nn import FakeQuantizer, IntegerWeight, StoredWeight
from octav_fx.ops.quantize.reference import quantize as codes_of
from tests.support.ranks import RANKS, same_everywhere, spawn

FORMATS: dict[str, dict[str, Any]] = {
    **{f"{bits} bits": {"weight_bits": bits, "activation_bits": bits} for bits in range(2, 9)},
    "narrow": {"weight_bits": 8, "activation_bits": 8, "narrow_weights": True, "signed_activations": True},
    **{name: {"weight_format": name, "activation_format": name} for name in CODEBOOKS},
}
# Of weights, of activations, and what scales are.
SHARED = [("tensor", "tensor", "float32"), ("channel", "token", "bfloat16"), ("group-8", "group-8", "e8m0")]
SHARED += [("group-4", "token", "e4m3")]
CASES = {
    # Two of the four for each format: each takes a tenth of a second.
    **{
        f"{name}, {'/'.join(shared)}": (fields, shared)
        for i, (name, fields) in enumerate(FORMATS.items())
        for shared in (SHARED[i % 4], SHARED[(i + 1) % 4])
    },
    **{
        f"kmeans, {bits} bits": (
            {"weight_format": "kmeans", "activation_format": "kmeans", "weight_bits": bits, "activation_bits": bits},
            SHARED[0],
        )
        for bits in (2, 3, 4)
    },
}


# Of the presets' longest groups.
LONGEST = 128


def net(features: int = 16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(features, 8), nn.ReLU(), nn.Linear(8, features), nn.GELU(), nn.Linear(features, 4))


# These are in the state, and begin with data.
LEARNED_CASES: dict[str, tuple[dict[str, Any], tuple[str, str, str]]] = {
    "lsq of groups": ({"clip": "lsq"}, ("group-4", "tensor", "float32")),
    "lsq of channels, e2m1": ({"clip": "lsq", "weight_format": "e2m1"}, ("channel", "tensor", "float32")),
    "pact, nf4": ({"clip": "pact", "activation_format": "nf4"}, ("group-8", "tensor", "float32")),
}


def fields_of(name: str) -> dict[str, Any]:
    fields, (weights, activations, scale) = {**CASES, **LEARNED_CASES}[name]
    return {**fields, "weight_granularity": weights, "activation_granularity": activations, "scale_format": scale}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_it_trains_restarts_freezes_and_converts_to_the_same_codes(name: str) -> None:
    lives(Config(**fields_of(name), edge_bits=None), 16, 0)


@pytest.mark.parametrize("name", PRESETS)
def test_so_does_each_preset(name: str) -> None:
    # Groups do not divide what the layer in the middle sums over. Where edges have other scales, what is converted adds
    # up codes and not levels: 128 products of magnitude one, rounded otherwise.
    lives(Config(**PRESETS[name], overrides={"2": None}), LONGEST, 128 * 2**-24)


def lives(config: Config, features: int, rounded: float) -> None:
    model, x = net(features), torch.randn(6, features)
    q = quantize(model, x, config)
    assert list(q.state_dict()) == list(model.state_dict())
    q(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in q.parameters())
    restarted = quantize(net(features), x, config)
    restarted.load_state_dict(q.state_dict())
    # From its last clips or from none.
    torch.testing.assert_close(restarted(x), q(x), rtol=1e-5, atol=1e-6)

    octav_fx.freeze(q).eval()
    found = q(x)
    again = quantize(net(features), x, config).eval()
    again.load_state_dict(q.state_dict())
    assert torch.equal(again(x), found)
    converted = octav_fx.convert(q, integers=False)
    torch.testing.assert_close(converted(x), found, rtol=0, atol=rounded)
    for path, part in converted.named_modules():
        if isinstance(part, (IntegerWeight, StoredWeight)):
            quantizer = q.get_submodule(path)
            assert isinstance(quantizer, FakeQuantizer) and quantizer.clip is not None
            codes = codes_of(weight_of(q, path), quantizer.clip, str(quantizer.spec))
            form = quantizer.spec.format
            # Beyond the clip are the codes for backward.
            assert torch.equal(part.integers().int(), codes.int().clamp(form.low, form.high))


def weight_of(q: nn.Module, path: str) -> Tensor:
    return q.get_parameter(f"{path.split('.')[-1].removesuffix('_weight')}.weight").detach()


class Each(nn.Module):
    """A layer for each case, with an input of its own: [cases, N, 16] -> [cases, N, 4]."""

    def __init__(self, cases: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 4) for _ in range(cases))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(rows) for layer, rows in zip(self.layers, x.unbind(), strict=True)])


def each(names: list[str]) -> tuple[nn.Module, Config]:
    torch.manual_seed(0)
    overrides = {f"layers.{i}": fields_of(name) for i, name in enumerate(names)}
    return Each(len(names)), Config(edge_bits=None, overrides=overrides)


@pytest.mark.compile
def test_compiled_in_one_graph_is_eager() -> None:
    # Each sixth, so that it takes seconds: integers, floating point, tables, and levels of each tensor. More are tried
    # without a compiler in tests/passes/lower/test_drawn.py.
    model, config = each([*list(CASES)[::6], "lsq of groups"])
    x = torch.randn(len(model.layers), 6, 16)
    eager, compiled = (quantize(model, x, config) for _ in range(2))
    results = [run(x) for run in (eager, torch.compile(compiled, backend="octav", fullgraph=True))]
    for y in results:
        y.square().sum().backward()
    # The same codes; 16 products, and in a gradient 6, are added up in any order.
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
    for one, two in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, rtol=1e-5, atol=1e-5)


def step_together(rank: int) -> None:
    names = [*CASES, *LEARNED_CASES]
    model, config = each(names)
    x = torch.randn(RANKS, len(names), 6, 16)
    # What is learned begins with the same data everywhere; of others the clip of the last call changes nothing.
    q = quantize(model, x[0], config)
    alone = [copy.deepcopy(q) for _ in range(RANKS)]
    for module, of_rank in zip(alone, x, strict=True):
        module(of_rank).square().mean().backward()
    wrapped = DistributedDataParallel(q)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    wrapped(x[rank]).square().mean().backward()
    grads = zip(*([p.grad for p in module.parameters()] for module in alone), strict=True)
    for p, (one, two) in zip(q.parameters(), grads, strict=True):
        # DDP divides before it adds.
        torch.testing.assert_close(p.grad, (one + two) / 2, rtol=1e-5, atol=1e-7)
    optimizer.step()
    assert all(same_everywhere(p.detach()) for p in q.parameters())


@pytest.mark.ranks
def test_a_step_on_two_ranks() -> None:
    spawn(step_together)


SPECS = [
    f"{name}/{shared}"
    for name in ("int2", "int4", "uint8", "int8-narrow", *CODEBOOKS)
    for shared in ("tensor", "channel.0", "token.1/bfloat16", "group-8.1/float16", "group-16.1/e4m3", "group-32.1/e8m0")
]


@pytest.mark.parametrize("spec", [*SPECS, "kmeans2/tensor", "kmeans4/tensor"])
def test_levels_and_gradients_are_those_of_float64(spec: str) -> None:
    x = torch.randn(6, 32)
    hint = torch.zeros(() if spec_of(spec).granularity.is_short else spec_of(spec).clip_shape(x.shape))
    for gradient in ("ste", "pwl", "mad"):
        results: list[tuple[Tensor, ...]] = []
        for dtype in (torch.float32, torch.float64):
            leaf = x.to(dtype, copy=True).requires_grad_()
            y, clip = torch.ops.octav.dynamic_fake_quantize(leaf, hint, spec, "max", gradient)
            y.backward(torch.ones_like(y))
            assert leaf.grad is not None
            results.append((y.detach().double(), clip, leaf.grad.double()))
        for one, two in zip(*results, strict=True):
            # One division and one product, rounded in float32.
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7, check_dtype=False)
