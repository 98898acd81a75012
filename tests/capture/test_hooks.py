"""Hooks and computed weights: the layer is quantized, with the weight that it would have multiplied by."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import octav_fx
from tests.support.alike import quantized_alike
from tests.support.graphs import model

X, Y = (torch.randn(2, 8, 9),), (torch.randn(3, 8, 7),)


def linear() -> nn.Linear:
    return nn.Linear(8, 8)


def conv() -> nn.Conv1d:
    return nn.Conv1d(8, 8, 3, padding=1, padding_mode="circular")


def pruned(layer: nn.Module) -> nn.Module:
    prune.l1_unstructured(layer, "weight", 0.5)
    return prune.random_unstructured(layer, "weight", 0.2)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


# Each with the layers that multiply to compute a weight.
COMPUTED: dict[str, tuple[Callable[[Any], nn.Module], bool]] = {
    "old weight_norm": (nn.utils.weight_norm, False),
    "old spectral_norm": (nn.utils.spectral_norm, True),
    "prune": (pruned, False),
    "pruned and normed": (lambda layer: nn.utils.weight_norm(prune.identity(layer, "bias")), False),
    "weight_norm": (parametrizations.weight_norm, False),
    "spectral_norm": (parametrizations.spectral_norm, True),
    "of one's own": (lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()), False),
}


@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize("layer", [linear, conv])
def test_the_weight_that_is_multiplied_is_quantized(name: str, layer: Callable[[], nn.Module]) -> None:
    compute, multiplies = COMPUTED[name]

    def made() -> nn.Module:
        torch.manual_seed(0)
        is_conv = layer is conv
        return model(lambda s, x: s.a(x if is_conv else x.transpose(1, 2)), a=compute(layer()))

    q = quantized_alike(made, X, Y)
    found = octav_fx.rows(q, X)
    assert {(row.operand, row.granularity) for row in found if row.bits} == {
        ("input", "tensor"),
        ("weight", "channel 0"),
    }
    assert [row.reason is not None for row in found if not row.bits] == [True] * multiplies


@pytest.mark.parametrize("name", COMPUTED)
def test_such_a_model_is_trained_frozen_and_converted(name: str) -> None:
    compute, _ = COMPUTED[name]
    q = octav_fx.quantize(model(lambda s, x: s.a(x), a=compute(linear())).train(), torch.randn(4, 8))
    x = torch.randn(4, 8)
    q(x).square().sum().backward()
    q = copy.deepcopy(q).eval()
    octav_fx.freeze(octav_fx.calibrate(q, [(x,)]))
    converted = octav_fx.convert(q, integers=False)
    # Codes at a tie may differ by one: a step of the input times a weight.
    torch.testing.assert_close(converted(x), q(x), rtol=0, atol=float(q(x).abs().max()) / 8)


def test_work_of_a_parametrization_is_its_own_row() -> None:
    layer = parametrizations.orthogonal(nn.Linear(16, 16))
    covered = octav_fx.coverage(octav_fx.quantize(nn.Sequential(layer), torch.randn(4, 16)))
    ((site, reason, macs),) = covered.skipped
    assert (site, reason) == ("0.parametrizations.weight", "no rule for ParametrizationList")
    assert covered.quantized_macs == 4 * 16 * 16 and covered.total_macs == covered.quantized_macs + macs


def changed(layer: nn.Module, calls: list[str]) -> nn.Module:
    """With hooks of every kind, which count their calls."""

    def before(module: nn.Module, args: Any) -> Any:
        calls.append("before")
        return args[0] * 2

    def before_by_keyword(module: nn.Module, args: Any, kwargs: Any) -> Any:
        calls.append("before by keyword")
        return (args[0] + 1,), kwargs

    def behind(module: nn.Module, args: Any, y: Tensor) -> Any:
        calls.append("behind")
        return y * args[0].mean()

    layer.register_forward_pre_hook(before)
    layer.register_forward_pre_hook(before_by_keyword, with_kwargs=True)
    layer.register_forward_hook(behind)
    layer.register_forward_hook(lambda module, args, kwargs, y: None, with_kwargs=True)
    return layer


@pytest.mark.parametrize("layer", [linear, lambda: nn.utils.weight_norm(nn.Linear(8, 8))])
def test_hooks_run_around_a_layer_that_is_quantized(layer: Callable[[], nn.Module]) -> None:
    calls: list[str] = []

    def made() -> nn.Module:
        torch.manual_seed(0)
        return model(lambda s, x: s.a(x), a=changed(layer(), calls))

    q = quantized_alike(made, (torch.randn(4, 8),), (torch.randn(3, 8),))
    assert octav_fx.coverage(q).skipped == []
    calls.clear()
    q(torch.randn(2, 8))
    assert calls == ["before", "before by keyword", "behind"]


class Kept(nn.Module):
    """Reads what a hook of a layer keeps: features."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.features = nn.Linear(8, 8), nn.Linear(8, 8), dict[str, Tensor]()
        self.a.register_forward_hook(lambda module, args, y: self.features.__setitem__("a", y))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) + self.features["a"].mean()


@pytest.mark.slow
def test_what_a_hook_keeps_is_that_of_the_call() -> None:
    q = quantized_alike(Kept, (torch.randn(4, 8),), (torch.randn(3, 8),), parts=True)
    assert "what a hook of a layer has kept" in octav_fx.table(q) and octav_fx.coverage(q).share == 1


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize("place", ["", "0", "2"])
def test_backward_hooks_run_and_change_what_they_change_in_float(register: str, place: str) -> None:
    seen: list[str] = []

    def made(hooked: bool) -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        if hooked:
            layer: Any = net.get_submodule(place)
            getattr(layer, register)(lambda module, given, *_: seen.append(type(module).__name__) or (2 * given[0],))
        return net

    x = torch.randn(4, 8, requires_grad=True)
    q, plain = octav_fx.quantize(made(True), x), octav_fx.quantize(made(False), x)
    assert octav_fx.coverage(q) == octav_fx.coverage(plain)
    # The clips, signs and widths of one graph of the whole.
    assert torch.equal(q(x), plain(x))
    seen.clear()
    gradients = [torch.autograd.grad(each(x).square().sum(), x)[0] for each in (q, plain)]
    assert seen == ["Linear" if place else "Sequential"]
    assert torch.equal(gradients[0], 2 * gradients[1])


def test_a_backward_hook_on_one_of_the_leaves_runs_too() -> None:
    seen: list[nn.Module] = []

    class Own(nn.Linear):
        pass

    layer = Own(8, 8)
    layer.register_full_backward_hook(lambda module, *_: seen.append(module))
    q = octav_fx.quantize(nn.Sequential(nn.Linear(8, 8), layer), torch.randn(2, 8), leaves=[Own])
    assert [(site, reason) for site, reason, _ in octav_fx.coverage(q).skipped] == [("1", "one of the leaves")]
    seen.clear()
    q(torch.randn(2, 8)).sum().backward()
    assert seen == [q[1]]
