"""rows, table, coverage: every number against one computed by hand."""

import copy
import csv
import dataclasses
import io
import json
import math
import pickle
import re
import sys
import types
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import octav_fx
from octav_fx import Config, Coverage, OctavError, coverage, quantize, rows, table
from tests.support.nets import Tiny, tiny_input

# By hand: lists of Python floats, no tensor.


def clip_by_hand(values: list[float], bits: int, signed: bool) -> float:
    """The paper's recursion (eq. 6) from its start, the mean magnitude, often enough to stand still."""
    magnitudes = [abs(v) if signed else max(v, 0.0) for v in values]
    magnitudes = [m for m in magnitudes if m]
    noise = 4**-bits / (3 if signed else 12)
    clip = sum(magnitudes) / len(magnitudes)
    for _ in range(100):
        above = [m for m in magnitudes if m >= clip]
        clip = sum(above) / (noise * (len(magnitudes) - len(above)) + len(above))
    return clip


def rounded_by_hand(values: list[float], clip: float, bits: int, signed: bool) -> list[float]:
    steps = 2 ** (bits - 1) if signed else 2**bits
    low = -steps if signed else 0
    return [max(low, min(steps - 1, round(v / clip * steps))) * clip / steps for v in values]


def decibel(values: list[float], rounded: list[float]) -> float:
    noise = sum((v - r) ** 2 for v, r in zip(values, rounded, strict=True))
    return 10 * math.log10(sum(v * v for v in values) / noise)


def check(row: octav_fx.Row, channels: list[list[float]]) -> None:
    bits, signed = row.bits, row.signed
    clips = [clip_by_hand(values, bits, signed) for values in channels]
    largest = [max(abs(v) if signed else max(v, 0.0) for v in values) for values in channels]
    flat = [v for values in channels for v in values]
    by_clip, by_largest = (
        [
            r
            for values, bound in zip(channels, bounds, strict=True)
            for r in rounded_by_hand(values, bound, bits, signed)
        ]
        for bounds in (clips, largest)
    )
    beyond = sum(abs(v) > clip for values, clip in zip(channels, clips, strict=True) for v in values)
    # float32 sums of tens of values against Python's doubles.
    close = {"rel": 1e-5}
    assert row.clip == pytest.approx(sum(clips) / len(clips), **close)
    assert row.clip_min == pytest.approx(min(clips), **close)
    assert row.clip_max == pytest.approx(max(clips), **close)
    assert row.max_abs == pytest.approx(max(largest), **close)
    assert row.clipped == pytest.approx(beyond / len(flat), **close)
    assert row.zeros == pytest.approx(by_clip.count(0.0) / len(flat), **close)
    # 1e-5 of a value is up to 1e-4 of the error of 8 bits, and that of its decibels; near zero, absolutely.
    assert row.sqnr == pytest.approx(decibel(flat, by_clip), rel=1e-3)
    assert row.gain == pytest.approx(decibel(flat, by_clip) - decibel(flat, by_largest), abs=0.01)


@pytest.mark.parametrize("config", [Config(), Config(edge_bits=None), Config(weight_bits=2, edge_bits=3)])
def test_statistics_by_hand(config):
    x = tiny_input()
    model = Tiny()
    q = quantize(model, x, config)
    found = {(row.node, row.operand): row for row in rows(q)}
    assert list(found) == [("conv", "input"), ("conv", "weight"), ("fc", "input"), ("fc", "weight")]
    features = []
    q.quantizers.fc_input.register_forward_hook(lambda module, args, y: features.append(args[0]))
    q(x)
    check(found["conv", "input"], [x.flatten().tolist()])
    check(found["conv", "weight"], model.conv.weight.flatten(1).tolist())
    check(found["fc", "input"], [features[0].flatten().tolist()])
    check(found["fc", "weight"], model.fc.weight.tolist())


