"""What a report shows, against values by hand."""

import json
import math

import pytest
import torch
from torch import nn

from octav_fx import Config, quantize, rows
from octav_fx.reporting.report.collect import BITS, collected
from tests.support.nets import Tiny, tiny_input


def test_a_row_is_that_of_rows_with_what_was_seen():
    q = quantize(Tiny(), tiny_input(), Config(overrides={"conv": {"weight_bits": 4}}))
    found = collected(q, None)["rows"]
    for shown, row in zip(found, rows(q), strict=True):
        assert (shown["node"], shown["operand"], shown["bits"], shown["sqnr"]) == (
            *(row.node, row.operand, row.bits, row.sqnr),
        )
        assert sum(shown["detail"]["counts"]) == math.prod(row.shape)
    data, weight = found[0]["detail"], found[1]["detail"]
    # The clip of the tensor, and its least and greatest level, one step below the clip; 256 are too many to draw.
    assert (data["unit"], data["clip"]) == ("x", pytest.approx(found[0]["clip"], rel=1e-5))
    # The file has six digits.
    assert data["levels"] == pytest.approx([-data["clip"], data["clip"] * 127 / 128], rel=1e-5)
    assert (data["low"], data["high"]) == (-1.5, 6)
    # Channels are shown in units of their clips.
    assert (weight["unit"], weight["clip"], len(weight["levels"])) == ("x / clip", 1, 16)
    assert weight["levels"][0] == -1 and weight["levels"][-1] == 7 / 8


def test_the_prediction_at_the_own_bits_is_what_is_measured():
    # As large as the sample: nothing is left out.
    q = quantize(nn.Linear(64, 64), torch.randn(32, 64), Config(weight_bits=3, activation_bits=5, edge_bits=None))
    for shown, row in zip(collected(q, None)["rows"], rows(q), strict=True):
        predicted = shown["detail"]["predicted"]
        assert list(predicted) == list(BITS)
        # float32 sums in another order.
        assert predicted[row.bits] == pytest.approx(row.sqnr, rel=1e-4)
        assert sorted(predicted.values()) == list(predicted.values())


def test_weights_are_counted_in_bytes():
    q = quantize(nn.Linear(10, 3), torch.randn(2, 10), Config(weight_bits=3, edge_bits=None))
    data, weight = collected(q, None)["rows"]
    assert (data["bytes"], data["float_bytes"]) == (None, None)
    assert (weight["bytes"], weight["float_bytes"]) == (math.ceil(30 * 3 / 8), 120)


@pytest.mark.parametrize("x", [torch.zeros(2, 4), torch.full((2, 4), 3.0), torch.tensor([[math.inf, math.nan, 1, 2]])])
def test_odd_values_are_values_of_json(x):
    q = quantize(nn.Linear(4, 2), torch.randn(2, 4))
    json.dumps(collected(q, x), allow_nan=False)


def test_what_was_not_run_has_no_detail():
    q = quantize(nn.Linear(4, 2).to("meta"), torch.randn(2, 4, device="meta"))
    assert [row["detail"] for row in collected(q, None)["rows"]] == [None, None]
