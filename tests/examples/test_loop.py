"""The loop by itself, on a line: what a row of the curve is, what the penalty does, where a run may go on."""

import csv
from dataclasses import replace

import pytest
import torch
from torch import nn

from examples.common import checkpoint, loop
from examples.common.checkpoint import Progress
from examples.common.distributed import process_group
from examples.common.files import write_csv
from octav_fx import Config, OctavError, pact_penalty, quantize
from octav_fx.debug import NotFinite
from tests.support.nets import ConvNet


def loss_of(step: int) -> float:
    """What the task's loss is at a step, with a weight of one that does not move."""
    return float(step + 1)


def task(**fields) -> loop.Task:
    values = {
        "steps": 7,
        "batches": lambda first: (torch.tensor([[loss_of(step)]]) for step in range(first, 7)),
        "inputs": lambda batch: batch,
        "loss": lambda model, x, batch: model(x).mean(),
        "learning_rate": lambda step: 0.0,
        "evaluate": lambda model: {"is_training": float(model.training)},
        "evaluate_after": {4},
        "row_every": 3,
        "seed": 0,
        "settings": {"seed": 0},
    }
    return loop.Task(**{**values, **fields})


def run(folder, task, save_every=100, progress=None):
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), 1.0, momentum=0.9)
    with process_group("cpu") as ranks:
        return model, loop.train(task, folder, model, model, optimizer, ranks, save_every, progress)


def test_a_row_is_the_mean_since_the_last_one_and_evaluation_adds_to_it(tmp_path):
    _, rows = run(tmp_path, task())
    assert [(row["step"], row["loss"]) for row in rows] == [(3, 2), (4, 4), (6, 5.5)]
    assert [row.get("is_training") for row in rows] == [None, 0, None]
    with (tmp_path / loop.CURVE).open() as file:
        kept = list(csv.DictReader(file))
    assert [row["loss"] for row in kept] == ["2.0", "4.0", "5.5"]
    assert [row["is_training"] for row in kept] == ["", "0.0", ""]


@pytest.mark.parametrize("stop", range(7))
def test_a_run_that_is_killed_goes_on_to_the_same_curve(tmp_path, stop):
    def until(first):
        for step, batch in enumerate(task().batches(first), first):
            if step == stop:
                raise KeyboardInterrupt
            yield batch

    _, rows = run(tmp_path / "whole", task())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", task(batches=until), save_every=2)
    assert run(tmp_path / "parts", task(), save_every=2)[1] == rows


def test_the_penalty_is_part_of_the_gradient_and_not_of_the_curve(tmp_path):
    # One step, so that the curve is that of the weight before it moved.
    one = task(steps=1, batches=lambda first: [torch.ones(1, 1)][first:], row_every=1, learning_rate=lambda step: 0.1)
    extra = nn.Parameter(torch.tensor(2.0))
    plain, rows = run(tmp_path / "plain", one)
    penalized, again = run(tmp_path / "penalized", replace(one, penalty=lambda: 5 * extra))
    assert again == rows and rows[0]["loss"] == 1
    assert torch.equal(plain.weight, penalized.weight)
    assert extra.grad == 5


def test_pact_decay_is_for_pacts_clips_alone():
    x = torch.randn(4, 3, 8, 8)
    q = quantize(ConvNet(), x, Config(clip="pact"))
    penalty = loop.pact_decay(q, 0.1)
    assert penalty is not None
    assert penalty().item() == pytest.approx(0.05 * pact_penalty(q).item())
    for other in (ConvNet(), quantize(ConvNet(), x), quantize(ConvNet(), x, Config(clip="lsq"))):
        assert loop.pact_decay(other, 0.1) is None


def test_a_loss_that_is_not_finite_leaves_the_progress_until_then(tmp_path):
    progress = Progress()
    broken = task(inputs=lambda batch: batch / (batch != loss_of(4)))
    with pytest.raises(NotFinite, match=r"step 4, learning rate 0, rank 0: the loss is inf: .* operand input"):
        run(tmp_path, broken, progress=progress)
    assert progress.step == 4 and [row["step"] for row in progress.rows] == [3, 4]


def test_notes_are_kept_beside_the_curve_and_in_the_checkpoint(tmp_path):
    noted = task(note=lambda step, x: [{"step": step, "x": x.item()}] if step % 3 == 0 else [])
    progress = Progress()
    run(tmp_path, noted, progress=progress)
    assert progress.notes == [{"step": step, "x": loss_of(step)} for step in (0, 3, 6)]
    again = Progress()
    run(tmp_path, noted, progress=again)
    assert again.notes == progress.notes and again.rows == progress.rows and again.seconds == progress.seconds


def test_a_checkpoint_of_other_settings_is_refused_and_changes_nothing(tmp_path):
    run(tmp_path, task())
    with pytest.raises(OctavError, match=r"checkpoint\.pt is of a run with lr=None, not 3: choose another --out"):
        run(tmp_path, task(settings={"seed": 0, "lr": 3}), progress=(progress := Progress()))
    assert progress == Progress()
    assert checkpoint.weights(tmp_path / loop.CHECKPOINT)["weight"].item() == 1


def test_a_csv_has_a_column_for_each_key_of_any_row(tmp_path):
    write_csv(tmp_path / "some.csv", [{"a": 1}, {"b": 2.5, "a": None}])
    assert (tmp_path / "some.csv").read_text() == "a,b\n1,\n,2.5\n"
    assert [path.name for path in tmp_path.iterdir()] == ["some.csv"]
