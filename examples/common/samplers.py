"""Examples for each rank: all of them once, in batches that do not depend on how many ranks there are."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.distributed import DistributedSampler

from examples.common.distributed import Ranks
from octav_fx import OctavError


class _From(Sampler[int]):
    """Another sampler's indices without the first ones, which a resumed epoch has had."""

    def __init__(self, sampler: DistributedSampler[Any], done: int) -> None:
        self.sampler, self.done = sampler, done

    def __len__(self) -> int:
        return len(self.sampler) - self.done

    def __iter__(self) -> Iterator[int]:
        yield from list(self.sampler)[self.done :]


def training(
    examples: Dataset[Any], ranks: Ranks, batch: int, seed: int, epoch: int, done: int = 0, workers: int = 0
) -> DataLoader[Any]:
    """Return one epoch of this rank's batches, whole ones, without the first `done`.

    Over the ranks together step i has the examples that one process with a batch as large as all of theirs would have.
    Raises OctavError where there is not one whole batch.
    """
    sampler: DistributedSampler[Any] = DistributedSampler(
        examples, ranks.world, ranks.rank, shuffle=True, seed=seed, drop_last=True
    )
    sampler.set_epoch(epoch)
    total = len(examples)  # type: ignore[arg-type]  # a Dataset need not have a length; these have
    if total // ranks.world < batch:
        raise OctavError(f"{total} training examples do not fill one batch of {batch} on {ranks.world} ranks")
    return _loader(examples, _From(sampler, done * batch), ranks, batch, workers, drop_last=True)


def validation(examples: Dataset[Any], ranks: Ranks, batch: int, workers: int = 0) -> DataLoader[Any]:
    """Return this rank's share, padded with the first examples so that all ranks make as many steps: see once()."""
    sampler: DistributedSampler[Any] = DistributedSampler(examples, ranks.world, ranks.rank, shuffle=False)
    return _loader(examples, sampler, ranks, batch, workers, drop_last=False)


def once(step: int, batch: int, size: int, ranks: Ranks, total: int) -> Tensor:
    """Return which of the `size` examples of a validation step are no padding, bool [size].

    DistributedSampler deals the examples out like cards: rank r's i-th is number r + i * world of total, or padding.
    """
    return ranks.rank + (step * batch + torch.arange(size)) * ranks.world < total


def _loader(
    examples: Dataset[Any], sampler: Sampler[int], ranks: Ranks, batch: int, workers: int, *, drop_last: bool
) -> DataLoader[Any]:
    pinned = ranks.device.type == "cuda"
    return DataLoader(examples, batch, sampler=sampler, num_workers=workers, pin_memory=pinned, drop_last=drop_last)
