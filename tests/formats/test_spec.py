import pytest
import torch

from octav_fx.formats.granularity import Granularity, granularity
from octav_fx.formats.grid import Grid
from octav_fx.formats.registry import CODEBOOKS
from octav_fx.formats.spec import Spec, integers, spec_of

SPECS = {
    "int4/tensor": Spec(Grid(4, True)),
    "uint8/channel.1": Spec(Grid(8, False), Granularity("channel", 1)),
    "int8-narrow/channel.0": Spec(Grid(8, True, narrow=True), Granularity("channel", 0)),
    "int8/token.2": Spec(Grid(8, True), Granularity("token", 2)),
    "e2m1/group-16.1/e4m3": Spec(CODEBOOKS["e2m1"], Granularity("group", 1, 16), "e4m3"),
}


@pytest.mark.parametrize(("text", "spec"), SPECS.items())
def test_a_spec_is_a_text_and_back(text, spec):
    assert str(spec) == text
    assert spec_of(text) == spec


@pytest.mark.parametrize("text", ["int4", "int4/group.1", "int4/row.1", "int4/tensor/float64", "fp4/tensor"])
def test_any_other_text_is_an_error(text):
    with pytest.raises(ValueError):
        spec_of(text)


def test_what_kernels_are_made_for():
    assert spec_of(integers(4, True)).plain == (Grid(4, True), None)
    assert spec_of(integers(4, False, 2)).plain == (Grid(4, False), 2)
    for text in ("int4/group-2.0", "int4/token.0", "e4m3/tensor", "int4/tensor/bfloat16"):
        assert spec_of(text).plain is None


def test_narrow_grids_leave_out_the_lowest_code():
    grid = Grid(8, True, narrow=True)
    assert (grid.low, grid.high, grid.steps) == (-127, 127, 128)
    assert grid.round(torch.tensor([-200.0, -127.6, 200])).tolist() == [-127, -127, 127]


@pytest.mark.parametrize("name", ["token.0", "token.1", "token.2", "group-2.0", "group-3.1", "group-4.2", "group-2.2"])
def test_rows_lie_along_the_axis(name):
    shared, x = granularity(name), torch.randn(4, 6, 8)
    rows = shared.rows(x)
    size = shared.size or x.shape[shared.axis]
    assert rows.shape == (x.numel() // size, size)
    clip = shared.of_rows(rows.abs().amax(-1), x.shape)
    assert clip.shape == shared.clip_shape(x.shape)
    for index in range(0, x.shape[shared.axis], size):
        expected = x.narrow(shared.axis, index, size).abs().amax(shared.axis, keepdim=True)
        assert torch.equal(clip.narrow(shared.axis, index // size, 1), expected)
    # Whoever has the largest magnitude in its row is its clip.
    assert ((x / shared.along(clip, x)).abs() == 1).sum() == len(rows)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_nothing_has_no_rows(shape):
    for name in ("token.1", "group-4.1"):
        shared, x = granularity(name), torch.randn(shape)
        assert shared.of_rows(shared.rows(x).sum(-1), shape).shape == shared.clip_shape(shape)


def test_scales_count():
    assert spec_of("int4/group-32.1").bits_per_element((64, 64)) == 4 + 32 / 32
    assert spec_of("e2m1/group-32.1/e8m0").bits_per_element((64, 64)) == 4 + 8 / 32
    assert spec_of("e2m1/group-16.1/e4m3").bits_per_element((64, 64)) == 4 + 8 / 16 + 32 / 4096
    assert spec_of("int8/tensor").bits_per_element((4, 8)) == 8 + 1


def test_groups_divide_or_not():
    assert granularity("group-4.1").divides((3, 8))
    assert not granularity("group-4.0").divides((3, 8))
    assert granularity("token.0").divides((3, 8))
