"""A quantized model, its quantizers aside, beside the float one: results, gradients and state, on several inputs."""

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import octav_fx
from octav_fx.capture import transformed
from octav_fx.capture.rerun import without_quantizers
from octav_fx.capture.whole import WholeModule
from octav_fx.nn import FakeQuantizer

# Both run the same ops of torch on the same numbers; where a graph spells one otherwise (x @ w.T for inner), sums round
# in another order: so many units in the last place of float32, times the terms of the small sums here.
TOLERANCE = 64 * torch.finfo(torch.float32).eps


def tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def run(module: nn.Module, args: tuple[Any, ...]) -> Any:
    torch.manual_seed(1)
    # Of two arguments that are one tensor, one copy.
    return module(*pytree.tree_map_only(Tensor, functools.cache(torch.clone), args))


def gradients(module: nn.Module, results: list[Tensor]) -> dict[str, Tensor]:
    """The gradients of a scalar that tells the results' elements apart."""
    module.zero_grad()
    given = [result.abs() if result.is_complex() else result for result in results if result.requires_grad]
    if given:
        sum((y * y.detach().cos() + y).sum() for y in given).backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_close(what: str, found: Tensor, expected: Tensor) -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype), what
    if expected.is_floating_point() or expected.is_complex():
        limit = TOLERANCE * (1 + float(expected.detach().abs().max()) if expected.numel() else 1)
        torch.testing.assert_close(found, expected, rtol=0, atol=limit, equal_nan=True, msg=lambda m: f"{what}: {m}")
    else:
        assert torch.equal(found, expected), what


def assert_computes(q: nn.Module, float_model: nn.Module, *inputs: tuple[Any, ...]) -> None:
    """Check that both compute, learn and write the same for each of the inputs, twice, as state may change."""
    for args in inputs:
        # What a new graph brings is there before quantizers are set aside.
        run(q, args)
    state = q.state_dict()
    float_model.load_state_dict({name: state[name] for name in float_model.state_dict()})
    for at, args in enumerate(inputs):
        for _ in range(2):
            expected = run(float_model, args)
            with without_quantizers(q):
                found = run(q, args)
                assert pytree.tree_structure(found) == pytree.tree_structure(expected), at
                for e, f in zip(tensors(expected), tensors(found), strict=True):
                    assert_close(f"result for inputs {at}", f, e)
                of_float, of_q = gradients(float_model, tensors(expected)), gradients(q, tensors(found))
            assert of_q.keys() == of_float.keys(), f"inputs {at}: who gets a gradient"
            for name, expected_gradient in of_float.items():
                assert_close(f"gradient of {name} for inputs {at}", of_q[name], expected_gradient)
            for name, value in float_model.state_dict().items():
                assert_close(f"{name} after inputs {at}", q.state_dict()[name], value)
        # With quantizers the backward runs, too. A copy: forward may write into its state.
        other = copy.deepcopy(q)
        gradients(other, tensors(run(other, args)))


def quantized_alike(
    made: nn.Module | Callable[[], nn.Module], *inputs: tuple[Any, ...], parts: bool = False, **options: Any
) -> nn.Module:
    """Quantize for the first inputs, as one graph unless parts, in both modes; check all of the inputs; return q.

    made: a model, or what makes one that cannot be copied. options: those of quantize.
    """
    for training in (False, True):
        model = (copy.deepcopy(made) if isinstance(made, nn.Module) else made()).train(training)
        q = octav_fx.quantize(model, inputs[0], **options)
        assert isinstance(q, WholeModule) is not parts, octav_fx.table(q)
        assert_computes(q, model, *inputs)
    return q


@contextlib.contextmanager
def silent_quantizers() -> Iterator[None]:
    """Let every quantizer return its input inside, those of graphs to come too, and in transforms of torch.func."""
    forward, its_rule = FakeQuantizer.forward, transformed._forward
    FakeQuantizer.forward = transformed._forward = lambda self, x: x  # type: ignore[method-assign]
    try:
        yield
    finally:
        FakeQuantizer.forward, transformed._forward = forward, its_rule  # type: ignore[method-assign]


def assert_follows(made: Callable[[], nn.Module], steps: tuple[Any, ...], training: bool) -> nn.Module:
    """Quantize for the first step and check each call against float, in turn, so that state goes on; return q.

    steps: arguments of a call, or a function that changes a model.
    """
    torch.manual_seed(0)
    model = made().train(training)
    q = octav_fx.quantize(model, steps[0])
    for at, step in enumerate(steps):
        if callable(step):
            for each in (model, q):
                torch.manual_seed(2)
                step(each)
            continue
        expected = _observed(model, step)
        with silent_quantizers():
            found = _observed(q, step)
        for what, values in expected.items():
            assert found[what].keys() >= values.keys(), f"{what} of step {at}"
            for name, value in values.items():
                assert_close(f"{what} {name} of step {at}", found[what][name], value)
        assert found["gradient"].keys() == expected["gradient"].keys(), f"who gets a gradient in step {at}"
    return q


def _observed(model: nn.Module, args: tuple[Any, ...]) -> dict[str, dict[str, Tensor]]:
    """Return the results of a call, the gradients, and the tensors that modules hold afterwards."""
    result = run(model, args)
    results = tensors(vars(result) if dataclasses.is_dataclass(result) else result)
    attributes = {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    }
    return {
        "result": {str(i): value for i, value in enumerate(results)},
        "gradient": gradients(model, results),
        "state": {name: value.clone() for name, value in {**model.state_dict(), **attributes}.items()},
    }
