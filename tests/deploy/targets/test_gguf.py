"""Blocks of codes read as llama.cpp's formats say, and what no block holds; tests/stacks/test_gguf.py reads files."""

import numpy
import pytest
import torch
from torch import Tensor, nn

import octav_fx
from octav_fx import Config, OctavError
from octav_fx.deploy.layers import LinearLayer, linear_layers
from octav_fx.deploy.targets.gguf import blocks_of

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def layer(config: Config, columns: int = 96) -> LinearLayer:
    x = torch.randn(3, columns)
    q = octav_fx.quantize(nn.Sequential(nn.Linear(columns, 5)).eval(), x, config)
    (found,) = linear_layers(octav_fx.freeze(octav_fx.calibrate(q, [x])))
    return found


def unchanged(x: Tensor) -> Tensor:
    return x


def halves(nibbles: numpy.ndarray) -> numpy.ndarray:
    """The first 16 of a block are in the low halves of its bytes."""
    return numpy.concatenate([nibbles & 15, nibbles >> 4], -1)


def q4_0(block: numpy.ndarray) -> numpy.ndarray:
    return block[..., :2].copy().view(numpy.float16) * (halves(block[..., 2:]).astype(numpy.float32) - 8)


def q8_0(block: numpy.ndarray) -> numpy.ndarray:
    return block[..., :2].copy().view(numpy.float16) * block[..., 2:].copy().view(numpy.int8).astype(numpy.float32)


def mxfp4(block: numpy.ndarray) -> numpy.ndarray:
    values = numpy.array([*E2M1, *(-level for level in E2M1)], dtype=numpy.float32)
    return 2.0 ** (block[..., :1].astype(numpy.float32) - 127) * values[halves(block[..., 1:])]


READERS = {"Q4_0": (18, q4_0), "Q8_0": (34, q8_0), "MXFP4": (17, mxfp4)}
HALF = {"scale_format": "float16", "edge_bits": None}


@pytest.mark.parametrize(
    "config, expected",
    [
        *((Config(bits, None, **HALF), "Q4_0" if bits <= 4 else "Q8_0") for bits in range(2, 9)),
        (Config(4, None, weight_granularity="tensor", **HALF), "Q4_0"),
        (Config(4, None, weight_granularity="group-32", **HALF), "Q4_0"),
        (Config(8, None, weight_granularity="group-96", **HALF), "Q8_0"),
        (
            Config(
                *(4, None),
                **{"weight_format": "e2m1", "weight_granularity": "group-32", "scale_format": "e8m0"},
                edge_bits=None,
            ),
            "MXFP4",
        ),
    ],
)
def test_blocks_hold_the_levels(config, expected):
    found = layer(config)
    data, kind = blocks_of(found, unchanged)
    size, read = READERS[kind]
    assert kind == expected
    assert data.dtype == numpy.uint8 and data.shape == (5, 3 * size)
    levels = read(data.reshape(5, 3, size)).reshape(5, 96)
    # Products of a float16, or a power of two, and a code are exact in float32.
    assert torch.equal(torch.from_numpy(levels), found.weight())


def test_rows_take_their_scales_along():
    found = layer(Config(4, None, weight_granularity="group-32", **HALF))
    moved, _ = blocks_of(found, lambda x: x.flip(0))
    assert (moved == blocks_of(found, unchanged)[0][::-1]).all()


@pytest.mark.parametrize(
    "config, columns, named",
    [
        (Config(4, None, edge_bits=None), 96, "float16 does not hold its scales"),
        (Config(4, 8, **HALF), 96, "llama.cpp rounds activations by a rule of its own"),
        (Config(4, None, **HALF), 40, "no block of 32 codes holds int4/channel.0/float16 of 40 columns"),
        (Config(4, None, weight_granularity="group-16", **HALF), 96, "no block of 32 codes holds int4/group-16"),
        (Config(4, None, weight_format="nf4", **HALF), 96, "no block of 32 codes holds nf4"),
    ],
)
def test_what_no_block_holds(config, columns, named):
    with pytest.raises(OctavError, match=named):
        blocks_of(layer(config, columns), unchanged)
