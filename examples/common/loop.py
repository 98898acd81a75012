"""The training loop: the same on one rank and on many, for float and quantized models, wherever it was stopped."""

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from examples.common.checkpoint import Progress, Row, restore, save
from examples.common.distributed import Ranks, seed_step, share_buffers, summed
from examples.common.files import write_csv
from octav_fx import OctavError, pact_penalty
from octav_fx.debug import NotFinite, check_finite, first_not_finite

# Files in the folder of a run.
CHECKPOINT: Final = "checkpoint.pt"
CURVE: Final = "curve.csv"


@dataclass(frozen=True)
class Task:
    """What is trained: its data, its loss, its learning rate and its evaluation."""

    # Steps of the whole run.
    steps: int
    # A step, from 0 -> its batch and those of all later steps.
    batches: Callable[[int], Iterable[Any]]
    # A batch -> the model's inputs as quantize() takes them, a tensor or keyword arguments, on this rank's device.
    inputs: Callable[[Any], Any]
    # (the model that is called, inputs, batch) -> the mean loss, [].
    loss: Callable[[nn.Module, Any, Any], Tensor]
    # A step, from 0 -> its learning rate.
    learning_rate: Callable[[int], float]
    # The model that is called, in eval mode -> columns of the curve, the same on every rank.
    evaluate: Callable[[nn.Module], Mapping[str, float]]
    # The model is evaluated when so many steps are done.
    evaluate_after: Collection[int]
    # The curve has a row, with the mean loss, for so many steps, and for each evaluation.
    row_every: int
    # Of what a step draws, such as dropout.
    seed: int
    # Plain values that have to be the same where a run goes on.
    settings: Mapping[str, Any]
    # Gradients are scaled down to this norm of all of them together; None: they are not.
    max_norm: float | None = None
    # What is added to the loss for its gradient and is not part of the curve, [].
    penalty: Callable[[], Tensor] | None = None
    # (step, inputs) -> rows to keep beside the curve; called before each step.
    note: Callable[[int, Any], list[Row]] | None = None


def train(
    task: Task,
    folder: Path,
    q: nn.Module,
    called: nn.Module,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
    save_every: int,
    progress: Progress | None = None,
) -> list[Row]:
    """Train to the last step, from folder/checkpoint.pt if it is there; return the rows of the curve.

    Every rank calls this. q holds the state and is what is saved; called is q, or what parallelize() made of it.
    progress: filled while the run goes on, for the caller to read where it ends early.

    Raises NotFinite where a loss is, and OctavError for a checkpoint of other settings.
    """
    progress = progress or Progress()
    path = folder / CHECKPOINT
    if path.exists():
        restore(path, q, optimizer, progress, task.settings)
        ranks.say(f"going on from {path}: {progress.step} of {task.steps} steps are done")
        # A run may have been killed between a checkpoint and its curve.
        _write_curve(folder, progress, ranks)
    elif ranks.is_first:
        folder.mkdir(parents=True, exist_ok=True)

    earlier, began = progress.seconds, time.process_time()
    called.train()
    bar = tqdm(total=task.steps, initial=progress.step, unit="step", disable=not ranks.is_first)
    for step, batch in enumerate(task.batches(progress.step), progress.step):
        seed_step(task.seed, step, ranks.rank)
        inputs = task.inputs(batch)
        if task.note is not None:
            progress.notes += task.note(step, inputs)
        progress.loss += _step(task, q, called, optimizer, inputs, batch, step)
        progress.step = step + 1
        bar.update()

        is_evaluated = progress.step in task.evaluate_after
        if is_evaluated or progress.step % task.row_every == 0:
            row = _row(task, progress, ranks)
            if is_evaluated:
                share_buffers(q)
                called.eval()
                row |= task.evaluate(called)
                called.train()
                if ranks.is_first:
                    bar.write("  ".join(f"{name} {value:.6g}" for name, value in row.items()))
            progress.rows.append(row)
        progress.seconds = earlier + time.process_time() - began
        if is_evaluated or progress.step % save_every == 0 or progress.step == task.steps:
            save(path, q, optimizer, progress, task.settings)
            _write_curve(folder, progress, ranks)
    bar.close()
    return progress.rows


def pact_decay(q: nn.Module, weight_decay: float) -> Callable[[], Tensor] | None:
    """Return Task.penalty for a model with PACT's clips: L2 with the weights' decay. None for other models."""
    try:
        pact_penalty(q)
    except OctavError:
        return None
    return lambda: weight_decay / 2 * pact_penalty(q)


def _step(
    task: Task,
    q: nn.Module,
    called: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Any,
    batch: Any,
    step: int,
) -> float:
    """Move the parameters once; return the loss of this rank before."""
    learning_rate = task.learning_rate(step)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad()
    loss = task.loss(called, inputs, batch)
    # Asked before the weights take it in, and answered the same on every rank, so that none waits for another.
    if summed((~loss.detach().isfinite()).long()):
        raise NotFinite(f"step {step}, learning rate {learning_rate:g}, {_not_finite(loss, q, inputs)}")
    (loss if task.penalty is None else loss + task.penalty()).backward()
    if task.max_norm is not None:
        nn.utils.clip_grad_norm_(called.parameters(), task.max_norm)
    optimizer.step()
    return loss.item()


def _row(task: Task, progress: Progress, ranks: Ranks) -> Row:
    """Return the next row of the curve: the mean loss of all ranks since the last row."""
    steps = progress.step - (progress.rows[-1]["step"] if progress.rows else 0)
    total = summed(torch.tensor(progress.loss, dtype=torch.float64, device=ranks.device)).item()
    progress.loss = 0.0
    return {
        "step": progress.step,
        "learning_rate": task.learning_rate(progress.step - 1),
        "loss": total / (ranks.world * steps),
    }


def _write_curve(folder: Path, progress: Progress, ranks: Ranks) -> None:
    if ranks.is_first and progress.rows:
        write_csv(folder / CURVE, progress.rows)


def _not_finite(loss: Tensor, q: nn.Module, inputs: Any) -> str:
    """Return the first rank whose loss is not finite, and its first node with such an operand, on every rank."""
    own = None
    if loss.isfinite():
        # FSDP2 gathers in every forward: the rank that looks for its node needs the others to run it, too.
        first_not_finite(q, inputs)
    else:
        try:
            check_finite(loss, q, inputs)
        except OctavError as error:
            own = str(error)
    everywhere: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, own)
    return next(f"rank {rank}: {text}" for rank, text in enumerate(everywhere) if text is not None)
