"""Words of packed codes, and what is no model of transformers; tests/stacks has readers of whole folders."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import octav_fx
from octav_fx import Config, OctavError
from octav_fx.deploy.targets.compressed_tensors import pack_into_words
from tests.support.examples import examples


def unsigned(words: torch.Tensor) -> list[list[int]]:
    return [[word % 2**32 for word in row] for row in words.tolist()]


def test_words_of_four_bits():
    """Codes -8 to 7 are stored as 0 to 15, the first in the lowest bits."""
    assert unsigned(pack_into_words(torch.arange(-8, 8)[None].to(torch.int8), 4)) == [[0x76543210, 0xFEDCBA98]]


def test_words_of_three_bits_are_filled_to_the_last():
    """32 codes take three words, of which two codes lie in two."""
    codes = (torch.arange(32) % 8 - 4)[None].to(torch.int8)
    assert unsigned(pack_into_words(codes, 3)) == [[0x88FAC688, 0xC688FAC6, 0xFAC688FA]]


@given(st.integers(2, 8), st.integers(1, 3), st.integers(1, 70), st.randoms(use_true_random=False))
@examples(100)
def test_a_row_is_one_number(bits, rows, columns, random):
    """Whose digits of so many bits are the codes, from the lowest word on."""
    low = 2 ** (bits - 1)
    codes = [[random.randrange(-low, low) for _ in range(columns)] for _ in range(rows)]
    words = unsigned(pack_into_words(torch.tensor(codes, dtype=torch.int8), bits))
    assert [len(row) for row in words] == [-(-columns * bits // 32)] * rows
    for row, expected in zip(words, codes, strict=True):
        number = sum(word << 32 * place for place, word in enumerate(row))
        assert [(number >> bits * place) % 2**bits - low for place in range(columns)] == expected
        assert number >> bits * columns == 0


def test_a_model_that_is_not_of_transformers(tmp_path):
    q = octav_fx.quantize(nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(2, 4), Config(8, None))
    with pytest.raises(OctavError, match="Sequential is no model of transformers"):
        octav_fx.export_compressed_tensors(octav_fx.freeze(q), tmp_path)
