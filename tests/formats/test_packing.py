import pytest
import torch

from octav_fx.formats.grid import Grid
from octav_fx.formats.packing import integer_codes, pack, unpack


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (4, 3, 2), (0,), (2, 0)])
def test_packing_is_undone(shape):
    codes = torch.randint(-8, 8, shape, dtype=torch.int8)
    packed = pack(codes)
    assert packed.dtype is torch.uint8
    assert packed.shape == ((codes.numel() + 1) // 2,)
    assert torch.equal(unpack(packed, shape), codes)


def test_the_first_of_two_is_in_the_low_bits():
    # That is the order of ONNX's int4, too.
    assert pack(torch.tensor([1, -1, 7, -8, 3], dtype=torch.int8)).tolist() == [0xF1, 0x87, 0x03]


def test_codes_are_those_of_the_grid():
    x = torch.tensor([[-9.0, -0.5, 0.5, 1.5, 2.5, 9.0], [1.0, 1.0, 1.0, 1.0, 1.0, -1.0]])
    # Steps of 1 in the first row; a clip of zero in the second.
    codes = integer_codes(x, torch.tensor([8.0, 0.0]), Grid(4, signed=True), 0)
    assert codes.dtype is torch.int8
    assert codes.tolist() == [[-8, 0, 0, 2, 2, 7], [0, 0, 0, 0, 0, 0]]
