"""Passes over integers, on any CPU."""

from typing import Any

import pytest

from octav_fx.ops import onednn


class _AnyProduct:
    """octav_fx.ops.onednn for a pass, with products of any size."""

    def __getattr__(self, name: str) -> Any:
        return getattr(onednn, name)

    def refusal(self, x_bits: int, largest: int) -> None:
        """Refuse nothing."""


@pytest.fixture
def as_with_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every layer multiply integers; on a CPU without VNNI the ops run their references where sums saturate."""
    monkeypatch.setattr("octav_fx.passes.convert.integer_layers.onednn", _AnyProduct())