def test_what_does_not_depend_on_values_by_hand():
    first, second, third, fourth = rows(quantize(Tiny(), tiny_input()))
    assert (first.op, first.shape, first.bits, first.signed, first.granularity) == (
        *("conv2d", (1, 1, 3, 3), 8, True, "tensor"),
    )
    assert (second.op, second.shape, second.signed, second.granularity) == ("conv2d", (2, 1, 2, 2), True, "channel 0")
    assert (third.op, third.shape, third.signed, third.granularity) == ("linear", (1, 8), False, "tensor")
    assert (fourth.op, fourth.shape, fourth.signed, fourth.granularity) == ("linear", (3, 8), True, "channel 0")
    # 2 channels of 2 x 2 positions, 4 products each; 8 x 3 products.
    assert [row.macs for row in (first, second, third, fourth)] == [32, 32, 24, 24]
    assert [row.share for row in (first, second, third, fourth)] == [32 / 56, 32 / 56, 24 / 56, 24 / 56]
    assert {row.reason for row in (first, second, third, fourth)} == {None}


def test_max_scaling_clips_nothing_and_gains_nothing():
    for row in rows(quantize(Tiny(), tiny_input(), Config(clip="max"))):
        assert (row.clipped, row.gain) == (0, 0)
        assert row.clip_max == pytest.approx(row.max_abs)


def test_zeros_and_constants():
    model = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0] * 4, [0.25] * 4]))
    of_input, of_weight = rows(quantize(model, torch.zeros(1, 4)))
    assert (of_input.clip, of_input.max_abs, of_input.clipped, of_input.zeros) == (0, 0, 0, 1)
    assert (of_input.sqnr, of_input.gain) == (math.inf, 0)
    assert (of_weight.clip_min, of_weight.clip_max, of_weight.zeros) == (0, 0.25, 0.5)


# Multiply-accumulates.


class Applied(nn.Module):
    def __init__(self, function, **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


MACS = {
    # Positions x output channels x input channels per group x kernel.
    "conv": (lambda m, x: m.l(x), {"l": nn.Conv2d(4, 6, 3, padding=1)}, [(2, 4, 5, 7)], 2 * 35 * 6 * 4 * 9),
    "strided": (lambda m, x: m.l(x), {"l": nn.Conv2d(4, 6, 3, stride=2)}, [(2, 4, 7, 7)], 2 * 9 * 6 * 4 * 9),
    "dilated": (lambda m, x: m.l(x), {"l": nn.Conv2d(4, 6, 3, dilation=2)}, [(1, 4, 7, 7)], 9 * 6 * 4 * 9),
    "depthwise": (lambda m, x: m.l(x), {"l": nn.Conv2d(4, 4, 3, groups=4)}, [(2, 4, 5, 5)], 2 * 9 * 4 * 9),
    "groups": (lambda m, x: m.l(x), {"l": nn.Conv2d(4, 6, 1, groups=2)}, [(2, 4, 5, 5)], 2 * 25 * 6 * 2),
    "conv1d": (lambda m, x: m.l(x), {"l": nn.Conv1d(4, 6, 3)}, [(2, 4, 9)], 2 * 7 * 6 * 4 * 3),
    "conv3d": (lambda m, x: m.l(x), {"l": nn.Conv3d(2, 3, 2)}, [(1, 2, 3, 4, 5)], 2 * 3 * 4 * 3 * 2 * 8),
    # Input positions x input channels x output channels x kernel.
    "transposed": (lambda m, x: m.l(x), {"l": nn.ConvTranspose2d(4, 6, 3, 2)}, [(2, 4, 5, 5)], 2 * 25 * 4 * 6 * 9),
    "linear": (lambda m, x: m.l(x), {"l": nn.Linear(8, 3)}, [(2, 5, 8)], 10 * 8 * 3),
    "matmul": (lambda m, x, y: x @ y, {}, [(2, 5, 8), (8, 3)], 10 * 8 * 3),
    "bmm": (lambda m, x, y: torch.bmm(x, y), {}, [(2, 5, 8), (2, 8, 3)], 2 * 5 * 8 * 3),
    "broadcast": (lambda m, x, y: x @ y, {}, [(2, 5, 8), (4, 1, 8, 3)], 4 * 2 * 5 * 8 * 3),
    "addmm": (lambda m, x, y: torch.addmm(x[:, :3], x, y), {}, [(5, 8), (8, 3)], 5 * 8 * 3),
    "einsum": (lambda m, x, y: torch.einsum("bhqd,bhkd->bhqk", x, y), {}, [(2, 3, 5, 8), (2, 3, 7, 8)], 6 * 35 * 8),
    # Two products of all pairs, for each batch and head.
    "attention": (
        lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v),
        {},
        [(2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4)],
        6 * 35 * (8 + 4),
    ),
}


