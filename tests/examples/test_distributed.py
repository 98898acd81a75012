"""Two ranks of torchrun on the CPU, with DistributedDataParallel and FSDP2, beside one process."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from examples.common.checkpoint import Progress, restore, save
from examples.common.distributed import parallelize, process_group
from examples.imagenet import train as imagenet
from examples.imagenet.data import folders
from octav_fx import OctavError, quantize
from tests.examples import imagefolder, torchrun
from tests.examples.imagefolder import SIZES, GroupNormNet, Remembers, arguments, curve, same, weights
from tests.support.blocks import Net, batch

pytestmark = pytest.mark.ranks

STEPS = sum(SIZES["train"]) // 4


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return imagefolder.write(tmp_path_factory.mktemp("imagefolder"))


def test_hints_and_running_means_are_in_a_checkpoint(tmp_path):
    """Where Newton starts decides a clip's last digits; freezing reads the means."""
    path, progress, found, mean = tmp_path / "checkpoint.pt", Progress(step=7, loss=3.0), Progress(), Progress()
    one, two = (quantize(GroupNormNet(3), scale * torch.randn(2, 3, 32, 32)) for scale in (1, 5))
    optimizers = [torch.optim.SGD(q.parameters(), 0.1, momentum=0.9) for q in (one, two)]
    with process_group("cpu"):
        one(torch.randn(2, 3, 32, 32)).sum().backward()
        optimizers[0].step()
        save(path, one, optimizers[0], progress, {"seed": 0})
        restore(path, two, optimizers[1], found, {"seed": 0})
        # As two ranks would have left it: on one, each step's loss is the mean of theirs.
        of_two = torch.load(path, weights_only=True)
        of_two["ranks"] = [of_two["ranks"][0], {**of_two["ranks"][0], "loss": 5.0}]
        torch.save(of_two, path)
        restore(path, two, optimizers[1], mean, {"seed": 0})
    assert found == progress
    assert mean.loss == 4
    assert same(dict(two.named_buffers()), dict(one.named_buffers()))
    assert same(two.state_dict(), one.state_dict())
    for p, other in zip(two.parameters(), one.parameters(), strict=True):
        assert torch.equal(optimizers[1].state[p]["momentum_buffer"], optimizers[0].state[other]["momentum_buffer"])


SYNCED = ("--epochs", 1, "--config", '{"sync_clip": true}')


@pytest.fixture(scope="module")
def two_ranks(data, tmp_path_factory):
    """A folder for each of the runs that two ranks have made, with half the batch each."""
    out = tmp_path_factory.mktemp("two_ranks")
    fsdp2 = arguments(data, out / "fsdp2", "--parallel", "fsdp2", "--save-every", 3, batch=2)
    torchrun.torchrun(
        "examples.imagenet.train",
        arguments(data, out / "float", "--float", model="GroupNormNet", batch=2),
        arguments(data, out / "buffer", "--float", "--epochs", 1, model="Remembers", batch=2),
        arguments(data, out / "synced", *SYNCED, model="GroupNormNet", batch=2),
        arguments(data, out / "ddp", batch=2),
        fsdp2,
        fsdp2,
        # The first of the two is stopped in its second epoch.
        arguments(data, out / "infinite", "--parallel", "fsdp2", model="InfiniteOnOneRank", batch=2),
        stop={4: STEPS + 3},
        # On both ranks: neither waits for the other.
        fails={
            6: r"step 0, learning rate 0\.05, rank 1: the loss is nan: the first operand that .* is fc, operand input"
        },
    )
    return out


def test_two_ranks_train_what_one_process_with_their_images_does(data, two_ranks, tmp_path):
    """In float and without batch norm: the statistics and a quantizer's clip are those of the batch of each rank."""
    imagenet.main(arguments(data, tmp_path, "--float", model="GroupNormNet"))
    for name, value in weights(tmp_path).items():
        # Sums over half batches are added in another order: a few roundings in each of 2 * STEPS steps.
        torch.testing.assert_close(weights(two_ranks / "float")[name], value, rtol=1e-4, atol=1e-6)
    for expected, found in zip(curve(tmp_path), curve(two_ranks / "float"), strict=True):
        assert found.pop("loss") == pytest.approx(expected.pop("loss"), rel=1e-5)
        # Whole counts, of every image once.
        assert found == expected


def test_every_rank_is_evaluated_with_the_buffers_that_are_saved(data, two_ranks):
    model = Remembers(3)
    model.load_state_dict(weights(two_ranks / "buffer"))
    _, held_out = folders(data, 32, seed=0)
    with process_group("cpu") as ranks, torch.no_grad():
        found = imagenet.validate(model.eval(), held_out, ranks, 4, 0)
    assert found.items() <= curve(two_ranks / "buffer")[0].items()


def test_with_sync_clip_two_ranks_quantize_as_one_process_does(data, two_ranks, tmp_path):
    """The clip of each activation in training is that of the batches of all ranks; in validation it is the rank's."""
    imagenet.main(arguments(data, tmp_path, *SYNCED, model="GroupNormNet"))
    # Where the last digit of a clip moves a value over a tie, that value moves by a step: one of thousands.
    (expected,), (found,) = curve(tmp_path), curve(two_ranks / "synced")
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_fsdp2_computes_what_ddp_does_and_resumes(data, two_ranks):
    """Quantized, with batch norm. The mean of two gradients has no rounding that depends on the order: equal bits."""
    assert curve(two_ranks / "fsdp2") == curve(two_ranks / "ddp")
    assert same(weights(two_ranks / "fsdp2"), weights(two_ranks / "ddp"))
    # And on: another number of ranks with the same images in a step, and another way to spread them.
    assert len(imagenet.main(arguments(data, two_ranks / "fsdp2", "--epochs", 3))) == 3


def test_what_fsdp2_cannot_shard():
    with process_group("cpu") as ranks:
        q = quantize(GroupNormNet(3), torch.randn(2, 3, 32, 32))
        with pytest.raises(OctavError, match=r"conv of GroupNormNet would never run this hook: .*blocks=\["):
            fully_shard(q.conv)
        of_blocks = quantize(Net(), batch(), blocks="auto")
        fully_shard(of_blocks.blocks[1])
        with pytest.raises(OctavError, match=r"blocks\.1 is sharded already: .* leave out fully_shard"):
            parallelize(of_blocks, "fsdp2", ranks)
        with pytest.raises(OctavError, match="parallel='tensor': one of ddp, fsdp2"):
            parallelize(q, "tensor", ranks)
        scalar = nn.Linear(2, 2)
        scalar.clip = nn.Parameter(torch.tensor(1.0))
        with pytest.raises(OctavError, match=r"clip \[\] is a parameter of one number.* use --parallel ddp"):
            parallelize(scalar, "fsdp2", ranks)
