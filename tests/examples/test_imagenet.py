"""The ImageNet recipes, end to end on a tiny ImageFolder: trained, stopped and resumed, in one process."""

import pytest
import torch
from torch import nn

from examples.imagenet import train as imagenet
from examples.imagenet.train import FROM_SCRATCH, RETRAIN, schedule_of
from tests.examples import imagefolder, torchrun
from tests.examples.imagefolder import SIZES, BatchNormNet, GroupNormNet, arguments, curve, same, weights

STEPS = sum(SIZES["train"]) // 4


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return imagefolder.write(tmp_path_factory.mktemp("imagefolder"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An uninterrupted quantized run of one process."""
    out = tmp_path_factory.mktemp("whole")
    rows = imagenet.main(arguments(data, out))
    assert curve(out) == rows
    return out


@pytest.mark.slow
def test_a_run_from_scratch(data, whole, tmp_path):
    rows = curve(whole)
    assert [row["step"] for row in rows] == [STEPS, 2 * STEPS]
    assert all(row["images"] == sum(SIZES["val"]) and row["top5"] == 1 for row in rows)
    assert rows[0]["loss"] != rows[1]["loss"]
    # The keys are the float model's.
    BatchNormNet(3).load_state_dict(weights(whole), strict=True)
    # The same seed, the same curve; another seed, another.
    imagenet.main(arguments(data, tmp_path / "again"))
    assert curve(tmp_path / "again") == rows
    # A run that is over trains no more; its curve is in the checkpoint.
    (tmp_path / "again" / "curve.csv").unlink()
    assert imagenet.main(arguments(data, tmp_path / "again")) == rows == curve(tmp_path / "again")
    imagenet.main(arguments(data, tmp_path / "other", "--seed", 1))
    assert curve(tmp_path / "other") != rows


# Within an epoch, at its end, before the last step. The loop's own tests stop at every step.
@pytest.mark.slow
@pytest.mark.parametrize("step", [1, STEPS, 2 * STEPS - 1])
def test_stopped_and_resumed(data, whole, tmp_path, step):
    with torchrun.stopped_at(step):
        imagenet.main(arguments(data, tmp_path, "--save-every", 2))
    imagenet.main(arguments(data, tmp_path, "--save-every", 2))
    assert curve(tmp_path) == curve(whole)
    assert same(weights(tmp_path), weights(whole))


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [["--bf16"], ["--parallel", "fsdp2"], ["--bits", "8"], ["--clip", "lsq"], ["--clip", "pact"]]
)
def test_options_that_change_the_arithmetic_run(data, whole, tmp_path, more):
    rows = imagenet.main(arguments(data, tmp_path, *more))
    assert len(rows) == 2
    # On one rank FSDP2 shards nothing.
    assert (rows == curve(whole)) == ("fsdp2" in more)


@pytest.mark.compile
def test_compiled(data, tmp_path):
    """The same numbers, to the roundings of fused kernels: the first loss, before one of them can move a weight."""
    # Without dropout, which draws other numbers when compiled. One size of batch, so that it is compiled for once.
    fixed = ["--epochs", 1, "--batch", sum(SIZES["val"])]
    plain = imagenet.main(arguments(data, tmp_path / "plain", *fixed, model="GroupNormNet"))
    fast = imagenet.main(arguments(data, tmp_path / "fast", *fixed, "--compile", model="GroupNormNet"))
    # Where a rounding moves a value over a tie it moves by a step of its grid; one of thousands that are averaged.
    assert fast[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-3)
    GroupNormNet(3).load_state_dict(weights(tmp_path / "fast"), strict=True)


@pytest.mark.slow
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
    assert curve(tmp_path / "own")[0]["loss"] < curve(whole)[0]["loss"]


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
    schedule = schedule_of(model, start)
    assert (schedule.global_batch, schedule.epochs) == (global_batch, epochs)
    assert schedule.lr_at(0, schedule.lr) == first
    assert schedule.lr_at(schedule.every - 1, schedule.lr) == first
    assert schedule.lr_at(epochs - 1, schedule.lr) == pytest.approx(last)


def test_the_learning_rate_goes_with_the_global_batch_and_says_so(data, tmp_path, capsys):
    asked = arguments(data, tmp_path, "--float")
    asked.remove("--lr")
    asked.remove("0.05")
    assert imagenet.main(asked)[0]["learning_rate"] == pytest.approx(0.1 * 4 / 512)
    said = "global batch 4, the paper's is 512: learning rate 0.00078125 (scaled in proportion), the paper's is 0.1"
    assert said in capsys.readouterr().out


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