@pytest.mark.parametrize("name", MACS)
def test_multiply_accumulates_by_hand(name):
    function, layers, shapes, macs = MACS[name]
    q = quantize(Applied(function, **layers), tuple(map(torch.randn, shapes)), strict=True)
    assert coverage(q) == Coverage(quantized_macs=macs, total_macs=macs, skipped=[])
    assert {row.macs for row in rows(q)} == {macs}


def test_coverage_counts_a_node_once_and_lists_what_is_skipped():
    model = Applied(
        lambda m, x: torch.cdist(m.out(m.twice(m.twice(m.conv(x).mean((2, 3))))), m.out.weight.t()),
        conv=nn.Conv2d(3, 8, 3),
        twice=nn.Linear(8, 8),
        out=nn.Linear(8, 4),
    )
    q = quantize(model, torch.randn(2, 3, 6, 6), Config(overrides={"twice:1": None, "out": {"weight_bits": 3}}))
    conv, twice, out = 2 * 16 * 8 * 27, 2 * 64, 2 * 32
    assert coverage(q) == Coverage(
        quantized_macs=conv + twice + out,
        total_macs=conv + 2 * twice + 2 * out,
        skipped=[
            ("twice:1", "input: override 'twice:1': None; weight: override 'twice:1': None", twice),
            ("cdist", "no rule for cdist", out),
        ],
    )
    shares = {row.node: row.share for row in rows(q)}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["conv"] == conv / coverage(q).total_macs


def test_a_row_with_a_reason_for_each_operand_left_float():
    model = Applied(
        lambda m, x: torch.cdist(m.off(x), torch.mm(x, m.off.weight, out=torch.empty(2, 8))),
        off=nn.Linear(8, 8),
    )
    q = quantize(model, torch.randn(2, 8), Config(overrides={"off": None}))
    found = [(row.node, row.op, row.operand, row.shape, row.bits, row.reason) for row in rows(q)]
    assert found == [
        ("off", "linear", "input", (2, 8), None, "override 'off': None"),
        ("off", "linear", "weight", (8, 8), None, "override 'off': None"),
        ("matmul", "matmul", "", (2, 8), None, "writes into out="),
        ("cdist", "cdist", "", (2, 2), None, "no rule for cdist"),
    ]
    for row in rows(q):
        assert (row.signed, row.granularity, row.clip, row.max_abs, row.sqnr, row.gain) == (None,) * 6
    assert coverage(q).quantized_macs == 0


# No trace, other inputs, wrappers.


