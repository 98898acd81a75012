"""Lives drawn by tests/support/fuzz_lives.py: what is done with a quantized model keeps what it promises."""

import itertools

import pytest
import torch

import octav_fx
from tests.support import fuzz_lives
from tests.support.fuzz_lives import fault


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_a_life(seed: int) -> None:
    assert fault(seed) is None


def test_a_fault_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_lives, "STEPS", {fuzz_lives._restart: 1})
    with monkeypatch.context() as changed:
        changed.setattr(octav_fx, "load_state", lambda *_: 1 / 0)
        assert "ZeroDivisionError" in str(fault(0))
    numbers = itertools.count()
    monkeypatch.setattr(fuzz_lives, "results", lambda *_: [torch.tensor(next(numbers))])
    assert "differs: a restart: " in str(fault(0))
