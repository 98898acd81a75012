"""table: its text, how it fits, what is marked; blocks."""

import re

import pytest
import torch
from torch import Tensor, nn

import octav_fx
from octav_fx import Config, OctavError, quantize, rows, table
from octav_fx.reporting.blocks import block_of, blocks
from octav_fx.reporting.table import si
from tests.support.nets import Tiny, tiny_input

GOLDEN = """\
                                 MACs          scale                    clipped  zeros  SQNR  gain
node  op      operand    shape      %  format  per        clip  max|x|        %      %    dB    dB
----  ------  -------  -------  -----  ------  -------  ------  ------  -------  -----  ----  ----
conv  conv2d  input    1x1x3x3  57.14  int8    tensor        6       6    11.11   11.1  41.3  -0.0
conv  conv2d  weight   2x1x2x2  57.14  int4    channel  0.6475     0.9    25.00    0.0  18.9  -0.2
fc    linear  input        1x8  42.86  uint8   tensor    2.138   2.138    12.50   50.0  49.1  -0.0
fc    linear  weight       3x8  42.86  int8    channel     0.5     0.5    20.83    8.3  46.5  -0.0

quantized: 100.00% of 56 MACs"""


def test_golden_table():
    assert table(quantize(Tiny(), tiny_input(), Config(overrides={"conv": {"weight_bits": 4}}))) == GOLDEN


GOLDEN_WITH_REASONS = """\
                                 MACs          scale                  clipped  zeros  SQNR  gain
node  op      operand    shape      %  format  per      clip  max|x|        %      %    dB    dB
----  ------  -------  -------  -----  ------  -------  ----  ------  -------  -----  ----  ----
conv  conv2d  input    1x1x3x3  57.14  int8    tensor      6       6    11.11   11.1  41.3  -0.0
conv  conv2d  weight   2x1x2x2  57.14  int8    channel  0.65     0.9    25.00    0.0  43.3  -0.0
fc    linear  input        1x8  42.86  float   override 'fc': None
fc    linear  weight       3x8  42.86  float   override 'fc': None

quantized: 57.14% of 56 MACs; 1 nodes keep float operands"""


def test_golden_table_with_reasons():
    assert table(quantize(Tiny(), tiny_input(), Config(overrides={"fc": None}))) == GOLDEN_WITH_REASONS


class Deep(nn.Module):
    """Two blocks under a path as long as a transformer's."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.ModuleDict({"a_projection_with_a_long_name": nn.Linear(4, 4), "another": nn.Linear(4, 4)})
        other = nn.ModuleDict({"a_projection_with_a_long_name": nn.Linear(4, 4), "another": nn.Linear(4, 4)})
        self.encoder_of_the_model = nn.ModuleList([block, other])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.encoder_of_the_model:
            x = block["another"](block["a_projection_with_a_long_name"](x).relu())
        return x


def deep() -> nn.Module:
    return quantize(Deep(), torch.randn(2, 4), Config(overrides={"*.1.another": None}))


@pytest.mark.parametrize("width", [70, 80, 100, 120])
def test_no_line_is_longer_than_asked_for(width):
    text = table(deep(), width=width)
    assert max(map(len, text.partition("\nquantized: ")[0].splitlines())) <= width
    # What is shortened keeps its end, and nothing that says what was done is left out.
    assert re.search(r"^…\S+long_name ", text, re.MULTILINE) or width >= 100
    assert text.count("int4") == 6 and "SQNR" in text and "'*.1.another'" in text


def test_without_a_width_all_columns_are_there():
    header = table(deep(), width=None).splitlines()[1].split()
    assert header == ["node", "op", "operand", "shape", "%", "format", "per", "clip", "max|x|", "%", "%", "dB", "dB"]


def test_filter_and_sort():
    q = deep()
    text = table(q, filter="*.0.*", sort="-max_abs")
    names = [line.split()[0].rpartition(".")[2] for line in text.splitlines()[3:7]]
    assert names == [row.node.rpartition(".")[2] for row in rows(q).chosen("*.0.*", "-max_abs")]
    assert "\nshown: 4 of 8 rows\n" in text and "block" not in text
    with pytest.raises(OctavError, match="sort='bad'"):
        table(q, sort="bad")


def test_color(monkeypatch):
    q = quantize(Tiny(), tiny_input(), Config(weight_bits=2, edge_bits=None, overrides={"fc": None}))
    marked = table(q, color=True)
    plain = table(q)
    assert re.sub(r"\x1b\[\d+m", "", marked) == plain and "\x1b" not in plain
    (weight,) = (row for row in rows(q) if row.operand == "weight" and row.bits)
    # Two bits leave the weight with noise above a tenth, and the float operands are marked too.
    assert weight.sqnr < 10 and f"\x1b[31m{weight.sqnr:>4.1f}\x1b[0m" in marked
    assert marked.count("\x1b[35moverride 'fc': None\x1b[0m") == 2
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert table(q) == marked
    monkeypatch.setenv("NO_COLOR", "1")
    assert table(q) == plain


def test_a_notebook_shows_the_text_as_it_is():
    assert table(quantize(Tiny(), tiny_input()))._repr_html_().startswith("<pre")


@pytest.mark.parametrize(
    ("node", "block"),
    [
        ("layer1.0.conv1", "layer1.0"),
        ("bert.encoder.layer.11.attention.output.dense", "bert.encoder.layer.11"),
        ("features.1.0.attn.qkv:1", "features.1"),
        ("classifier.1", "classifier"),
        ("fc", "fc"),
        ("0", "0"),
        ("fc:2", "fc"),
    ],
)
def test_block_of(node, block):
    assert block_of(node) == block


def test_blocks_by_hand():
    q = deep()
    first, second = blocks(rows(q))
    assert (first.name, first.nodes, first.macs, first.share, first.quantized) == (
        *("encoder_of_the_model.0", 2, 64, 0.5, 1.0),
    )
    assert (second.nodes, second.macs, second.quantized) == (2, 64, 0.5)
    inside = [row for row in rows(q) if row.node.startswith("encoder_of_the_model.1.a_")]
    assert second.mean_sqnr == pytest.approx(sum(row.sqnr for row in inside) / 2)
    assert second.least_sqnr == min(row.sqnr for row in inside)
    assert second.least_at.startswith("a_projection_with_a_long_name ")


def test_blocks_where_they_say_nothing():
    assert blocks([]) == []
    assert blocks(rows(quantize(Tiny(), tiny_input()))) == []


def test_blocks_without_figures():
    q = quantize(Deep().to("meta"), torch.randn(2, 4, device="meta"))
    first, _ = blocks(rows(q))
    assert (first.mean_sqnr, first.least_sqnr, first.least_at) == (None, None, "")
    assert "encoder_of_the_model.0" in table(q)


def test_large_counts_are_shortened():
    assert [si(count) for count in (7, 1600, 33_180_000, 2_100_000_000)] == ["7", "1.60 k", "33.18 M", "2.10 G"]
    text = table(quantize(nn.Linear(40, 40), torch.randn(1, 40)))
    assert text.endswith("quantized: 100.00% of 1.60 k MACs")
    assert isinstance(octav_fx.table(quantize(nn.Linear(4, 4), torch.randn(1, 4))), str)
