"""The ImageNet recipes, end to end on a tiny ImageFolder: one process, two ranks of torchrun, stopped and resumed."""

import csv

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import TensorDataset

from benchmarks.train import imagenet
from benchmarks.train.folder import folders
from benchmarks.train.paper import FROM_SCRATCH, RETRAIN, recipe_of
from benchmarks.train.ranks import Ranks, joined, read, restore, save, spread
from benchmarks.train.shares import once, training, validation
from octav_fx import OctavError, quantize
from tests.train import imagefolder, torchrun
from tests.train.imagefolder import SIZES, BatchNormNet, GroupNormNet, Remembers

CPU = torch.device("cpu")
STEPS = sum(SIZES["train"]) // 4


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return imagefolder.write(tmp_path_factory.mktemp("imagefolder"))


def arguments(data, out, *more, model="BatchNormNet", batch=4, start=("--from-scratch",)):
    fixed = f"--recipe resnet18 --epochs 2 --size 32 --workers 0 --device cpu --lr 0.05 --batch {batch}".split()
    named = ["--model", f"tests.train.imagefolder:{model}", "--out", out]
    return [str(value) for value in (data, *named, *fixed, *start, *more)]


def weights(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)["model"]


def curve(out):
    with (out / "curve.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def same(left, right):
    assert list(left) == list(right)
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An uninterrupted quantized run of one process."""
    out = tmp_path_factory.mktemp("whole")
    rows = imagenet.main(arguments(data, out))
    assert curve(out) == rows
    return out


def test_a_run_from_scratch(data, whole, tmp_path):
    rows = curve(whole)
    assert [row["epoch"] for row in rows] == [1, 2]
    assert all(row["images"] == sum(SIZES["val"]) and row["top5"] == 1 for row in rows)
    assert rows[0]["train_loss"] != rows[1]["train_loss"]
    # The keys are the float model's.
    BatchNormNet(3).load_state_dict(weights(whole), strict=True)
    # The same seed, the same curve; another seed, another.
    imagenet.main(arguments(data, tmp_path / "again"))
    assert curve(tmp_path / "again") == rows
    imagenet.main(arguments(data, tmp_path / "other", "--seed", 1))
    assert curve(tmp_path / "other") != rows


@pytest.mark.parametrize("step", range(2 * STEPS))
def test_stopped_at_any_step_and_resumed(data, whole, tmp_path, step):
    with torchrun.stopped_at(step):
        imagenet.main(arguments(data, tmp_path, "--save-every", 2))
    imagenet.main(arguments(data, tmp_path, "--save-every", 2))
    assert curve(tmp_path) == curve(whole)
    assert same(weights(tmp_path), weights(whole))


def test_a_checkpoint_is_written_whole_or_not_at_all(data, whole, tmp_path, monkeypatch):
    written = []

    def torn(value, path, **options):
        # Tensors that are sent to another rank are pickled with torch.save, too.
        if isinstance(value, dict):
            if len(written) == 2:
                path.write_bytes(b"half a checkpoint")
                raise KeyboardInterrupt
            written.append(path)
        original(value, path, **options)

    original = torch.save
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", torn)
        with pytest.raises(KeyboardInterrupt):
            imagenet.main(arguments(data, tmp_path, "--save-every", 1))
    imagenet.main(arguments(data, tmp_path, "--save-every", 1))
    assert curve(tmp_path) == curve(whole)


def test_hints_and_running_means_are_in_a_checkpoint(tmp_path):
    """Where Newton starts decides a clip's last digits; freezing reads the means."""
    path, loss = tmp_path / "checkpoint.pt", torch.tensor(3.0, dtype=torch.float64)
    one, two = (quantize(GroupNormNet(3), scale * torch.randn(2, 3, 32, 32)) for scale in (1, 5))
    optimizers = [torch.optim.SGD(q.parameters(), 0.1, momentum=0.9) for q in (one, two)]
    with joined("cpu"):
        one(torch.randn(2, 3, 32, 32)).sum().backward()
        optimizers[0].step()
        save(path, one, optimizers[0], loss, {"epoch": 0})
        restore(read(path), two, optimizers[1], found := torch.zeros_like(loss))
    assert found == loss
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
        "benchmarks.train.imagenet",
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
        assert found.pop("train_loss") == pytest.approx(expected.pop("train_loss"), rel=1e-5)
        # Whole counts, of every image once.
        assert found == expected


def test_every_rank_is_evaluated_with_the_buffers_that_are_saved(data, two_ranks):
    model = Remembers(3)
    model.load_state_dict(weights(two_ranks / "buffer"))
    _, held_out = folders(data, 32, seed=0)
    with joined("cpu") as ranks, torch.no_grad():
        found = imagenet.validate(model.eval(), held_out, ranks, 4, 0)
    assert found.items() <= curve(two_ranks / "buffer")[0].items()


def test_with_sync_clip_two_ranks_quantize_as_one_process_does(data, two_ranks, tmp_path):
    """The clip of each activation in training is that of the batches of all ranks; in validation it is the rank's."""
    imagenet.main(arguments(data, tmp_path, *SYNCED, model="GroupNormNet"))
    # Where the last digit of a clip moves a value over a tie, that value moves by a step: one of thousands.
    (expected,), (found,) = curve(tmp_path), curve(two_ranks / "synced")
    assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-4)


