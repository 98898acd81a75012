"""The training loop: the same for float and quantized nets, the same curve wherever it was stopped and resumed."""

import dataclasses
import fcntl
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import octav_fx
from benchmarks import result
from benchmarks.train import checkpoint, measure, recipes
from benchmarks.train.data import Data
from benchmarks.train.recipes import Recipe
from benchmarks.train.run import FLOAT, Run
from octav_fx import OctavError
from octav_fx.debug import NotFinite, check_finite
from octav_fx.nn import FakeQuantizer

CALIBRATION_BATCHES: Final = 5
# Files in the folder of a run.
CHECKPOINT, CURVE, RESULT = "checkpoint.pt", "curve.csv", "result.json"
COLUMNS: Final = ("step", "learning_rate", "loss", "score")


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
    """Train, or go on where folder's checkpoint stands; returns what RESULT then holds.

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
    every = save_every or max(1, recipe.steps // 10)
    _claim(folder, run, recipe, measured)
    data = recipe.data(run.seed)
    model = prepared(run, recipe, data, parent, device)
    optimizer = _optimizer(recipe, model)
    progress: dict[str, Any] = {"step": 0, "seconds": 0.0, "curve": [], "errors": []}
    if (folder / CHECKPOINT).exists():
        progress = checkpoint.load(folder / CHECKPOINT, model, optimizer)
    began, before = time.process_time(), progress["seconds"]
    evaluate_at = {round((i + 1) * recipe.steps / recipe.evaluations) for i in range(recipe.evaluations)}
    measure_at = {round(i * recipe.steps / measured) for i in range(measured + 1)} if measured else set()
    bar = tqdm(total=recipe.steps, initial=progress["step"], desc=run.name, unit="step")
    for step in range(progress["step"], recipe.steps):
        x, y = (t.to(device) for t in data.batch(step))
        if step in measure_at and run.clip != FLOAT:
            progress["errors"] += [{"step": step, **row} for row in measure.operands(model, x)]
        rate = learning_rate(recipe, step)
        try:
            loss = _step(model, optimizer, recipe, run, x, y, rate)
        except NotFinite as error:
            _finish(folder, run, recipe, progress, f"step {step + 1}: {error}")
            raise
        row = {"step": step + 1, "learning_rate": rate, "loss": loss, "score": None}
        if step + 1 in evaluate_at:
            row["score"] = score(model, recipe, data, device)
        progress["curve"].append(row)
        progress["step"] = step + 1
        progress["seconds"] = before + time.process_time() - began
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        bar.update()
        if (step + 1) % every == 0 or step + 1 == recipe.steps:
            checkpoint.write_csv(folder / CURVE, COLUMNS, progress["curve"])
            checkpoint.save(folder / CHECKPOINT, model, optimizer, progress)
    bar.close()
    if measured and run.clip != FLOAT:
        x = data.batch(recipe.steps)[0].to(device)
        progress["errors"] += [{"step": recipe.steps, **row} for row in measure.operands(model, x)]
    return _finish(folder, run, recipe, progress, None)


def prepared(run: Run, recipe: Recipe, data: Data, parent: Path | None, device: str = "cpu") -> nn.Module:
    """The model before its first step, in training mode; the same for the same run."""
    torch.manual_seed(run.seed)
    net = recipe.net().to(device)
    if run.start == "float":
        if parent is None or not _is_finished(parent):
            raise OctavError(
                f"{run.name} starts from a trained float net: give the folder of its finished run as --parent"
            )
        net.load_state_dict(checkpoint.weights(parent / CHECKPOINT), strict=True)
    if run.clip == FLOAT:
        return net.train()
    batches = [data.batch(step)[0].to(device) for step in range(CALIBRATION_BATCHES)]
    q = octav_fx.quantize(net.train(), batches[0], run.config(), strict=run.attention == "full")
    if run.clips == "static":
        octav_fx.freeze(octav_fx.calibrate(q, batches))
    return q


def _is_finished(folder: Path) -> bool:
    path = folder / RESULT
    return path.exists() and json.loads(path.read_text())["final"] is not None


def learning_rate(recipe: Recipe, step: int) -> float:
    """That of a step, from 0."""
    if step < recipe.warm_up:
        return recipe.learning_rate * (step + 1) / recipe.warm_up
    share = (step - recipe.warm_up) / (recipe.steps - recipe.warm_up)
    return recipe.learning_rate * (1 + math.cos(math.pi * share)) / 2


def score(model: nn.Module, recipe: Recipe, data: Data, device: str = "cpu") -> float:
    """Of the whole test set, in eval mode: percent that are right, or mean bits per byte."""
    model.eval()
    total = count = 0.0
    with torch.no_grad(), measure.same_hints(model):
        for x, y in data.test():
            x, y = x.to(device), y.to(device)
            total += float(_SCORES[recipe.score](model(x), y))
            count += y.numel()
    model.train()
    return total / count


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe, run: Run, x: Tensor, y: Tensor, rate: float
) -> float:
    """One step; returns the loss before it."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten(), label_smoothing=recipe.label_smoothing)
    check_finite(loss, model, x)
    if run.clip == "pact":
        # With the coefficient of the weights: under SGD what weight decay would do, under AdamW part of the gradient.
        (loss + recipe.weight_decay / 2 * octav_fx.pact_penalty(model)).backward()
    else:
        loss.backward()
    optimizer.step()
    return loss.item()


