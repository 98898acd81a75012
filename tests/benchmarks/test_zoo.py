"""The coverage benchmark: a row for every model, whatever becomes of it."""

import os
import time

import pytest
import torch
from torch import Tensor, nn

from benchmarks import result, zoo, zoo_models, zoo_timm, zoo_transformers
from benchmarks.zoo_models import Entry


class Branches(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


def entry(make) -> Entry:
    return Entry("library", "family", "name", make)


def measured(made: Entry) -> zoo.Row:
    row = zoo.measured(made, "sources")
    # Torch 2.11, whether another test of this process had gradients is a matter of chance.
    if "OCTAV_FX_TORCH" in os.environ and "fork-based multiprocessing" in str(row):
        pytest.skip("this torch has no gradients in a fork of a process that had some")
    return row


def needs(library: str) -> None:
    # timm imports torchvision, which needs the ops that listing the models declares.
    zoo_models.entries()
    pytest.importorskip(library, reason=f"{library} is not installed: pip install 'octav_fx[zoo]'")


def check_right(row: zoo.Row) -> None:
    assert row["captured"] == "yes"
    assert row["share"] == 1
    assert row["float nodes"] == row["off grid"] == []
    assert row["contractions"] > 0
    assert row["float_mode equal"] is True
    assert row["step"] == "finite"
    assert row["graphs"] == 1
    assert "stopped" not in row


@pytest.mark.models
def test_torchvision_squeezenet():
    made = next(made for made in zoo_models.entries() if made.name == "squeezenet1_1")
    assert (made.library, made.family) == ("torchvision", "squeezenet")
    check_right(measured(made))


@pytest.mark.models
def test_timm_test_vit():
    needs("timm")
    check_right(measured(Entry("timm", "vision_transformer", "test_vit", zoo_timm.make)))


@pytest.mark.models
def test_transformers_bert():
    needs("transformers")
    name = "BertForSequenceClassification"
    row = measured(Entry("transformers", "bert", name, zoo_transformers.make))
    assert row["captured"]
    assert row["graphs"] == 1


def test_a_model_whose_quantize_takes_longer_than_three_seconds_and_ten_forwards_is_slow():
    names = {"library": "timm", "family": "vit", "captured": "yes", "forward seconds": 0.1}
    rows = [{**names, "seconds": seconds} for seconds in (3.9, 4.1)]
    assert zoo._summary(rows, "timm", "vit")["slow"] == 1


def test_every_model_of_torchvision_but_those_of_quantized_kernels():
    names = {made.name for made in zoo_models.entries() if made.library == "torchvision"}
    assert {"resnet18", "fcn_resnet50", "r3d_18", "raft_small", "ssd300_vgg16"} <= names
    assert not any("quantized" in name for name in names)


@pytest.mark.slow
def test_what_is_not_captured_says_why_and_what_the_backend_does_with_it():
    row = measured(entry(lambda _: (Branches(4, 4), torch.ones(2, 4))))
    assert row["captured"].startswith("NotCaptured: ")
    assert "depends on the data" in row["captured"]
    assert row["graphs"] > 0
    assert "share" not in row


@pytest.mark.slow
def test_contractions_that_octav_fx_does_not_count_are_named():
    row = measured(entry(lambda _: (Recurrent(), torch.ones(2, 3, 4))))
    assert row["captured"] == "yes"
    assert list(row["uncounted"]) == ["mkldnn_rnn_layer"]


def test_what_cannot_be_made_says_why():
    row = measured(entry(lambda _: (nn.Linear(-1, 1), torch.ones(1))))
    assert row["captured"].startswith("not made: RuntimeError: ")


def endless() -> None:
    while True:
        pass


@pytest.mark.slow
def test_a_crash_and_a_hang_are_rows(monkeypatch):
    assert measured(entry(lambda _: os._exit(3)))["stopped"] == "exit 3 after the start"
    monkeypatch.setattr(zoo, "MODEL_LIMIT", 1)
    assert measured(entry(lambda _: endless()))["stopped"] == "over 1 s after the start"
    monkeypatch.setattr(zoo, "MODEL_LIMIT", 0.1)
    assert measured(entry(lambda _: time.sleep(60)))["stopped"] == "waits after the start"


def test_a_run_goes_on_where_it_stopped(monkeypatch, tmp_path, capsys):
    made = []

    def columns(measure, entry, limit):
        made.append(entry.name)
        time.sleep(0.2)
        return {"captured": "yes"}

    entries = [Entry("torchvision", "family", name, lambda _: None) for name in ("one", "two")]
    monkeypatch.setattr(result, "RESULTS", tmp_path)
    monkeypatch.setattr(result, "environment", dict)
    monkeypatch.setattr(zoo_models, "entries", lambda: entries)
    monkeypatch.setattr(zoo.forked, "columns", columns)
    monkeypatch.setattr(zoo, "MODEL_LIMIT", 0)
    zoo.main(0.1)
    assert made == ["one"]
    assert "1 of 2 models are left" in capsys.readouterr().out
    zoo.main(None)
    zoo.main(None)
    assert made == ["one", "two"]
    assert [row["name"] for row in result.read("zoo")["rows"]] == ["one", "two"]
