"""The table of training steps: each variant is compared with float in its precision."""

import pytest
import torch
from torch import nn

from benchmarks import models, result, step, worker
from benchmarks.variants import AUTOCAST, OWN


def test_ratios_are_to_the_fastest_float_of_the_same_precision(monkeypatch) -> None:
    ms = {"float eager": 10.0, "float Inductor": 8.0, "octav compiled": 12.0}
    ms |= {"float Inductor, bf16 autocast": 4.0, "octav compiled, bf16 autocast": 5.0}
    written = {}
    monkeypatch.setattr(worker, "run", lambda question, model, variant: {"ms": ms.get(variant, 20.0), "kept_ms": 5.0})
    monkeypatch.setattr(result, "write", written.__setitem__)
    monkeypatch.setattr(result, "has_vnni", lambda: True)
    step.main(rounds=1)
    rows = written["step"]["rows"]
    ratios = {row["variant"]: row["ratio"] for row in rows if row["model"] == "encoder"}
    assert {row["kept_ratio"] for row in rows} == {1}
    assert list(ratios) == [*OWN, *AUTOCAST]
    assert ratios["float eager"] == 1.25
    assert ratios["octav compiled"] == 1.5
    assert ratios["float Inductor, bf16 autocast"] == 1
    assert ratios["octav compiled, bf16 autocast"] == 1.25


def test_a_cpu_without_vnni_has_results_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    written = {}
    monkeypatch.setattr(worker, "run", lambda question, model, variant: {"ms": 1.0, "kept_ms": 1.0})
    monkeypatch.setattr(result, "write", written.__setitem__)
    monkeypatch.setattr(result, "has_vnni", lambda: False)
    step.main(rounds=1)
    assert list(written) == ["step_without_vnni"]
    variants = {row["variant"] for row in written["step_without_vnni"]["rows"]}
    assert variants == {"float eager", "float Inductor", "octav compiled", "octav compiled, integer"}


def test_the_forward_of_a_variant_under_autocast_computes_in_bfloat16(monkeypatch) -> None:
    monkeypatch.setattr(models, "load", lambda name: (nn.Linear(3, 2), torch.randn(4, 3), torch.zeros(4).long()))
    monkeypatch.setattr(torch, "compile", lambda model, **settings: model)
    for name in ("float Inductor", *AUTOCAST):
        _, forward, x, _ = worker._prepare("tiny", name)
        assert forward(x).dtype is (torch.bfloat16 if name in AUTOCAST else torch.float32)
