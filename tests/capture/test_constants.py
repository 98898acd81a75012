"""Constants: a plain value that users set anew, on a layer or in a file, makes a new graph."""

import pytest
import torch
from torch import Tensor, nn

import octav_fx
from octav_fx.capture.constants import Constants

FACTOR = 2.0
SIGN = True
UNREAD = 1


def scaled(x: Tensor) -> Tensor:
    return x * FACTOR


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Conv1d(8, 8, 3, padding=1)

    @property
    def signed(self) -> bool:
        return SIGN

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(scaled(self.first(x)).unsqueeze(2).expand(-1, -1, 6))
        return y if self.signed else -y


def test_globals_of_forward_and_of_what_it_calls_are_found() -> None:
    found = {row.name: row.value for row in Constants.of(Net()).rows if row.holder == __name__}
    assert found == {"FACTOR": 2.0, "SIGN": True}


@pytest.mark.parametrize(("name", "value"), [("FACTOR", -3.0), ("SIGN", False)])
def test_a_global_that_changes_is_followed(monkeypatch: pytest.MonkeyPatch, name: str, value: object) -> None:
    model, x = Net().eval(), torch.randn(4, 8)
    q = octav_fx.quantize(model, x)
    with octav_fx.float_mode(q):
        assert torch.equal(q(x), model(x))
    before = q(x)
    monkeypatch.setitem(globals(), name, value)
    with octav_fx.float_mode(q):
        assert torch.equal(q(x), model(x))
    assert not torch.equal(q(x), before)
    monkeypatch.undo()
    assert torch.equal(q(x), before)


def test_a_setting_of_a_layer_that_changes_is_followed() -> None:
    model, x = Net().eval(), torch.randn(4, 8)
    q = octav_fx.quantize(model, x)
    q.second.stride = model.second.stride = (2,)
    with octav_fx.float_mode(q):
        assert torch.equal(q(x), model(x))
    assert q(x).shape == (4, 8, 3)
