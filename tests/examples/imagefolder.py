"""A tiny ImageFolder, networks to train on it, and what a run on it is asked for and leaves behind."""

import csv
import os
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from octav_fx import zoo

zoo.torchvision()

CLASSES = ("ant", "bee", "cat")
# Uneven on purpose: two ranks and batches of four divide neither.
SIZES = {"train": (9, 7, 3), "val": (5, 4, 2)}
PIXELS = 64


def write(data: Path) -> Path:
    """Noise around a brightness that goes with the class; PNG, as it loses nothing."""
    generator = torch.Generator().manual_seed(0)
    for split, sizes in SIZES.items():
        for label, (name, size) in enumerate(zip(CLASSES, sizes, strict=True)):
            (data / split / name).mkdir(parents=True)
            for i in range(size):
                noise = torch.randint(0, 120, (PIXELS, PIXELS + 7 * i, 3), generator=generator)
                pixels = (noise + 60 * label).to(torch.uint8).numpy()
                Image.fromarray(pixels).save(data / split / name / f"{i}.png")
    return data


class GroupNormNet(nn.Module):
    """Batch norm would see other batches on two ranks than on one; dropout draws on each rank."""

    def __init__(self, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 5, stride=2)
        self.norm = nn.GroupNorm(2, 8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.norm(self.conv(x)).relu()).relu()
        return self.fc(self.dropout(x.mean((2, 3))))


class BatchNormNet(GroupNormNet):
    """The same with batch norm and dropout."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, dropout=0.2)
        self.norm = nn.BatchNorm2d(8)


class Remembers(nn.Module):
    """In eval mode it answers by a buffer alone: the brightness of the last batch that this rank trained on."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(num_classes))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.last.copy_(x.mean())
            return self.bias.expand(len(x), -1)
        # Another answer for each image, all of them others if the buffer is another.
        chances = 1e4 * (self.last + x.mean((1, 2, 3)))
        return torch.stack([(chances * (1 + i)).sin() for i in range(len(self.bias))], 1)


class InfiniteOnOneRank(nn.Module):
    """The second layer is given infinity, on the second rank only."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=4)
        self.fc = nn.Linear(8, num_classes)
        self.factor = float("inf") if os.environ.get("RANK") == "1" else 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((self.conv(x).relu() * self.factor).mean((2, 3)))


def arguments(data, out, *more, model="BatchNormNet", batch=4, start=("--from-scratch",)):
    fixed = f"--recipe resnet18 --epochs 2 --size 32 --workers 0 --device cpu --lr 0.05 --batch {batch}".split()
    named = ["--model", f"tests.examples.imagefolder:{model}", "--out", out]
    return [str(value) for value in (data, *named, *fixed, *start, *more)]


def weights(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)["model"]


def curve(out):
    with (out / "curve.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def same(left, right):
    assert list(left) == list(right)
    return all(torch.equal(left[name], right[name]) for name in left)
