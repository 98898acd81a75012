import ml_dtypes
import numpy as np
import pytest
import torch

from octav_fx.formats.codebook import Codebook
from octav_fx.formats.registry import CODEBOOKS, format_of

INDEPENDENT = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}


def numbers(form: Codebook) -> torch.Tensor:
    """Levels, ties and values of every size that do not lie beyond the levels."""
    table = torch.tensor(form.table, dtype=torch.float64)
    some = torch.cat([torch.randn(5000) * scale for scale in (1e-6, 1e-3, 0.1, 1, 3, 100)])
    return torch.cat([table.float(), ((table[:-1] + table[1:]) / 2).float(), some]).clamp(form.least, form.greatest)


@pytest.mark.parametrize("name", INDEPENDENT)
def test_codes_and_levels_are_those_of_an_independent_encoder(name):
    form = CODEBOOKS[name]
    x = numbers(form)
    encoded = x.numpy().astype(INDEPENDENT[name])
    assert torch.equal(form.round(x), torch.from_numpy(encoded.astype(np.float32)))
    stored = torch.from_numpy(encoded.view(np.uint8).astype(np.int64))
    magnitude, negative = stored & (2 ** (form.bits - 1) - 1), stored >> (form.bits - 1) & 1
    assert torch.equal(form.codes(x).long(), torch.where(negative == 1, -magnitude, magnitude))


@pytest.mark.parametrize("form", CODEBOOKS.values(), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_level_is_its_own_code_and_others_go_to_the_nearest(form, dtype):
    codes = torch.arange(form.low, form.high + 1).to(dtype)
    levels = form.levels(codes)
    assert torch.equal(levels, torch.tensor(form.table, dtype=dtype))
    assert torch.equal(form.codes(levels), codes)
    x = (torch.rand(2000, dtype=dtype) - 0.5) * 2.5 * form.steps
    distance = (x.unsqueeze(-1) - levels).abs()
    # Distances are rounded once; a nearest level is as near as that allows.
    slack = 2 * torch.finfo(dtype).eps * form.steps
    assert ((form.round(x) - x).abs() <= distance.amin(-1) + slack).all()
    # Rounding by arithmetic and by the table are the same.
    assert torch.equal(form.round(x), form.levels(form.codes(x)))


@pytest.mark.parametrize("form", CODEBOOKS.values(), ids=str)
def test_codes_fit_their_bits_and_the_clip_is_the_greatest_magnitude(form):
    assert len(form.table) <= 2**form.bits
    assert form.table == tuple(sorted(form.table))
    assert form.steps == max(map(abs, form.table))
    assert torch.iinfo(form.codes_dtype).min < form.underflow_code < form.high + 1 <= torch.iinfo(form.codes_dtype).max
    assert format_of(form.name) is form


def test_levels_by_hand():
    assert CODEBOOKS["e2m1"].table[7:] == (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    assert CODEBOOKS["ternary"].table == (-1, 0, 1)
    assert CODEBOOKS["zero-free"].table == (-1.5, -0.5, 0.5, 1.5)
    assert CODEBOOKS["pow2"].table[7:] == (0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
    assert CODEBOOKS["nupes"].table[7:] == tuple((i / 7) ** 2 for i in range(8))
    assert CODEBOOKS["apot"].table[7:] == (0, 0.125, 0.25, 0.375, 0.5, 0.625, 1, 1.125)
    # As published with QLoRA's code.
    published = (0, 0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1)
    assert CODEBOOKS["nf4"].table[7:] == pytest.approx(published, abs=5e-7)
    assert CODEBOOKS["nf4"].table[:7] == pytest.approx(
        (-1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500), abs=5e-7
    )


def test_no_format_of_that_name():
    with pytest.raises(ValueError, match="'int' is no number format"):
        format_of("int")
