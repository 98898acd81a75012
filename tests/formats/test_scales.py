import ml_dtypes
import numpy as np
import pytest
import torch

from octav_fx.formats.floats import E2M1
from octav_fx.formats.scales import SCALES, tensor_scale

ONE = torch.ones(())


def test_powers_of_two():
    # Near the end of float32 a clip, and so its step, may lie beyond it.
    step = torch.tensor([0.0, 1, 1.25, 1.5, 1.75, 3, 1e-45, 3e38, torch.inf])
    assert SCALES["e8m0"](step, ONE).tolist() == [0, 1, 1, 2, 2, 4, 2**-127, 2**127, 2**127]
    some = torch.rand(1000).exp() * torch.randn(1000).exp()
    # ml_dtypes rounds ties to the even exponent; these have none.
    expected = some.numpy().astype(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert torch.equal(SCALES["e8m0"](some, ONE), torch.from_numpy(expected))


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_half_precision(name, dtype):
    step = torch.rand(1000)
    assert torch.equal(SCALES[name](step, ONE), step.to(dtype).float())


def test_no_float16_step_is_zero():
    assert SCALES["float16"](torch.tensor([0.0, 1e-12, 1e6]), ONE).tolist() == [0, 2**-24, 65504]
    x = torch.randn(64) * 1e-6
    clip = torch.ops.octav.optimal_clip(x, torch.zeros(()), "e5m2/tensor/float16", "octav")
    error = x - torch.ops.octav.fake_quantize(x, clip, "e5m2/tensor/float16", "ste")
    # Two bits behind the leading one: an eighth of each value, and half a subnormal level.
    assert (error.abs() <= x.abs() / 8 + 2**-17 * 2**-24).all()


def test_e4m3_under_the_scale_of_the_tensor():
    x = torch.randn(100, 16) * torch.randn(100, 1).exp()
    unit = tensor_scale(x, E2M1)
    step = x.abs().amax(-1) / 6
    ratio = (step / unit).numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert ratio.max() in (416, 448)
    stored = SCALES["e4m3"](step, unit)
    assert torch.equal(stored, torch.from_numpy(ratio) * unit)
    # What is stored comes back from the clip, exactly.
    assert torch.equal(E2M1.step(stored * E2M1.steps), stored)
    # No group is lost, and none that has nothing gets a scale.
    assert SCALES["e4m3"](unit * torch.tensor([1e-6, 0]), unit).tolist() == [unit * 2**-9, 0]
    assert tensor_scale(torch.zeros(3), E2M1) == 0
