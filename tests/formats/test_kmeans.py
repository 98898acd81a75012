import pytest
import torch

from octav_fx.formats.kmeans import KMEANS_BITS, KMeans
from octav_fx.formats.registry import format_of
from octav_fx.formats.spec import spec_of

LEVELS = torch.tensor([-2.0, -0.5, 0.25, 4])


def test_a_fitted_format_rounds_to_the_levels_of_the_tensor():
    form, clip = KMeans(2).fitted(LEVELS)
    assert clip == 4
    assert (form.name, form.low, form.high, form.least, form.greatest) == ("kmeans2", -2, 1, -0.5, 1)
    x = torch.tensor([-9, -1.3, -1.2, -0.126, -0.124, 2.1, 2.2, 9])
    assert (form.round(x / clip) * clip).tolist() == [-2, -2, -0.5, -0.5, 0.25, 0.25, 4, 4]
    assert form.codes(x / clip).tolist() == [-2, -2, -1, -1, 0, 0, 1, 1]
    assert torch.equal(form.levels(form.codes(x / clip)), form.round(x / clip))


def test_of_equal_levels_the_first_is_used():
    form, clip = KMeans(3).fitted(torch.tensor([-1.0, -1, 0, 0, 0, 2, 2, 2]))
    assert form.codes(torch.tensor([-9, -1, 0.1, 0.9, 1.1, 2, 9]) / clip).tolist() == [-4, -4, -2, -2, 1, 1, 1]


def test_nothing_but_zeros_and_levels_not_known():
    form, clip = KMeans(4).fitted(torch.zeros(16))
    assert clip == 0
    assert form.levels(torch.arange(-8.0, 8)).tolist() == [0] * 16
    with pytest.raises(AssertionError, match="not known yet"):
        KMeans(4).codes(torch.zeros(1))


@pytest.mark.parametrize("bits", KMEANS_BITS)
def test_its_levels_are_its_clip_and_count(bits):
    spec = spec_of(f"kmeans{bits}/tensor")
    assert spec.format == format_of(f"kmeans{bits}")
    assert spec.clip_shape((8, 8)) == (2**bits,)
    assert spec.bits_per_element((8, 8)) == bits + 32 * 2**bits / 64
    assert spec.even is spec.plain is None


@pytest.mark.parametrize(
    "text", ["kmeans4/channel.0", "kmeans4/group-32.1", "kmeans4/tensor/float16", "kmeans5/tensor"]
)
def test_levels_are_those_of_a_tensor(text):
    with pytest.raises(ValueError, match="kmeans"):
        spec_of(text)
