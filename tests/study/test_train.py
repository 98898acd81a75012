"""Training: the loss falls, a killed run goes on to the same curve, and a loss that is not finite names its cause."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.study import recipes, tables, train
from benchmarks.study.data import TEST
from benchmarks.study.run import FLOAT, Run
from examples.common import checkpoint, loop
from octav_fx import OctavError
from octav_fx.debug import NotFinite

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
DIGITS = Run("digits", "resnet", "octav")


class First:
    """The first examples of the first batch, again and again."""

    def __init__(self, data, count):
        self.x, self.y = (t[:count] for t in data.batch(0))

    def batch(self, step):
        return self.x, self.y

    def test(self):
        yield self.x, self.y


class Stopped(Exception):
    pass


@pytest.mark.parametrize("clip", [FLOAT, "octav"])
@pytest.mark.parametrize(("recipe", "net"), [key[:2] for key in recipes.RECIPES if key[2] == "small"])
def test_the_loss_falls(tmp_path, monkeypatch, recipe, net, clip):
    key = (recipe, net, "small")
    row = recipes.RECIPES[key]
    few = dataclasses.replace(row, data=lambda *key: First(row.data(*key), 16), evaluations=1)
    monkeypatch.setitem(recipes.RECIPES, key, few)
    found = train.train(Run(recipe, net, clip), tmp_path, steps=8)
    losses = [point["loss"] for point in found["curve"]]
    assert len(losses) == 8
    assert losses[-1] < 0.9 * losses[0]
    assert found["final"] == found["curve"][-1]["score"] is not None


@pytest.mark.parametrize("clip", [FLOAT, *tables.METHODS])
def test_a_stopped_run_goes_on_to_the_same_curve(tmp_path, monkeypatch, clip):
    run = dataclasses.replace(DIGITS, clip=clip)
    train.train(run, tmp_path / "whole", steps=12)
    row = recipes.RECIPES["digits", "resnet", "small"]

    def stopping(*key):
        data = row.data(*key)
        batch = data.batch
        # Between two checkpoints: steps 6 and 7 are done again.
        data.batch = lambda step: batch(step) if step != 8 else (_ for _ in ()).throw(Stopped)
        return data

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setitem(recipes.RECIPES, ("digits", "resnet", "small"), dataclasses.replace(row, data=stopping))
        train.train(run, tmp_path / "parts", steps=12, save_every=3)
    # What random numbers were drawn meanwhile does not matter.
    torch.manual_seed(99)
    train.train(run, tmp_path / "parts", steps=12, save_every=3)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    whole, parts = (checkpoint.weights(tmp_path / name / loop.CHECKPOINT) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_killed_process_goes_on_to_the_same_curve(tmp_path):
    train.train(DIGITS, tmp_path / "whole", steps=60)
    folder = tmp_path / "killed"
    options = ["--steps", "60", "--save-every", "4", "--out", str(folder)]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.study.train", *DIGITS.arguments(), *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        # The curve is written just after the checkpoint that it goes with.
        while not ((folder / loop.CHECKPOINT).exists() and (folder / loop.CURVE).exists()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (folder / train.RESULT).exists()
    before = len(curve(folder).splitlines())
    assert 4 < before <= 60
    train.train(DIGITS, folder, steps=60)
    assert curve(folder) == curve(tmp_path / "whole")


def test_measuring_leaves_no_trace(tmp_path):
    train.train(DIGITS, tmp_path / "plain", steps=12)
    found = train.train(DIGITS, tmp_path / "measured", steps=12, measured=3)
    assert curve(tmp_path / "measured") == curve(tmp_path / "plain")
    assert {row["step"] for row in found["errors"]} == {0, 4, 8, 12}


def test_a_folder_belongs_to_one_run(tmp_path):
    train.train(DIGITS, tmp_path, steps=2)
    with pytest.raises(OctavError, match="is of a run with seed=0, not 1"):
        train.train(dataclasses.replace(DIGITS, seed=1), tmp_path, steps=2)


def test_retraining_starts_from_the_float_net(tmp_path):
    train.train(DIGITS.parent or dataclasses.replace(DIGITS, clip=FLOAT), tmp_path / "float", steps=40)
    retrained = dataclasses.replace(DIGITS, start="float")
    assert retrained.parent == dataclasses.replace(DIGITS, clip=FLOAT)
    found = train.train(retrained, tmp_path / "q", tmp_path / "float", steps=2)
    scratch = train.train(DIGITS, tmp_path / "scratch", steps=2)
    assert found["curve"][0]["loss"] < 0.7 * scratch["curve"][0]["loss"]
    with pytest.raises(OctavError, match="--parent"):
        train.train(retrained, tmp_path / "none", tmp_path / "nowhere")


def test_static_clips_stay(tmp_path):
    run = dataclasses.replace(DIGITS, clips="static")
    recipe = recipes.of(run)
    model = train.prepared(run, recipe, recipe.data(0, TEST), None)
    before = {name: value.clone() for name, value in model.named_buffers() if name.endswith(".clip")}
    assert len(before) > 20
    train.train(run, tmp_path, steps=3)
    after = checkpoint.weights(tmp_path / loop.CHECKPOINT)
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("clip", [FLOAT, "octav"])
def test_a_loss_that_is_not_finite_names_the_first_node(tmp_path, clip):
    parent = dataclasses.replace(DIGITS, clip=FLOAT)
    train.train(parent, tmp_path / "float", steps=2)
    values = torch.load(tmp_path / "float" / loop.CHECKPOINT, weights_only=True)
    values["model"]["blocks.3.second.0.weight"][1, 2, 0, 0] = torch.nan
    torch.save(values, tmp_path / "float" / loop.CHECKPOINT)
    run = dataclasses.replace(DIGITS, clip=clip, start="float")
    with pytest.raises(NotFinite, match=r"blocks\.3\.second\.0, operand weight \[8, 8, 3, 3\]"):
        train.train(run, tmp_path / "run", tmp_path / "float", steps=4)
    kept = json.loads((tmp_path / "run" / train.RESULT).read_text())
    assert kept["final"] is None and kept["failed"].startswith("step 0, ")


def curve(folder):
    return (folder / loop.CURVE).read_text()


@pytest.mark.parametrize("key", [key for key in recipes.RECIPES if key[2] == "large"])
def test_large_nets_take_the_large_data(key):
    recipe, small = recipes.RECIPES[key], recipes.RECIPES[*key[:2], "small"]
    x, _ = recipe.data(0, TEST).batch(0)
    with torch.device("meta"):
        net, smaller = recipe.net(), small.net()
        assert net(x.to("meta")).shape[0] == len(x)
    sizes = [sum(p.numel() for p in module.parameters()) for module in (net, smaller)]
    assert sizes[0] > 5 * sizes[1] and recipe.steps > small.steps
