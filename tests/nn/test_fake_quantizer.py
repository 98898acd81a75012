import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import octav_fx
from octav_fx import OctavError
from octav_fx.nn import FakeQuantizer
from octav_fx.ops.fake_quantize.op import fake_quantize
from octav_fx.ops.optimal_clip.op import optimal_clip
from tests.support.settings import settings_of

TENSOR = settings_of(4, True, None, "octav", "pwl")
CHANNEL = settings_of(4, True, 0, "octav", "mad")


def clip_from_parameter(x, settings):
    hint = torch.zeros(settings.spec.granularity.clip_shape(x.shape))
    return optimal_clip(x, hint, str(settings.spec), settings.method)


@pytest.mark.parametrize(("settings", "shape"), [(TENSOR, ()), (CHANNEL, (3,))])
def test_the_first_call_quantizes_and_fills_the_hint(settings, shape):
    quantizer, x = FakeQuantizer(settings, shape), torch.randn(3, 100)
    assert not quantizer.hint.any()
    y, clip = quantizer(x), clip_from_parameter(x, settings)
    assert torch.equal(quantizer.hint, clip)
    assert torch.equal(y, fake_quantize(x, clip, str(settings.spec), settings.gradient))


def test_the_hint_is_a_buffer_outside_of_the_state_dict():
    quantizer = FakeQuantizer(TENSOR)
    quantizer(torch.randn(100))
    assert [name for name, _ in quantizer.named_buffers()] == ["hint"]
    assert quantizer.state_dict() == {}
    assert not list(quantizer.parameters())


def test_a_checkpoint_of_the_float_model_loads_strictly():
    quantized = nn.Sequential(nn.Linear(3, 3), FakeQuantizer(TENSOR))
    quantized.load_state_dict(nn.Sequential(nn.Linear(3, 3)).state_dict(), strict=True)


@pytest.mark.parametrize("hint", [0.0, 0.1, 5.0, 1e6, math.inf, math.nan])
def test_the_result_does_not_depend_on_the_hint(hint):
    x, quantizer, fresh = torch.randn(1000), FakeQuantizer(TENSOR), FakeQuantizer(TENSOR)
    quantizer.hint.fill_(hint)
    # The same fixed point up to the rounding of its sums; with this seed no value lies that close to a tie.
    torch.testing.assert_close(quantizer(x), fresh(x), rtol=1e-6, atol=0)
    torch.testing.assert_close(quantizer.hint, fresh.hint, rtol=1e-6, atol=0)


def test_the_tensors_before_do_not_change_the_result():
    x, quantizer, fresh = torch.randn(1000), FakeQuantizer(TENSOR), FakeQuantizer(TENSOR)
    for before in (1e-6 * torch.randn(100), torch.zeros(5), torch.empty(0), torch.full((3,), math.nan), 1e6 * x):
        quantizer(before)
    torch.testing.assert_close(quantizer(x), fresh(x), rtol=1e-6, atol=0)


@pytest.mark.parametrize("settings", [TENSOR, settings_of(4, False, None, "octav-grid", "pwl")])
def test_inf_and_nan_pass_and_do_not_reach_the_hint(settings):
    quantizer, x = FakeQuantizer(settings), torch.randn(1000)
    clean = clip_from_parameter(x, settings)
    bad = torch.cat([x, torch.tensor([math.inf, -math.inf, math.nan])])
    y = quantizer(bad)
    torch.testing.assert_close(y[1000:], bad[1000:], rtol=0, atol=0, equal_nan=True)
    # The same values, perhaps summed in another order.
    torch.testing.assert_close(quantizer.hint, clean, rtol=1e-6, atol=0)
    quantizer(torch.full((10,), math.nan))
    assert quantizer.hint.item() == 0


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.half)])
def test_the_hint_stays_float32(convert):
    quantizer = FakeQuantizer(CHANNEL, (3,))
    quantizer(torch.randn(3, 100))
    converted = convert(nn.Sequential(quantizer))[0]
    assert converted.hint.dtype is torch.float32
    assert [name for name, _ in converted.named_buffers()] == ["hint"]
    assert converted.state_dict() == {}
    x = torch.randn(3, 100).half()
    assert converted(x).dtype is torch.float16
    torch.testing.assert_close(converted.hint, clip_from_parameter(x, CHANNEL), rtol=1e-6, atol=0)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_have_a_hint_of_their_own(duplicate):
    quantizer = FakeQuantizer(TENSOR)
    quantizer(torch.randn(100))
    before, other = quantizer.hint.clone(), duplicate(quantizer)
    assert other.settings == quantizer.settings
    assert torch.equal(other.hint, before)
    other(10 * torch.randn(100))
    assert torch.equal(quantizer.hint, before)
    assert other.state_dict() == {}


