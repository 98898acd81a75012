"""Lightning's Trainer around a quantized network: fit, callbacks, precision, checkpoints."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import octav_fx
from octav_fx import OctavError, zoo

# A warning of a class of Lightning's makes the process that collects from xdist's workers import Lightning.
pytestmark = [pytest.mark.stacks, pytest.mark.filterwarnings("ignore")]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x)).relu())


@pytest.fixture(scope="module")
def lightning() -> Any:
    zoo.torchvision()
    return pytest.importorskip("lightning")


def module(lightning: Any, net: nn.Module) -> Any:
    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("loss", F.cross_entropy(self.net(batch[0]), batch[1]))

        def predict_step(self, batch: Any, index: int) -> Tensor:
            return self.net(batch[0])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 1e-2)

    return Module()


def loader() -> Any:
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(64, 8), torch.randint(3, (64,)))
    return torch.utils.data.DataLoader(data, 16)


def trainer(lightning: Any, folder: Path, **settings: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": True}
    return lightning.Trainer(default_root_dir=folder, accelerator="cpu", devices=1, **quiet, **settings)


def quantized(clip: str = "octav") -> nn.Module:
    torch.manual_seed(1)
    return octav_fx.quantize(Net(), torch.randn(4, 8), octav_fx.Config(clip=clip))


def test_fit_validate_predict_and_resume_to_the_same_weights(lightning: Any, tmp_path: Path) -> None:
    saved = lightning.pytorch.callbacks.ModelCheckpoint
    ended = []
    for epochs, first in ((4, None), (2, None), (4, tmp_path / "2" / "last.ckpt")):
        net = quantized()
        name = f"{epochs}" if first is None else "resumed"
        run = trainer(lightning, tmp_path, max_epochs=epochs, callbacks=[saved(tmp_path / name, save_last=True)])
        run.fit(module(lightning, net), loader(), loader(), ckpt_path=first)
        ended.append(net)
    straight, _, resumed = ended
    # The hints, where Newton starts, are not in a checkpoint; here it comes to the same clips without them.
    for name, value in straight.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    assert run.validate(module(lightning, resumed), loader(), verbose=False)[0]["loss"] < 1.2
    assert len(run.predict(module(lightning, resumed), loader())) == 4
    weights = torch.load(tmp_path / "resumed" / "last.ckpt", weights_only=True)["state_dict"]
    module(lightning, Net()).load_state_dict(weights)


SETTINGS: dict[str, dict[str, Any]] = {
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "accumulation": {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_the_trainer(lightning: Any, setting: str, tmp_path: Path) -> None:
    net = quantized()
    before = net.head.weight.detach().clone()
    trainer(lightning, tmp_path, max_epochs=1, **SETTINGS[setting]).fit(module(lightning, net), loader())
    assert not torch.equal(net.head.weight.float(), before)


def test_averages_of_weights_and_learned_clips(lightning: Any, tmp_path: Path) -> None:
    callbacks = lightning.pytorch.callbacks
    for callback in (
        callbacks.StochasticWeightAveraging(1e-2, swa_epoch_start=1),
        callbacks.EMAWeightAveraging(),
    ):
        net = quantized("lsq")
        clip = next(p for name, p in net.named_parameters() if "quantizers" in name)
        before = clip.detach().clone()
        trainer(lightning, tmp_path, max_epochs=3, callbacks=[callback]).fit(module(lightning, net), loader())
        assert octav_fx.coverage(net).share == 1 and not torch.equal(clip, before)


def test_what_graphs_have_no_place_for_is_refused(lightning: Any, tmp_path: Path) -> None:
    net = module(lightning, quantized())
    summary = importlib.import_module("lightning.pytorch.utilities.model_summary")
    summary.summarize(net, max_depth=1)
    with pytest.raises(OctavError, match=r"body of Net would never run this hook"):
        summary.summarize(net, max_depth=-1)
    with pytest.raises(OctavError, match=r"octav_fx\.export_onnx write this model"):
        net.to_onnx(tmp_path / "net.onnx", torch.randn(4, 8))
    # Frozen, the net inside is what it was.
    octav_fx.freeze(octav_fx.calibrate(net.net.eval(), loader()))
    run = trainer(lightning, tmp_path)
    assert run.validate(net, loader(), verbose=False)[0]["loss"] > 0
