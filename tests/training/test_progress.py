"""What a long quantize() shows."""

import io
from typing import Any

import pytest
import torch
from torch import nn

import octav_fx
from octav_fx.training import progress as shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("has_tqdm", [True, False])
@pytest.mark.parametrize("is_long", [True, False])
def test_a_long_one_says_what_it_does(monkeypatch: pytest.MonkeyPatch, has_tqdm: bool, is_long: bool) -> None:
    if has_tqdm:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setattr(shown, "importlib", _WithoutTqdm)
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(shown, "_DELAY", 0.0 if is_long else 1e9)
    octav_fx.quantize(nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8))
    assert ("octav_fx.quantize" in terminal.getvalue()) is is_long
    # Nothing is left of it.
    assert not terminal.getvalue().split("\r")[-1].strip()


class _WithoutTqdm:
    @staticmethod
    def import_module(name: str) -> Any:
        raise ModuleNotFoundError(name)


def test_nothing_is_shown_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr("sys.stderr", file)
    monkeypatch.setattr(shown, "_DELAY", 0.0)
    octav_fx.quantize(nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8))
    assert file.getvalue() == ""
