"""ImageNet's folders: what must be there, the transforms, and which image goes to which rank."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.distributed import DistributedSampler

from benchmarks.train.ranks import Ranks
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
    """Training and validation images. Raises OctavError where the folders are not as LAYOUT says."""
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


class _From(Sampler[int]):
    """Another sampler's indices without the first ones, which a resumed epoch has had."""

    def __init__(self, sampler: DistributedSampler[Any], done: int) -> None:
        self.sampler, self.done = sampler, done

    def __len__(self) -> int:
        return len(self.sampler) - self.done

    def __iter__(self) -> Iterator[int]:
        yield from list(self.sampler)[self.done :]


def training(
    images: Images, ranks: Ranks, batch: int, epoch: int, done: int, workers: int
) -> DataLoader[tuple[Tensor, int]]:
    """One epoch of this rank's batches, whole ones, without the first `done`.

    Over the ranks together step i has the images that one process with a batch as large as all of theirs would have.
    """
    images.epoch = epoch
    sampler: DistributedSampler[Any] = DistributedSampler(
        images, ranks.world, ranks.rank, shuffle=True, seed=images.seed, drop_last=True
    )
    sampler.set_epoch(epoch)
    if len(sampler) < batch:
        raise OctavError(f"{len(images)} training images do not fill one batch of {batch} on {ranks.world} ranks")
    return _loader(images, _From(sampler, done * batch), ranks, batch, workers, drop_last=True)


def validation(images: Images, ranks: Ranks, batch: int, workers: int) -> DataLoader[tuple[Tensor, int]]:
    """This rank's share, padded with the first images so that every rank makes equally many steps: see counted()."""
    sampler: DistributedSampler[Any] = DistributedSampler(images, ranks.world, ranks.rank, shuffle=False)
    return _loader(images, sampler, ranks, batch, workers, drop_last=False)


def counted(step: int, batch: int, size: int, ranks: Ranks, length: int) -> Tensor:
    """Which of the `size` images of a validation step are no padding, bool [size].

    DistributedSampler deals the images out like cards: rank r's i-th is the (r + i * world)-th of length, or padding.
    """
    position = ranks.rank + (step * batch + torch.arange(size)) * ranks.world
    return position < length


def _loader(
    images: Images, sampler: Sampler[int], ranks: Ranks, batch: int, workers: int, *, drop_last: bool
) -> DataLoader[tuple[Tensor, int]]:
    pinned = ranks.device.type == "cuda"
    return DataLoader(images, batch, sampler=sampler, num_workers=workers, pin_memory=pinned, drop_last=drop_last)
