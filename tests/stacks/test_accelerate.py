"""accelerate's own loop: prepare, accumulate, save_state, load_state."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import octav_fx
from octav_fx import zoo

pytestmark = pytest.mark.stacks


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x)).relu())


@pytest.fixture
def accelerate() -> Any:
    zoo.torchvision()
    found = pytest.importorskip("accelerate")
    yield found
    # Settings of one Accelerator are those of all others in a process.
    found.state.AcceleratorState._reset_state(True)


def train(
    accelerator: Any, epochs: int, clip: str = "octav", load: Path | None = None, save: Path | None = None
) -> Any:
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(64, 8), torch.randint(3, (64,)))
    q = octav_fx.quantize(Net(), torch.randn(4, 8), octav_fx.Config(clip=clip))
    optimizer = torch.optim.AdamW(q.parameters(), 1e-2)
    q, optimizer, loader = accelerator.prepare(q, optimizer, torch.utils.data.DataLoader(data, 16))
    if load is not None:
        accelerator.load_state(load)
    for _ in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(q):
                accelerator.backward(F.cross_entropy(q(x), y))
                accelerator.clip_grad_norm_(q.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    if save is not None:
        accelerator.save_state(save)
    return q


@pytest.mark.parametrize("clip", ["octav", "lsq"])
def test_a_state_that_is_loaded_goes_on(accelerate: Any, clip: str, tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    train(accelerator, 1, clip, save=tmp_path)
    straight = train(accelerate.Accelerator(cpu=True), 2, clip)
    resumed = train(accelerate.Accelerator(cpu=True), 1, clip, load=tmp_path)
    assert straight.state_dict().keys() == resumed.state_dict().keys()
    # The hints, where Newton starts, are not in a checkpoint; here it comes to the same clips without them.
    for name, value in straight.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("settings", [{"gradient_accumulation_steps": 2}, {"mixed_precision": "bf16"}])
def test_settings_of_the_accelerator(accelerate: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True, **settings)
    q = train(accelerator, 1)
    accelerator.save_model(q, tmp_path)
    files = pytest.importorskip("safetensors.torch")
    unwrapped = accelerator.unwrap_model(q)
    loaded = Net()
    loaded.load_state_dict(files.load_file(tmp_path / "model.safetensors"))
    assert torch.equal(loaded.head.weight, unwrapped.head.weight) and isinstance(unwrapped, Net)
    unwrapped.eval()
    octav_fx.freeze(octav_fx.calibrate(unwrapped, [torch.randn(4, 8)]))
    assert octav_fx.convert(unwrapped)(torch.randn(2, 8)).shape == (2, 3)