def test_fsdp2_computes_what_ddp_does_and_resumes(data, two_ranks):
    """Quantized, with batch norm. The mean of two gradients has no rounding that depends on the order: equal bits."""
    assert curve(two_ranks / "fsdp2") == curve(two_ranks / "ddp")
    assert same(weights(two_ranks / "fsdp2"), weights(two_ranks / "ddp"))
    # And on: another number of ranks with the same images in a step, and another way to spread them.
    assert len(imagenet.main(arguments(data, two_ranks / "fsdp2", "--epochs", 3))) == 3


def test_what_fsdp2_cannot_shard():
    with joined("cpu") as ranks:
        q = quantize(GroupNormNet(3), torch.randn(2, 3, 32, 32))
        fully_shard(q.conv)
        with pytest.raises(OctavError, match=r"conv is sharded already: .* leave out fully_shard"):
            spread(q, "fsdp2", ranks)
        with pytest.raises(OctavError, match="parallel='tensor': one of ddp, fsdp2"):
            spread(q, "tensor", ranks)
        scalar = nn.Linear(2, 2)
        scalar.clip = nn.Parameter(torch.tensor(1.0))
        with pytest.raises(OctavError, match=r"clip \[\] is a parameter of one number.* use --parallel ddp"):
            spread(scalar, "fsdp2", ranks)


@pytest.mark.parametrize(
    "more", [["--bf16"], ["--parallel", "fsdp2"], ["--bits", "8"], ["--clip", "lsq"], ["--clip", "pact"]]
)
def test_options_that_change_the_arithmetic_run(data, whole, tmp_path, more):
    rows = imagenet.main(arguments(data, tmp_path, *more))
    assert len(rows) == 2
    # On one rank FSDP2 shards nothing.
    assert (rows == curve(whole)) == ("fsdp2" in more)


def test_compiled(data, tmp_path):
    """The same numbers, to the roundings of fused kernels: the first loss, before one of them can move a weight."""
    # Without dropout, which draws other numbers when compiled. One size of batch, so that it is compiled for once.
    fixed = ["--epochs", 1, "--batch", sum(SIZES["val"])]
    plain = imagenet.main(arguments(data, tmp_path / "plain", *fixed, model="GroupNormNet"))
    fast = imagenet.main(arguments(data, tmp_path / "fast", *fixed, "--compile", model="GroupNormNet"))
    # Where a rounding moves a value over a tie it moves by a step of its grid; one of thousands that are averaged.
    assert fast[0]["train_loss"] == pytest.approx(plain[0]["train_loss"], rel=1e-3)
    GroupNormNet(3).load_state_dict(weights(tmp_path / "fast"), strict=True)


def test_retraining_begins_with_the_checkpoint(data, whole, tmp_path):
    trained = {f"module.{name}": value for name, value in weights(whole).items()}
    torch.save({"state_dict": trained}, tmp_path / "float.pt")
    # Nothing moves but the statistics of batch norm.
    imagenet.main(arguments(data, tmp_path / "out", "--lr", 0, start=("--retrain", tmp_path / "float.pt")))
    found = weights(tmp_path / "out")
    parameters = [name for name, _ in BatchNormNet(3).named_parameters()]
    assert all(torch.equal(found[name], trained[f"module.{name}"]) for name in parameters)
    # A checkpoint of ours will do, too.
    imagenet.main(arguments(data, tmp_path / "own", start=("--retrain", whole / "checkpoint.pt")))
    assert curve(tmp_path / "own")[0]["train_loss"] < curve(whole)[0]["train_loss"]