def test_a_table_leaves_no_trace():
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.dropout = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()

        def forward(self, x: Tensor) -> Tensor:
            return self.dropout(self.norm(self.conv(x.mul_(2))))

    x = torch.randn(2, 3, 8, 8)
    q = quantize(Noisy(), x)
    before = copy.deepcopy(q.state_dict()), x.clone(), torch.get_rng_state()
    attributes = {name: set(vars(module)) for name, module in q.named_modules()}
    hooks = [len(module._forward_hooks) for module in q.modules()]
    text = table(q)
    assert table(q) == text
    for now, then in zip(q.state_dict().values(), before[0].values(), strict=True):
        assert torch.equal(now, then)
    assert torch.equal(x, before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
    assert {name: set(vars(module)) for name, module in q.named_modules()} == attributes
    assert [len(module._forward_hooks) for module in q.modules()] == hooks
    assert all(module.training for module in q.modules())
    assert all(p.grad is None for p in q.parameters())


def test_hooks_are_removed_when_the_model_fails():
    q = quantize(Tiny(), tiny_input())
    with pytest.raises(RuntimeError):
        rows(q, torch.randn(1, 5, 3, 3))
    assert not any(module._forward_hooks for module in q.modules())


def test_other_inputs():
    x = tiny_input()
    q = quantize(Tiny(), x)
    for other in (2 * x, (2 * x,), {"x": 2 * x}):
        first = rows(q, other)[0]
        assert first.clip == 2 * rows(q)[0].clip
        assert first.max_abs == 12
    assert rows(q)[0].max_abs == 6


def test_after_training_it_shows_the_weights_of_now():
    q = quantize(Tiny(), tiny_input())
    before = rows(q)
    with torch.no_grad():
        q.fc.weight.mul_(2)
    after = rows(q)
    assert after[:3] == before[:3]
    assert after[3].clip == 2 * before[3].clip


def test_after_pickle_without_inputs_and_with():
    x = tiny_input()
    q = quantize(Tiny(), x)
    loaded = pickle.loads(pickle.dumps(q))
    assert [row.clip for row in rows(loaded)] == [None] * 4
    assert [(row.node, row.operand, row.bits, row.macs) for row in rows(loaded)] == [
        (row.node, row.operand, row.bits, row.macs) for row in rows(q)
    ]
    assert "quantized: 100.00% of 56 MACs" in table(loaded)
    assert table(loaded, x) == table(q)
    assert table(copy.deepcopy(q)) == table(q)


def test_inside_of_a_module_of_the_users():
    x = tiny_input()
    q = quantize(Tiny(), x)
    outer = nn.Sequential(q, nn.Softmax(-1))
    assert (table(outer), rows(outer), coverage(outer)) == (table(q), rows(q), coverage(q))
    for none_or_two, count in ((nn.Linear(2, 2), "no module"), (nn.ModuleList([q, copy.deepcopy(q)]), "2 modules")):
        for report in (table, rows, coverage):
            with pytest.raises(OctavError, match=rf"holds {count} that octav_fx\.quantize returned"):
                report(none_or_two)


class InParts(nn.Module):
    """What no graph holds: a branch on data around a product of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.idle = nn.Linear(8, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 2)), nn.Linear(8, 8)

    def forward(self, x):
        y = self.body(x)
        return self.head(y @ y.t() @ y) if y.sum() < 1e9 else self.idle(y)


def test_a_model_in_parts_names_the_graph_of_each_row():
    q = quantize(InParts(), torch.randn(4, 8))
    assert [(row.node, row.operand, row.graph, row.bits, row.macs) for row in rows(q)] == [
        ("body", "input", "body", 4, 4 * 64),
        ("body", "weight", "body", 4, 4 * 64),
        ("head.1", "input", "head", 8, 4 * 16),
        ("head.1", "weight", "head", 8, 4 * 16),
        ("forward", "", None, None, 2 * 4 * 4 * 8),
        ("idle", "", None, None, 0),
    ]
    assert sum(row.share for row in rows(q) if row.operand in ("input", "")) == pytest.approx(1)
    text = table(q)
    _, header, _, *lines = text.splitlines()
    place = header.index("graph")
    assert [line[place:].split()[0] for line in lines[2:4]] == ["head", "head"]
    assert lines[-3] == ""
    assert lines[-2] == "quantized: 55.56% of 576 MACs of what ran; 1 module did not run; 1 nodes keep float operands"
    assert re.fullmatch(r"the model: in parts, because .*test_rows\.py:\d+: forward needs bool\(lt\).*", lines[-1])


def test_a_model_in_one_graph_has_no_column_of_graphs():
    q = quantize(Tiny(), tiny_input())
    assert {row.graph for row in rows(q)} == {""}
    assert " graph" not in table(q).splitlines()[1]


def test_a_model_in_parts_is_measured_on_other_inputs():
    q, x = quantize(InParts(), torch.randn(4, 8)), torch.randn(4, 8)
    measured = rows(q, 2 * x)
    assert measured[0].max_abs == 2 * float(x.abs().max())
    assert measured[2].sqnr is not None and measured[4].sqnr is None


def test_rows_of_a_shared_quantizer_agree():
    x = torch.randn(4, 8)
    model = Applied(lambda m, x: m.a(x) + m.b(x), a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    one, _, two, _ = rows(quantize(model, x))
    assert (one.node, two.node) == ("a", "b")
    assert (one.clip, one.sqnr, one.zeros) == (two.clip, two.sqnr, two.zeros)


def test_values_that_are_not_finite_are_left_out():
    x = torch.randn(4, 8)
    q = quantize(nn.Linear(8, 8), x)
    broken = x.clone()
    broken[0, 0], broken[1, 1] = math.inf, math.nan
    first = rows(q, broken)[0]
    expected = [v for v in broken.flatten().tolist() if math.isfinite(v)]
    assert first.max_abs == max(map(abs, expected))
    assert first.clip == pytest.approx(clip_by_hand(expected, 4, True), rel=1e-5)
    assert math.isfinite(first.sqnr)


# As data.


def test_json_and_csv_hold_every_field():
    model = nn.Linear(4, 2, bias=False)
    found = rows(quantize(model, torch.zeros(1, 4), Config(overrides={"linear": {"weight_bits": 3}})))
    values = json.loads(found.to_json())
    assert [list(value) for value in values] == [[field.name for field in dataclasses.fields(octav_fx.Row)]] * 2
    # All zeros are exact: no JSON says infinity.
    assert found[0].sqnr == math.inf and values[0]["sqnr"] is None
    assert values[1]["shape"] == [2, 4] and values[1]["clip"] == found[1].clip
    lines = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert [(line["operand"], line["shape"], line["sqnr"], line["reason"]) for line in lines] == [
        ("input", "1x4", "inf", ""),
        ("weight", "2x4", repr(found[1].sqnr), ""),
    ]


def test_filter_and_sort():
    found = rows(quantize(Tiny(), tiny_input(), Config(overrides={"fc": None})))
    assert [row.node for row in found.chosen("c*")] == ["conv", "conv"]
    assert [row.operand for row in found.chosen(lambda row: row.bits is None)] == ["input", "weight"]
    by_error = found.chosen(sort="sqnr")
    assert [row.node for row in by_error] == ["conv", "conv", "fc", "fc"]
    assert by_error[0].sqnr < by_error[1].sqnr
    assert [row.sqnr for row in found.chosen(sort="-sqnr")[:2]] == [by_error[1].sqnr, by_error[0].sqnr]
    assert isinstance(by_error, octav_fx.Rows)
    with pytest.raises(OctavError, match=r"sort='error': one of node, op, .*, with - before it"):
        found.chosen(sort="error")


def test_a_data_frame(monkeypatch):
    found = rows(quantize(Tiny(), tiny_input()))
    made = types.SimpleNamespace(DataFrame=lambda values, columns: (values, columns))
    monkeypatch.setitem(sys.modules, "pandas", made)
    values, columns = found.to_pandas()
    assert columns[:3] == ["node", "op", "operand"] and values == [dataclasses.asdict(row) for row in found]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(OctavError, match="pip install pandas"):
        found.to_pandas()


def test_a_notebook_shows_a_table():
    text = rows(quantize(Tiny(), tiny_input(), Config(overrides={"fc": None})))._repr_html_()
    root = ElementTree.fromstring(text)
    assert len(root.findall(".//tbody/tr")) == 4
    assert [cell.text for cell in root.findall(".//tbody/tr[3]/td")][-1] == "override 'fc': None"
