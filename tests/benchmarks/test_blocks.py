"""The step of a transformer of blocks: each is compiled by itself in both variants, which step in turn."""

from typing import Any

import pytest
from torch import nn

import octav_fx
from benchmarks import blocks, result


@pytest.mark.compile
@pytest.mark.parametrize("linear", [nn.Linear, blocks.Conv1D])
def test_each_block_of_both_variants_is_compiled_and_the_ratio_is_to_float(
    monkeypatch: pytest.MonkeyPatch, linear: Any
) -> None:
    variants = ["float Inductor", "octav compiled"]
    written: dict[str, Any] = {}
    made: list[nn.Module] = []
    prepared = blocks.prepared

    def noted(name: str) -> nn.Module:
        made.append(prepared(name))
        return made[-1]

    for name, value in {"LAYERS": 2, "WIDTH": 8, "BATCH": 2, "TOKENS": 4, "WARM_UP": 1, "STEPS": 1}.items():
        monkeypatch.setattr(blocks, name, value)
    monkeypatch.setattr(blocks, "VARIANTS", {name: (linear, {"backend": "eager"}) for name in variants})
    monkeypatch.setattr(blocks, "prepared", noted)
    monkeypatch.setattr(result, "write", written.__setitem__)
    blocks.main(rounds=1)
    rows = written["blocks"]["rows"]
    assert [row["variant"] for row in rows] == variants and rows[0]["ratio"] == 1
    for model in made:
        compiled = [m for m in model.modules() if m._compiled_call_impl is not None]
        assert len(compiled) == 2 and all(isinstance(m, blocks.Block) for m in compiled)
    assert octav_fx.coverage(made[1]).share == 1
