"""ImageNet's folders: what has to be there, and the transforms."""

from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.utils.data import Dataset

from octav_fx import OctavError, zoo

MEAN: Final = (0.485, 0.456, 0.406)
STD: Final = (0.229, 0.224, 0.225)
# An image is scaled to 256 for a crop of 224.
_SCALE: Final = 256 / 224
_PRIME: Final = 1_000_003

LAYOUT: Final = """expected:
  DATA/train/CLASS/*.JPEG   a folder for each class, at least one image in each
  DATA/val/CLASS/*.JPEG     the same classes"""


class Images(Dataset[tuple[Tensor, int]]):
    """The images [3, size, size] and labels of DATA/train or DATA/val.

    What a training image's crop and flip are follows from (seed, epoch, index) alone: not from the rank, the worker or
    the step at which a run was resumed.
    """

    def __init__(self, data: Path, split: str, size: int, seed: int) -> None:
        torchvision = zoo.torchvision()
        transforms = torchvision.transforms
        ending = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        crops = {
            "train": [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()],
            "val": [transforms.Resize(round(size * _SCALE)), transforms.CenterCrop(size)],
        }
        try:
            self.files = torchvision.datasets.ImageFolder(str(data / split))
        except FileNotFoundError as error:
            raise OctavError(f"{data / split}: {error}\n{LAYOUT}") from error
        self.transform = transforms.Compose([*crops[split], *ending])
        self.seed, self.epoch = seed, 0

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of their labels."""
        return list(self.files.classes)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            image, label = self.files[index]
        except OSError as error:
            raise OctavError(f"{self.files.samples[index][0]}: no image that can be read: {error}") from error
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((self.seed * _PRIME + self.epoch) * _PRIME + index)
            return self.transform(image), label


def folders(data: Path, size: int, seed: int) -> tuple[Images, Images]:
    """Return training and validation images. Raises OctavError where the folders are not as LAYOUT says."""
    if missing := [str(path) for path in (data, data / "train", data / "val") if not path.is_dir()]:
        raise OctavError(f"no folder {missing[0]}\n{LAYOUT}")
    for split in ("train", "val"):
        if not any(child.is_dir() for child in (data / split).iterdir()):
            raise OctavError(f"no class folder in {data / split}\n{LAYOUT}")
    train, val = Images(data, "train", size, seed), Images(data, "val", size, seed)
    if different := sorted(set(train.classes) ^ set(val.classes)):
        where = "train" if different[0] in train.classes else "val"
        raise OctavError(f"class {different[0]!r} is only in {data / where}\n{LAYOUT}")
    return train, val
