import pytest
import torch

from octav_fx.formats.granularity import along, clip_shape, to_rows

SHAPES_AND_AXES = [((5,), 0), ((2, 3), 0), ((2, 3), 1), ((2, 3, 4), 1), ((2, 3, 4, 5), 3), ((2, 3, 4, 5), -3)]


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3, 4), (0,), (3, 0)])
def test_a_tensor_is_one_row(shape):
    x = torch.randn(shape)
    assert torch.equal(to_rows(x, None), x.flatten().unsqueeze(0))
    assert clip_shape(x, None) == ()


@pytest.mark.parametrize(("shape", "dim"), SHAPES_AND_AXES)
def test_each_channel_is_a_row(shape, dim):
    x = torch.randn(shape)
    rows = to_rows(x, dim)
    assert rows.shape == (shape[dim], x.numel() // shape[dim])
    for channel, row in enumerate(rows):
        assert torch.equal(row, x.select(dim, channel).flatten())
    assert clip_shape(x, dim) == (shape[dim],)


@pytest.mark.parametrize(("shape", "dim", "rows"), [((0,), 0, (0, 1)), ((3, 0), 0, (3, 0)), ((3, 0, 2), 1, (0, 6))])
def test_empty_channels_and_empty_rows(shape, dim, rows):
    assert to_rows(torch.empty(shape), dim).shape == rows


@pytest.mark.parametrize(("shape", "dim"), SHAPES_AND_AXES)
def test_along_gives_each_channel_its_own_clip(shape, dim):
    x, clip = torch.randn(shape), torch.rand(shape[dim])
    scaled = x * along(clip, x, dim)
    assert scaled.shape == x.shape
    for channel in range(shape[dim]):
        assert torch.equal(scaled.select(dim, channel), x.select(dim, channel) * clip[channel])


def test_along_leaves_a_clip_for_the_whole_tensor():
    assert along(torch.tensor(2.0), torch.randn(2, 3), None).shape == ()
