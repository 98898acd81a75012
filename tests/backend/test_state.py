"""Compiled converted models: what is not guarded may change all the same."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from octav_fx import Config, calibrate, convert, freeze, quantize
from tests.support.integers import needs_vnni

pytestmark = [pytest.mark.compile, pytest.mark.usefixtures("fresh_dynamo")]


class Net(nn.Module):
    """Two convolutions with a sum around the second, a layer norm that stays float, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] -> [N, 5]."""
        x = self.first(x).relu()
        x = (x + self.second(x)).relu()
        y: Tensor = self.head(self.norm(x.mean((2, 3))))
        return y


def converted(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return convert(freeze(calibrate(quantize(Net().eval(), images(), Config(8, 8, residual_bits=8)), [images()])))


def images() -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def compiled(model: nn.Module, guarded: list[str]) -> Any:
    """The compiled model, and the names of all that Dynamo guards."""

    def all_of(guards: Any) -> list[bool]:
        guarded.extend(guard.name for guard in guards)
        return [True] * len(guards)

    return torch.compile(model, backend="octav", options={"guard_filter_fn": all_of})


@needs_vnni
def test_constants_of_layers_on_codes_are_not_guarded() -> None:
    names: list[str] = []
    model = converted(1)
    with torch.no_grad():
        compiled(model, names)(images())
    held = {tuple(re.findall(r"\['(\w+)'\]", name)[-2:]) for name in names if "._buffers['" in name}
    # Codes of floats and levels are code that Inductor generates, which looks at nothing.
    assert held == {(name, "scale") for name in ("first_input", "mean_x", "head_input")}
    assert [name for name in names if "['norm']._parameters['weight']" in name]


@needs_vnni
def test_layers_are_called_past_the_dispatcher_at_any_batch() -> None:
    model, x = converted(1), images()
    function = torch.compile(model, backend="octav", dynamic=True)
    with torch.no_grad():
        _, codes = run_and_get_code(function, x)
        assert not re.findall(r"= torch\.ops\.octav\.integer_(?:conv|linear)\.", codes[0])
        assert len(re.findall(r"= bound_\w+\(", codes[0])) == 3
        for images_ in (x, x[:1], torch.cat([x, x, x])):
            assert torch.allclose(function(images_), model(images_), atol=1e-6)


def load(model: nn.Module, other: nn.Module) -> None:
    model.load_state_dict(other.state_dict())


def assign(model: nn.Module, other: nn.Module) -> None:
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)


@pytest.mark.parametrize("change", [load, assign])
def test_another_state_is_seen(change: Callable[[nn.Module, nn.Module], None]) -> None:
    model, other, x = converted(1), converted(2), images()
    function = compiled(model, [])
    with torch.no_grad():
        assert torch.allclose(function(x), model(x), atol=1e-6)
        change(model, other)
        assert not torch.allclose(other(x), converted(1)(x), atol=1e-3)
        assert torch.allclose(function(x), other(x), atol=1e-6)


def test_each_model_runs_its_own() -> None:
    models, x = [nn.Sequential(nn.Identity(), converted(seed)) for seed in (1, 2)], images()
    functions = [compiled(model, []) for model in models]
    with torch.no_grad():
        for _ in range(2):
            for function, model in zip(functions, models, strict=True):
                assert torch.allclose(function(x), model(x), atol=1e-6)
