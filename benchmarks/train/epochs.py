"""The loop of both recipes of the paper: epochs of steps on all ranks, a checkpoint now and then, a curve."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.train import checkpoint
from benchmarks.train.ranks import Ranks, preserved_buffers, read, restore, save, seed_step, summed
from octav_fx import OctavError
from octav_fx.debug import check_finite, first_not_finite

Row = dict[str, float]


@dataclass(frozen=True)
class Task:
    """What is trained: its data, its loss, its learning rate and its evaluation."""

    # Steps of one epoch.
    steps: int
    # (epoch, steps already done in it) -> the batches left.
    batches: Callable[[int, int], Iterable[Any]]
    # A batch -> the model's inputs as quantize() takes them, a tensor or keyword arguments, on this rank's device.
    inputs: Callable[[Any], Any]
    # (what spread() returned, inputs, batch) -> the mean loss, [].
    loss: Callable[[nn.Module, Any, Any], Tensor]
    # Step of the whole run, from 0 -> learning rate.
    lr: Callable[[int], float]
    # What spread() returned, in eval mode -> columns of the curve, the same on every rank.
    evaluate: Callable[[nn.Module], Mapping[str, float]]
    # Gradients are scaled down to this norm of all of them together; None: they are not.
    max_norm: float | None = None


@dataclass(frozen=True)
class Run:
    """How long, how often saved, where to, and what has to agree with a checkpoint found there."""

    out: Path
    epochs: int
    save_every: int
    seed: int
    settings: dict[str, Any]


def train(
    task: Task, run: Run, q: nn.Module, called: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> list[Row]:
    """Train and evaluate; returns the curve's rows, a dict for each epoch. Goes on from run.out/checkpoint.pt.

    q holds the state and is what is saved, called is what spread() made of it. Every rank calls this.
    Raises OctavError where the loss is not finite, or the checkpoint is of another run.
    """
    path = run.out / "checkpoint.pt"
    loss = torch.zeros((), dtype=torch.float64, device=ranks.device)
    rows: list[Row] = []
    first, done = 0, 0
    if path.exists():
        found = read(path)
        progress = found["progress"]
        _check_same(path, progress["settings"], run.settings)
        restore(found, q, optimizer, loss)
        rows, first, done = progress["rows"], progress["epoch"], progress["step"]
        ranks.say(f"going on from {path}: epoch {first + 1}, step {done + 1} of {task.steps}")
        if ranks.is_first and rows:
            # A run may have been killed between its last checkpoint and this.
            checkpoint.write_csv(run.out / "curve.csv", list(rows[0]), rows)
    elif ranks.is_first:
        run.out.mkdir(parents=True, exist_ok=True)

    def keep(epoch: int, done: int) -> None:
        save(path, q, optimizer, loss, {"epoch": epoch, "step": done, "rows": rows, "settings": run.settings})

    for epoch in range(first, run.epochs):
        called.train()
        bar = tqdm(total=task.steps, initial=done, desc=f"epoch {epoch + 1}", unit="step", disable=not ranks.is_first)
        for step, batch in enumerate(task.batches(epoch, done), done):
            number = epoch * task.steps + step
            seed_step(run.seed, number, ranks.rank)
            _step(task, q, called, optimizer, batch, number, loss)
            bar.update()
            if (step + 1) % run.save_every == 0 and step + 1 < task.steps:
                keep(epoch, step + 1)
        bar.close()
        preserved_buffers(q)
        called.eval()
        mean = summed(loss).item() / (ranks.world * task.steps)
        rows.append(
            {
                "epoch": epoch + 1,
                "lr": task.lr((epoch + 1) * task.steps - 1),
                "train_loss": mean,
                **task.evaluate(called),
            }
        )
        ranks.say("  ".join(f"{name} {value:.6g}" for name, value in rows[-1].items()))
        loss.zero_()
        done = 0
        keep(epoch + 1, 0)
        if ranks.is_first:
            checkpoint.write_csv(run.out / "curve.csv", list(rows[0]), rows)
    return rows


def _step(
    task: Task, q: nn.Module, called: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, number: int, loss: Tensor
) -> None:
    lr = task.lr(number)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    inputs = task.inputs(batch)
    value = task.loss(called, inputs, batch)
    # Before the weights take it in, and on every rank or on none.
    if summed((~value.detach().isfinite()).long()):
        raise OctavError(f"step {number}, learning rate {lr:g}, {_not_finite(value, q, inputs)}")
    value.backward()
    if task.max_norm is not None:
        nn.utils.clip_grad_norm_(called.parameters(), task.max_norm)
    optimizer.step()
    loss += value.detach()


def _not_finite(value: Tensor, q: nn.Module, inputs: Any) -> str:
    """The first rank whose loss is not finite, and its first node with such an operand; the same on all ranks."""
    own = None
    if value.isfinite():
        # FSDP2 gathers in every forward: the rank that looks for its node needs the others to run it, too.
        first_not_finite(q, inputs)
    else:
        try:
            check_finite(value, q, inputs)
        except OctavError as error:
            own = str(error)
    everywhere: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, own)
    return next(f"rank {rank}: {text}" for rank, text in enumerate(everywhere) if text is not None)


def _check_same(path: Path, saved: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    for name in sorted({*saved, *asked}):
        if saved.get(name) != asked.get(name):
            raise OctavError(
                f"{path} is of a run with {name}={saved.get(name)!r}, not {asked.get(name)!r}: "
                "choose another --out, or the same settings"
            )
