"""python -m benchmarks.study.train RECIPE: one run of the study, resumed where its folder has a checkpoint."""

import argparse
import dataclasses
import fcntl
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import octav_fx
from benchmarks import result
from benchmarks.study import experiments, measure, plot, recipes, run
from benchmarks.study.data import Data
from benchmarks.study.recipes import Recipe
from benchmarks.study.run import FLOAT, Run
from examples.common import checkpoint, files, loop
from examples.common.checkpoint import Progress
from examples.common.distributed import process_group
from octav_fx import OctavError
from octav_fx.debug import NotFinite
from octav_fx.nn.fake_quantizer import QUANTIZERS

WORK: Final = Path(__file__).parent.parent.parent / "build" / "train"
# In the folder of a run, beside its checkpoint and its curve.
RESULT: Final = "result.json"
CALIBRATION_BATCHES: Final = 5


def main() -> int:
    """Train; an OctavError is printed without a traceback."""
    parser = argparse.ArgumentParser(
        prog="./dev train", description="Train one net of a recipe; run it again to go on."
    )
    parser.add_argument("recipe", choices=recipes.names())
    run.add_options(parser)
    parser.add_argument("--out", type=Path, help="folder of the run (default build/train/ and its name)")
    parser.add_argument("--parent", type=Path, help="folder of the float run that --start float begins with")
    parser.add_argument("--steps", type=int, help="another number of steps than the recipe's")
    parser.add_argument("--save-every", type=int, help="steps between checkpoints (default a tenth of them)")
    parser.add_argument(
        "--measured", type=int, default=0, help="how often quantization errors are measured (default 0)"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.net is None:
        options.net = recipes.nets(options.recipe)[0]
    chosen = run.from_options(options)
    folder = options.out or WORK / chosen.name
    parent = options.parent or (WORK / chosen.parent.name if chosen.parent else None)
    try:
        found = train(
            chosen,
            folder,
            parent,
            steps=options.steps,
            save_every=options.save_every,
            measured=options.measured,
            device=options.device,
        )
    except OctavError as error:
        print(f"octav_fx: {error}", file=sys.stderr)
        return 1
    plot.curve(folder / loop.CURVE, folder / "curve.png", chosen.name, found["score"])
    print(f"{chosen.name}: {found['final']:.3f} {found['score']}, {found['seconds']:.0f} s; {folder}")
    return 0


def train(
    run: Run,
    folder: Path,
    parent: Path | None = None,
    *,
    steps: int | None = None,
    save_every: int | None = None,
    measured: int = 0,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train, or go on where folder's checkpoint stands; return what RESULT then holds.

    One process at a time works in a folder: another one waits, and then goes on from there.

    parent: the folder of the finished float run, for a run with start="float". steps: of a shorter run. save_every:
    steps between checkpoints (default: a tenth of them). measured: how often the quantization error of each operand is
    measured on the way, and once at the end. Raises NotFinite if the loss is, which RESULT then says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _train(run, folder, parent, steps, save_every, measured, device)


def _train(
    run: Run, folder: Path, parent: Path | None, steps: int | None, save_every: int | None, measured: int, device: str
) -> dict[str, Any]:
    recipe = recipes.of(run)
    if steps is not None:
        recipe = dataclasses.replace(recipe, steps=steps, warm_up=min(recipe.warm_up, steps // 4))
    data = recipe.data(run.seed, run.judged)
    model = prepared(run, recipe, data, parent, device)
    optimizer = _optimizer(recipe, model)
    measured = 0 if run.clip == FLOAT else measured
    measure_at = {round(i * recipe.steps / measured) for i in range(measured + 1)} if measured else set()

    def note(step: int, x: Tensor) -> list[dict[str, Any]]:
        return [{"step": step, **row} for row in measure.operands(model, x)] if step in measure_at else []

    def loss(model: nn.Module, x: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        targets = batch[1].to(device).flatten()
        return F.cross_entropy(model(x).flatten(0, -2), targets, label_smoothing=recipe.label_smoothing)

    task = loop.Task(
        steps=recipe.steps,
        batches=lambda first: map(data.batch, range(first, recipe.steps)),
        inputs=lambda batch: batch[0].to(device),
        loss=loss,
        learning_rate=lambda step: learning_rate(recipe, step),
        evaluate=lambda model: {"score": score(model, recipe, data, device)},
        evaluate_after={round((i + 1) * recipe.steps / recipe.evaluations) for i in range(recipe.evaluations)},
        row_every=1,
        seed=run.seed,
        settings=_settings(run, recipe, measured),
        penalty=loop.pact_decay(model, recipe.weight_decay),
        note=note,
    )
    progress = Progress()
    try:
        with process_group(torch.device(device).type) as alone:
            every = save_every or max(1, recipe.steps // 10)
            loop.train(task, folder, model, model, optimizer, alone, every, progress)
    except NotFinite as error:
        _finish(folder, run, recipe, progress, str(error))
        raise
    progress.notes += note(recipe.steps, data.batch(recipe.steps)[0].to(device))
    return _finish(folder, run, recipe, progress, None)


def prepared(run: Run, recipe: Recipe, data: Data, parent: Path | None, device: str = "cpu") -> nn.Module:
    """Return the model before its first step, in training mode; the same for the same run."""
    torch.manual_seed(run.seed)
    net = recipe.net().to(device)
    if run.start == "float":
        if parent is None or not _is_finished(parent):
            raise OctavError(
                f"{run.name} starts from a trained float net: give the folder of its finished run as --parent"
            )
        net.load_state_dict(checkpoint.weights(parent / loop.CHECKPOINT), strict=True)
    if run.clip == FLOAT:
        return net.train()
    batches = [data.batch(step)[0].to(device) for step in range(CALIBRATION_BATCHES)]
    q = octav_fx.quantize(net.train(), batches[0], run.config(), strict=run.attention == "full")
    if run.experiment:
        experiments.apply(q, run.experiment)
    if run.clips == "static":
        octav_fx.freeze(octav_fx.calibrate(q, batches))
    return q


def _is_finished(folder: Path) -> bool:
    path = folder / RESULT
    return path.exists() and json.loads(path.read_text())["final"] is not None


def learning_rate(recipe: Recipe, step: int) -> float:
    """Return the learning rate of a step, from 0."""
    if step < recipe.warm_up:
        return recipe.learning_rate * (step + 1) / recipe.warm_up
    share = (step - recipe.warm_up) / (recipe.steps - recipe.warm_up)
    return recipe.learning_rate * (1 + math.cos(math.pi * share)) / 2


def score(model: nn.Module, recipe: Recipe, data: Data, device: str = "cpu") -> float:
    """Return the percentage of the test set that is right, or its mean bits per byte, of a model in eval mode."""
    total = count = 0.0
    with torch.no_grad(), measure.same_hints(model):
        for x, y in data.test():
            x, y = x.to(device), y.to(device)
            total += float(_SCORES[recipe.score](model(x), y))
            count += y.numel()
    return total / count


def _optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """Return the recipe's optimizer, in which all but learned clips decays.

    octav_fx.param_groups leaves out norms and biases, too. The committed runs did not, and a table is of runs that were
    trained alike. It matters as much as methods do: with param_groups the text net at 4 bits (octav, seeds 0 and 1)
    ends at 2.451 and 2.440 bits per byte, without at 2.478 and 2.459; in float at 2.378 and 2.370, 2.377 and 2.365.
    """
    decayed: list[nn.Parameter] = []
    clips: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (clips if name.startswith(f"{QUANTIZERS}.") else decayed).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": recipe.weight_decay}]
    if clips:
        groups.append({"params": clips, "weight_decay": 0.0})
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=(0.9, 0.95))
    return torch.optim.SGD(groups, momentum=0.9, nesterov=True)


def _settings(run: Run, recipe: Recipe, measured: int) -> dict[str, Any]:
    """Return what has to be the same where a run goes on, the sources among it: two of them would mix two curves."""
    fields = dataclasses.asdict(recipe)
    schedule = {name: value for name, value in fields.items() if isinstance(value, (int, float, str))}
    return {**dataclasses.asdict(run), **schedule, "measured": measured, "sources": result.sources()}


def _finish(folder: Path, run: Run, recipe: Recipe, progress: Progress, failed: str | None) -> dict[str, Any]:
    found = {
        "environment": result.environment(),
        "run": dataclasses.asdict(run),
        "score": recipe.score,
        # None where the run did not get there.
        "final": None if failed else progress.rows[-1]["score"],
        "failed": failed,
        "steps": recipe.steps,
        "seconds": round(progress.seconds, 1),
        "curve": [{"score": None, **row} for row in progress.rows],
        "errors": progress.notes,
    }
    files.write(folder / RESULT, lambda place: place.write_text(json.dumps(found, indent=1) + "\n"))
    return found


def _right(outputs: Tensor, targets: Tensor) -> Tensor:
    return 100 * (outputs.argmax(1) == targets).sum()


def _bits(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="sum") / math.log(2)


_SCORES: Final[dict[str, Callable[[Tensor, Tensor], Tensor]]] = {"accuracy": _right, "bits per byte": _bits}


if __name__ == "__main__":
    sys.exit(main())