def test_two_calls_before_one_backward():
    # The hint is written in between: autograd must not need it.
    quantizer, x = FakeQuantizer(CHANNEL, (3,)), torch.randn(3, 50, requires_grad=True)
    (quantizer(x) + quantizer(2 * x)).sum().backward()
    expected = x.detach().clone().requires_grad_()
    for factor in (1, 2):
        FakeQuantizer(CHANNEL, (3,))(factor * expected).sum().backward()
    # The second call starts from the hint of the first.
    torch.testing.assert_close(x.grad, expected.grad, rtol=1e-6, atol=0)


def test_recomputing_a_checkpoint_gives_the_same_gradients():
    # The recomputation starts from a hint that the forward pass did not have.
    model = nn.Sequential(FakeQuantizer(TENSOR), nn.Linear(20, 20), nn.ReLU(), FakeQuantizer(TENSOR), nn.Linear(20, 1))
    other, x = copy.deepcopy(model), torch.randn(50, 20)
    model(x).sum().backward()
    checkpoint(other, x, use_reentrant=False).sum().backward()
    for plain, recomputed in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(recomputed.grad, plain.grad, rtol=1e-6, atol=1e-6 * plain.grad.abs().max().item())


def test_evaluation_computes_the_same_as_training():
    quantizer, x = FakeQuantizer(TENSOR), torch.randn(100)
    assert torch.equal(quantizer.train()(x), quantizer.eval()(x))


def test_inference_mode_leaves_a_hint_that_training_can_use():
    quantizer, x = FakeQuantizer(TENSOR), torch.randn(100)
    with torch.inference_mode():
        quantizer(x)
    y = quantizer(x.requires_grad_())
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("x", [torch.zeros(3, 4), torch.empty(3, 0), torch.full((3, 4), 0.5)])
def test_zeros_empty_and_constant_tensors(x):
    quantizer = FakeQuantizer(CHANNEL, (3,))
    y = quantizer(x)
    # Of a constant the highest level misses a step of an eighth.
    torch.testing.assert_close(y, x * 7 / 8, rtol=1e-6, atol=0)


def test_traced_whole_with_the_same_values_gradients_and_hint(fresh_dynamo):
    x = torch.randn(3, 50)
    eager, module = FakeQuantizer(CHANNEL, (3,)), FakeQuantizer(CHANNEL, (3,))
    traced = torch.compile(module, backend="aot_eager", fullgraph=True)
    for scale in (1, 3):
        a, b = (scale * x).requires_grad_(), (scale * x).requires_grad_()
        expected, y = eager(a), traced(b)
        assert torch.equal(y, expected)
        assert torch.equal(module.hint, eager.hint)
        expected.pow(2).sum().backward()
        y.pow(2).sum().backward()
        assert torch.equal(b.grad, a.grad)


def test_equal_specs_are_one_key():
    assert len({TENSOR, settings_of(4, True, None, "octav", "pwl"), CHANNEL}) == 2


def test_repr_says_how_it_quantizes():
    assert repr(FakeQuantizer(CHANNEL, (3,))) == "FakeQuantizer(int4/channel.0, octav, mad)"
    assert repr(FakeQuantizer(TENSOR)) == "FakeQuantizer(int4/tensor, octav, pwl)"


@pytest.mark.parametrize("backend", [None, "eager"])
def test_a_nested_tensor_is_refused(backend: str | None) -> None:
    q = octav_fx.quantize(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.randn(2, 5, 8))
    run: Any = q if backend is None else torch.compile(q, backend=backend)
    nested = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)], layout=torch.jagged)
    with pytest.raises(OctavError, match=r"a nested tensor of 3 axes.*x\.values\(\)"):
        run(nested)
    assert run(nested.values()).shape == (8, 8)
