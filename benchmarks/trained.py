"""The nets of the deployment benchmarks, briefly trained: images on digits, GPT on the source of Python's library."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import models
from benchmarks.inference import GPT
from benchmarks.study.text import Text
from octav_fx import demo, zoo

NETS: Final = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "encoder", "gpt")
INPUTS: Final = 256
# Two by two places are left for the last mean, behind 32-fold strides.
_PIXELS: Final = 40
_BATCH: Final = 32
_STEPS: Final = 120
# After quantization, at a tenth of the learning rate: a third costs the float ResNet-18 3.5 points too.
_RETRAINED: Final = 20
_LEARNING_RATE: Final = 1e-3


@dataclass(frozen=True)
class Task:
    """A net, what it is trained on, and 256 inputs that it has not seen with their classes."""

    model: nn.Module
    batch: Callable[[], tuple[Tensor, Tensor]]
    x: Tensor
    classes: Tensor


def task(name: str) -> Task:
    """Return a net, not trained yet, and its data: images of 40 px, 16 tokens of four rows of 64, or 32 bytes."""
    torch.manual_seed(0)
    if name == "gpt":
        text = Text(seed=0, batch=16, length=32, windows=INPUTS)
        x, classes = (torch.cat(parts) for parts in zip(*text.test(), strict=True))
        return Task(GPT(), lambda: text.batch(int(torch.randint(2**31, ()))), x, classes)
    data = demo.digits(0)

    def images(x: Tensor) -> Tensor:
        if name == "encoder":
            return x[:, 0].reshape(-1, 16, 256)
        return F.interpolate(x, size=_PIXELS, mode="area").contiguous(memory_format=torch.channels_last)

    def batch() -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(data.train_images), (_BATCH,))
        return images(data.train_images[chosen]), data.train_labels[chosen]

    model = models.Encoder() if name == "encoder" else zoo.load(name, num_classes=10)
    return Task(model, batch, images(data.test_images[:INPUTS]), data.test_labels[:INPUTS])


def train(model: nn.Module, given: Task, steps: int = _STEPS, learning_rate: float = _LEARNING_RATE) -> nn.Module:
    """Train by AdamW in one cycle of learning rates, and return the model in eval mode."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps)
    model.train()
    for _ in range(steps):
        x, classes = given.batch()
        optimizer.zero_grad()
        F.cross_entropy(model(x).movedim(-1, 1), classes).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def retrain(model: nn.Module, given: Task) -> nn.Module:
    """Train a quantized model a little further."""
    return train(model, given, _RETRAINED, _LEARNING_RATE / 10)
