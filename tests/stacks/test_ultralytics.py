"""YOLO's own trainer, loss, validation and checkpoints, on generated images of two kinds of squares."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import octav_fx
from octav_fx import zoo
from tests.support.images import squares

pytestmark = pytest.mark.stacks


@pytest.fixture(scope="module")
def ultralytics(tmp_path_factory: pytest.TempPathFactory) -> Any:
    zoo.torchvision()
    pytest.importorskip("cv2")
    return pytest.importorskip("ultralytics")


# Its notes speak of the loss, which runs as Python over quantized layers where it is handed labels.
@pytest.mark.filterwarnings("ignore")
def test_train_at_several_sizes_fuse_validate_load_and_predict(ultralytics: Any, tmp_path: Path) -> None:
    from ultralytics.models.yolo.detect import DetectionTrainer

    class Trainer(DetectionTrainer):
        def get_model(self, *args: Any, **kwargs: Any) -> Any:
            return octav_fx.quantize(super().get_model(*args, **kwargs), torch.rand(2, 3, 64, 64))

    data = str(squares(tmp_path / "data"))
    settings = {"workers": 0, "device": "cpu", "project": str(tmp_path), "plots": False, "verbose": False}
    yolo = ultralytics.YOLO("yolov8n.yaml")
    more = {"epochs": 1, "imgsz": 64, "batch": 2, "amp": False, "multi_scale": 0.5, "name": "run"}
    yolo.train(trainer=Trainer, data=data, **more, **settings)
    q = yolo.trainer.model
    # The loss multiplies tensors of its own.
    found = octav_fx.coverage(q)
    assert {site for site, _, _ in found.skipped} <= {"forward", "model.22.dfl.conv"} and found.share > 0.99
    assert octav_fx.coverage(yolo.trainer.ema.ema).share > 0.99
    # What its checkpoint holds is fused with its batch norms when it is loaded, and quantized again then.
    loaded = ultralytics.YOLO(tmp_path / "run" / "weights" / "last.pt")
    assert loaded.predict(np.zeros((64, 64, 3), np.uint8), imgsz=64, verbose=False)[0].boxes is not None
    fused = loaded.predictor.model.backend.model
    assert fused.is_fused() and octav_fx.coverage(fused).share == 1
    loaded.val(data=data, imgsz=96, **settings)
