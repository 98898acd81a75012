"""Which example goes to which rank, and how often it counts."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from examples.common.distributed import Ranks, process_group
from examples.common.samplers import once, training, validation
from examples.imagenet import train as imagenet
from examples.imagenet.data import folders
from tests.examples import imagefolder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return imagefolder.write(tmp_path_factory.mktemp("imagefolder"))


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [1, 7, 16, 17])
def test_each_validation_image_is_counted_once(length, world):
    images, batch, seen = TensorDataset(torch.arange(length)), 3, []
    steps = set()
    for rank in range(world):
        ranks = Ranks(rank, world, CPU)
        loader = validation(images, ranks, batch, 0)
        steps.add(len(loader))
        for step, (index,) in enumerate(loader):
            seen += index[once(step, batch, len(index), ranks, length)].tolist()
    assert sorted(seen) == list(range(length))
    # FSDP2 gathers in every forward: a rank with one step less would leave the others waiting.
    assert len(steps) == 1


def test_top1_and_top5_of_known_logits():
    logits = torch.arange(10.0).expand(7, 10).clone()
    labels = torch.tensor([9, 8, 5, 4, 0, 9, 6])
    with process_group("cpu") as ranks:
        found = imagenet.validate(nn.Identity(), TensorDataset(logits, labels), ranks, 3, 0)
    assert found == {"top1": 2 / 7, "top5": 5 / 7, "images": 7}


@pytest.mark.ranks
def test_the_ranks_share_one_batch_out_and_resume_in_its_middle(data):
    images, _ = folders(data, 32, seed=3)
    images.epoch = 1
    alone = list(training(images, Ranks(0, 1, CPU), 4, seed=3, epoch=1))
    shares = [list(training(images, Ranks(rank, 2, CPU), 2, seed=3, epoch=1)) for rank in range(2)]
    for (x, labels), *parts in zip(alone, *shares, strict=True):
        # Dealt out like cards.
        assert torch.equal(torch.stack([part[0] for part in parts], 1).flatten(0, 1), x)
        assert torch.equal(torch.stack([part[1] for part in parts], 1).flatten(), labels)
    resumed = list(training(images, Ranks(0, 1, CPU), 4, seed=3, epoch=1, done=3, workers=2))
    assert len(resumed) == len(alone) - 3
    assert all(torch.equal(a[0], b[0]) for a, b in zip(resumed, alone[3:], strict=True))
    # Another epoch: another order, and of each image another crop.
    crop = images[0][0]
    images.epoch = 2
    assert not torch.equal(next(iter(training(images, Ranks(0, 1, CPU), 4, seed=3, epoch=2)))[0], alone[0][0])
    assert not torch.equal(images[0][0], crop)