@pytest.mark.parametrize(
    ("model", "start", "global_batch", "first", "last", "epochs"),
    [
        ("resnet18", FROM_SCRATCH, 512, 0.1, 1e-5, 150),
        ("resnet50", FROM_SCRATCH, 512, 0.1, 1e-5, 150),
        ("resnet101", FROM_SCRATCH, 512, 0.1, 1e-3, 80),
        ("mobilenet_v2", FROM_SCRATCH, 1024, 0.2, 2e-3, 300),
        ("resnet18", RETRAIN, 256, 1e-4, 1e-6, 30),
        ("resnet50", RETRAIN, 256, 1e-4, 1e-6, 15),
        ("mobilenet_v3_large", RETRAIN, 512, 1e-2, 1e-4, 30),
    ],
)
def test_the_schedules_of_the_paper(model, start, global_batch, first, last, epochs):
    recipe = recipe_of(model, start)
    assert (recipe.global_batch, recipe.epochs) == (global_batch, epochs)
    assert recipe.lr_at(0, recipe.lr) == first
    assert recipe.lr_at(recipe.every - 1, recipe.lr) == first
    assert recipe.lr_at(epochs - 1, recipe.lr) == pytest.approx(last)


def test_the_learning_rate_goes_with_the_global_batch_and_says_so(data, tmp_path, capsys):
    asked = arguments(data, tmp_path, "--float")
    asked.remove("--lr")
    asked.remove("0.05")
    assert imagenet.main(asked)[0]["lr"] == pytest.approx(0.1 * 4 / 512)
    said = "global batch 4, the paper's is 512: learning rate 0.00078125 (scaled in proportion), the paper's is 0.1"
    assert said in capsys.readouterr().out


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
    with joined("cpu") as ranks:
        found = imagenet.validate(nn.Identity(), TensorDataset(logits, labels), ranks, 3, 0)
    assert found == {"top1": 2 / 7, "top5": 5 / 7, "images": 7}


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


def broken(data, what):
    if what == "no data":
        return data / "absent"
    imagefolder.write(data)
    if what == "no val":
        (data / "val").rename(data / "validation")
    elif what == "no classes":
        for folder in (data / "val").iterdir():
            for file in folder.iterdir():
                file.rename(data / "val" / f"{folder.name}{file.name}")
            folder.rmdir()
    elif what == "a class more":
        (data / "val" / "cat").rename(data / "val" / "dog")
    elif what == "an empty class":
        for file in (data / "train" / "bee").iterdir():
            file.unlink()
    elif what == "no image":
        for file in (data / "val" / "bee").iterdir():
            file.write_text("not a picture")
    return data


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("no data", r"no folder .*absent\n(?s:.*)DATA/train/CLASS/\*\.JPEG"),
        ("no val", r"no folder .*val\n(?s:.*)DATA/val/CLASS/"),
        ("no classes", r"no class folder in .*val\n(?s:.*)DATA/val"),
        ("a class more", r"class 'cat' is only in .*train\n(?s:.*)DATA/val"),
        ("an empty class", r"train: Found no valid file for the classes bee(?s:.*)DATA/train"),
        ("no image", r"val/bee/0\.png: no image that can be read"),
    ],
)
def test_data_that_is_missing_or_misshapen(tmp_path, what, says):
    with pytest.raises(SystemExit, match=says):
        imagenet.main(arguments(broken(tmp_path, what), tmp_path / "out", "--float"))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--recipe", "vgg11"], "no from-scratch recipe 'vgg11'; there are resnet18, resnet50"),
        (["--config", "{"], "no JSON"),
        (["--config", "[4]"], "a JSON object"),
        (["--config", '{"bitz": 4}'], "Config has no field bitz"),
        (["--bits", "9"], "weight_bits=9"),
        (["--epochs", "0"], "--epochs 0: at least 1"),
        (["--batch", "20"], "19 training examples do not fill one batch of 20 on 1 ranks"),
        (["--float", "--compile"], "leave one of them out"),
        (["--clip", "lsq", "--parallel", "fsdp2"], "which FSDP2 cannot shard"),
        (["--lr", "1e38"], r"step \d, learning rate 1e\+38, rank 0: the loss is .* is norm, operand input"),
    ],
)
def test_options_that_cannot_be(data, tmp_path, more, says):
    with pytest.raises(SystemExit, match=says):
        imagenet.main(arguments(data, tmp_path, *more))


def test_checkpoints_that_do_not_fit(data, whole, tmp_path):
    with pytest.raises(SystemExit, match=r"checkpoint\.pt is of a run with seed=0, not 1: choose another --out"):
        imagenet.main(arguments(data, whole, "--seed", 1))
    with pytest.raises(SystemExit, match=r"absent\.pt: no such file"):
        imagenet.main(arguments(data, tmp_path, start=("--retrain", tmp_path / "absent.pt")))
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    with pytest.raises(SystemExit, match=r"other\.pt: .*(?s:.*)Missing key"):
        imagenet.main(arguments(data, tmp_path, start=("--retrain", tmp_path / "other.pt")))