def learned_clips(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that belong to quantizers."""
    return [p for m in model.modules() if isinstance(m, FakeQuantizer) for p in m.parameters(recurse=False)]


def _optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """No weight decay on learned clips: PACT has its own penalty, LSQ none."""
    learned = learned_clips(model)
    known = {id(parameter) for parameter in learned}
    groups = [{"params": [p for p in model.parameters() if id(p) not in known]}]
    if learned:
        groups.append({"params": learned, "weight_decay": 0.0})  # type: ignore[dict-item]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=recipe.weight_decay)
    return torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay)


def _claim(folder: Path, run: Run, recipe: Recipe, measured: int) -> None:
    """A folder belongs to one run of one state of the sources: going on with another would mix two curves."""
    fields = dataclasses.asdict(recipe)
    schedule = {name: value for name, value in fields.items() if isinstance(value, (int, float, str))}
    wanted = {**dataclasses.asdict(run), **schedule, "measured": measured, "sources": result.sources()}
    path = folder / "run.json"
    if path.exists() and (known := json.loads(path.read_text())) != wanted:
        differs = [f"{name} {known.get(name)!r}" for name in wanted if known.get(name) != wanted[name]]
        raise OctavError(
            f"{folder} holds another run, {', '.join(differs)}: delete it, or give another folder as --out"
        )
    checkpoint.write(path, lambda place: place.write_text(json.dumps(wanted, indent=2)))


def _finish(folder: Path, run: Run, recipe: Recipe, progress: dict[str, Any], failed: str | None) -> dict[str, Any]:
    found = {
        "environment": result.environment(),
        "run": dataclasses.asdict(run),
        "score": recipe.score,
        # None where the run did not get there.
        "final": None if failed else progress["curve"][-1]["score"],
        "failed": failed,
        "steps": recipe.steps,
        "seconds": round(progress["seconds"], 1),
        "curve": progress["curve"],
        "errors": progress["errors"],
    }
    checkpoint.write(folder / RESULT, lambda place: place.write_text(json.dumps(found, indent=1) + "\n"))
    return found


def _right(outputs: Tensor, targets: Tensor) -> Tensor:
    return 100 * (outputs.argmax(1) == targets).sum()


def _bits(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="sum") / math.log(2)


_SCORES: Final[dict[str, Callable[[Tensor, Tensor], Tensor]]] = {"accuracy": _right, "bits per byte": _bits}
