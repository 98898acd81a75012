"""Each format with each granularity, on a net of three small layers: what holds for integers holds for all of them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import octav_fx
from octav_fx import Config, quantize
from octav_fx.formats.registry import CODEBOOKS
from octav_fx.nn import FakeQuantizer, IntegerWeight, StoredWeight
from octav_fx.ops.quantize.reference import quantize as codes_of

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


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))


def config_of(name: str) -> Config:
    fields, (weights, activations, scale) = CASES[name]
    shared = {"weight_granularity": weights, "activation_granularity": activations, "scale_format": scale}
    return Config(**fields, **shared, edge_bits=None)


@pytest.mark.parametrize("name", CASES)
def test_it_trains_restarts_freezes_and_converts_to_the_same_codes(name: str) -> None:
    model, config, x = net(), config_of(name), torch.randn(6, 16)
    q = quantize(model, x, config)
    assert list(q.state_dict()) == list(model.state_dict())
    q(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in q.parameters())
    restarted = quantize(net(), x, config)
    restarted.load_state_dict(q.state_dict())
    # From its last clips or from none.
    torch.testing.assert_close(restarted(x), q(x), rtol=1e-5, atol=1e-6)

    octav_fx.freeze(q).eval()
    found = q(x)
    again = quantize(net(), x, config).eval()
    again.load_state_dict(q.state_dict())
    assert torch.equal(again(x), found)
    converted = octav_fx.convert(q, integers=False)
    assert torch.equal(converted(x), found)
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
