"""./dev bench inference: what it keeps, and what it measures again."""

import torch
from torch import nn

from benchmarks import inference, result


def test_it_runs_in_pieces(monkeypatch, tmp_path):
    measured = []

    def load(name, batch):
        measured.append((name, batch))
        return nn.Identity(), torch.zeros(batch, 1)

    def fails(case):
        raise RuntimeError("no such op")

    monkeypatch.setattr(result, "RESULTS", tmp_path)
    monkeypatch.setattr(inference, "load", load)
    monkeypatch.setattr(inference, "MODELS", ("one", "other"))
    variants = {"float": lambda case: lambda: case.model(case.x), "fails": fails, "absent": fails}
    monkeypatch.setattr(inference, "VARIANTS", {name: (make, "float") for name, make in variants.items()})
    monkeypatch.setattr(inference, "_NEEDS", {"absent": ("no_such_package",)})
    inference.main(1, "oth*", [4])
    assert measured == [("other", 4)]
    inference.main(1, "*", [4, 1])
    assert measured == [("other", 4), ("one", 4), ("one", 1), ("other", 1)]
    rows = result.read(result.of_cpu("inference"))["rows"]
    assert [(row["model"], row["batch"]) for row in rows[::3]] == [("one", 1), ("one", 4), ("other", 1), ("other", 4)]
    assert [row["note"] for row in rows[:3]] == ["", "no such op", "not installed: no_such_package"]
    assert rows[0]["ratio"] == 1.0
    # Other sources: all of it anew.
    monkeypatch.setattr(result, "sources", lambda: "other")
    inference.main(1, "one", [1])
    assert len(measured) == 5
