"""The demo: ResNet-18 on scikit-learn's handwritten digits, in float and then at 4 bits, with the same recipe."""

import importlib
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

from octav_fx import zoo
from octav_fx.cli.compare import compared
from octav_fx.cli.output import as_text
from octav_fx.cli.progress import stage
from octav_fx.config import Config
from octav_fx.deploy.export import export_onnx
from octav_fx.deploy.freeze import calibrate, freeze
from octav_fx.errors import OctavError
from octav_fx.reporting.report.page import report
from octav_fx.reporting.table import table
from octav_fx.training.quantize import quantize

PIXELS = 64
BATCH = 32
LEARNING_RATE = 0.02


@dataclass(frozen=True, slots=True)
class Data:
    """Images [N, 3, PIXELS, PIXELS] with mean 0 and variance 1, labels [N]."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True, slots=True)
class Outcome:
    """Shares of the test images classified right, and median milliseconds of a training step."""

    float_accuracy: float
    quantized_accuracy: float
    float_ms: float
    quantized_ms: float


def digits(seed: int) -> Data:
    """Return scikit-learn's 1797 digits of 8 x 8 pixels, scaled up, in three equal channels; a quarter is for tests."""
    source = _optional("sklearn.datasets").load_digits()
    images = torch.tensor(source.images, dtype=torch.float32).unsqueeze(1)
    images = F.interpolate(images, size=(PIXELS, PIXELS), mode="bilinear", align_corners=False)
    images = ((images - images.mean()) / images.std()).expand(-1, 3, -1, -1)
    labels = torch.tensor(source.target, dtype=torch.long)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, test = order[len(order) // 4 :], order[: len(order) // 4]
    return Data(images[train], labels[train], images[test], labels[test])


def train(model: nn.Module, data: Data, epochs: int, title: str) -> float:
    """Train by SGD with momentum and a cosine schedule; return the median milliseconds of a step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=1e-4)
    batches = len(data.train_images) // BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    bar = _optional("tqdm").tqdm(total=epochs * batches, desc=title, unit="step")
    times = []
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(data.train_images))
        for chosen in order[: batches * BATCH].split(BATCH):
            start = time.perf_counter()
            optimizer.zero_grad()
            loss = F.cross_entropy(model(data.train_images[chosen]), data.train_labels[chosen])
            loss.backward()
            optimizer.step()
            times.append(time.perf_counter() - start)
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update()
    bar.close()
    return 1e3 * statistics.median(times)


def accuracy(model: nn.Module, data: Data) -> float:
    """Share of the test images that are classified right."""
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(images).argmax(1) for images in data.test_images.split(128)])
    return float((found == data.test_labels).float().mean())


def main(epochs: int = 4, seed: int = 0, folder: Path | None = None) -> Outcome:
    """Train in float, quantize, train again; print the table, both accuracies and step times, and return them.

    folder: where to write the integers for onnxruntime and a report; None for nowhere. Both models are timed then.
    """
    torch.manual_seed(seed)
    data = digits(seed)
    model = zoo.load("resnet18", num_classes=10)
    float_ms = train(model, data, epochs, "float")
    float_accuracy = accuracy(model, data)

    # Integer runtimes are fast only with both inputs of residual sums rounded.
    quantized = quantize(model.train(), data.train_images[:BATCH], Config(residual_bits=8))
    before = accuracy(quantized, data)
    quantized_ms = train(quantized, data, epochs, "4 bits")
    quantized_accuracy = accuracy(quantized, data)

    print(table(quantized))
    print()
    rows = [
        ["float", f"{float_accuracy:.2%}", f"{float_ms:.1f}", "1.00"],
        ["4 bits, before training", f"{before:.2%}", "", ""],
        ["4 bits, trained", f"{quantized_accuracy:.2%}", f"{quantized_ms:.1f}", f"{quantized_ms / float_ms:.2f}"],
    ]
    print(tabulate(rows, ["ResNet-18 on digits", "accuracy", "ms / step", "ratio"], disable_numparse=True))
    if folder is not None:
        _deploy(model.eval(), quantized, data, folder)
    return Outcome(float_accuracy, quantized_accuracy, float_ms, quantized_ms)


def _deploy(model: nn.Module, quantized: nn.Module, data: Data, folder: Path) -> None:
    """Write an ONNX file and a report, and print how fast float and integers are, one image at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    batches = data.train_images[: 8 * BATCH].split(BATCH)
    freeze(calibrate(quantized.eval(), batches))
    image, file = data.test_images[:1], folder / "resnet18.onnx"
    with stage("writing and timing"):
        export_onnx(quantized, image, file)
        found = compared(model, quantized, image, seconds=1.0, quantized_file=file)
    print(f"\nclips frozen: {accuracy(quantized, data):.2%}. One image at a time:\n\n{as_text(found)}\n")
    with stage("measuring"):
        page = report(quantized, folder / "report.html", title="ResNet-18 on digits, 4 bits")
    print(f"{file} is for onnxruntime; open {page} in a browser")


def _optional(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise OctavError(f"the demo needs {error.name}: pip install 'octav_fx[demo]'") from error
