"""The paper's recipes on ImageNet (arXiv 2206.06501, appendix E.1).

torchrun --nproc-per-node=8 -m examples.imagenet.train DATA --model resnet50 --from-scratch --out OUT
torchrun --nproc-per-node=4 -m examples.imagenet.train DATA --model resnet50 --retrain float.pt --out OUT

The same command again goes on from OUT/checkpoint.pt, also after it was killed.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from examples.common import options as common
from examples.common.checkpoint import Row
from examples.common.distributed import Ranks, parallelize, summed
from examples.common.loop import Task, pact_decay, train
from examples.common.samplers import once, training, validation
from examples.imagenet.data import Images, folders
from octav_fx import OctavError, param_groups, zoo

FROM_SCRATCH: Final = "from-scratch"
RETRAIN: Final = "retrain"
# Images that quantize() is shown.
_EXAMPLES: Final = 8


@dataclass(frozen=True, slots=True)
class Schedule:
    """SGD with momentum; the learning rate is divided by ten every so many epochs."""

    lr: float
    gpus: int
    # Images per GPU.
    batch: int
    epochs: int
    # Epochs between two divisions by ten.
    every: int
    weight_decay: float
    momentum: float = 0.9

    @property
    def global_batch(self) -> int:
        """Images of one step."""
        return self.gpus * self.batch

    def lr_at(self, epoch: int, lr: float) -> float:
        """Return the learning rate of an epoch (from 0) of a run that began with lr."""
        return lr * 0.1 ** (epoch // self.every)


# Three things are not known of the paper: the momentum of the ResNets, here that of the MobileNets; of retraining the
# batch per GPU and the weight decay, here those from scratch; whether norms and biases decay, here they do not.
SCHEDULES: Final = {
    ("resnet18", FROM_SCRATCH): Schedule(0.1, 8, 64, 150, 30, 1e-4),
    ("resnet50", FROM_SCRATCH): Schedule(0.1, 8, 64, 150, 30, 1e-4),
    ("resnet101", FROM_SCRATCH): Schedule(0.1, 8, 64, 80, 30, 1e-4),
    ("mobilenet_v2", FROM_SCRATCH): Schedule(0.2, 8, 128, 300, 100, 4e-5),
    ("mobilenet_v3_large", FROM_SCRATCH): Schedule(0.2, 8, 128, 300, 100, 1e-5),
    ("mobilenet_v3_small", FROM_SCRATCH): Schedule(0.2, 8, 128, 300, 100, 1e-5),
    ("resnet18", RETRAIN): Schedule(1e-4, 4, 64, 30, 10, 1e-4),
    ("resnet50", RETRAIN): Schedule(1e-4, 4, 64, 15, 5, 1e-4),
    ("resnet101", RETRAIN): Schedule(1e-4, 4, 64, 15, 5, 1e-4),
    ("mobilenet_v2", RETRAIN): Schedule(1e-2, 4, 128, 30, 10, 4e-5),
    ("mobilenet_v3_large", RETRAIN): Schedule(1e-2, 4, 128, 30, 10, 1e-5),
    ("mobilenet_v3_small", RETRAIN): Schedule(1e-2, 4, 128, 30, 10, 1e-5),
}


def schedule_of(model: str, start: str) -> Schedule:
    """Return the row of a model. Raises OctavError for one that the paper has no schedule for."""
    if (model, start) not in SCHEDULES:
        known = ", ".join(name for name, other in SCHEDULES if other == start)
        raise OctavError(f"no {start} recipe {model!r}; there are {known}: name the one to follow with --recipe")
    return SCHEDULES[model, start]


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Train as the arguments say; return the curve. An OctavError ends the process without a traceback."""
    return common.start("imagenet", run, _parser().parse_args(arguments))


def run(options: argparse.Namespace, ranks: Ranks) -> list[Row]:
    """Train on a process group that stands."""
    start = FROM_SCRATCH if options.from_scratch else RETRAIN
    schedule = schedule_of(options.recipe or options.model, start)
    batch, epochs = options.batch or schedule.batch, options.epochs or schedule.epochs
    images, held_out = folders(options.data, options.size, options.seed)
    lr = common.learning_rate(options.lr, schedule.lr, schedule.global_batch, batch, ranks)

    q = _model(options, images, ranks)
    called = parallelize(q, options.parallel, ranks, compiled=options.compile)
    # After parallelize(): FSDP2 puts other parameters in place of those that were there.
    optimizer = torch.optim.SGD(param_groups(q, schedule.weight_decay), lr, schedule.momentum)
    steps = len(training(images, ranks, batch, options.seed, 0))

    def batches(first: int) -> Iterator[tuple[Tensor, Tensor]]:
        for epoch in range(first // steps, epochs):
            images.epoch = epoch
            done = max(0, first - epoch * steps)
            yield from training(images, ranks, batch, options.seed, epoch, done, options.workers)

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast(ranks.device.type, torch.bfloat16, enabled=options.bf16)

    def inputs(batch: tuple[Tensor, Tensor]) -> Tensor:
        return batch[0].to(ranks.device, non_blocking=True)

    def loss(called: nn.Module, x: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        with autocast():
            return F.cross_entropy(called(x), batch[1].to(ranks.device, non_blocking=True))

    def evaluate(called: nn.Module) -> dict[str, float]:
        with torch.no_grad(), autocast():
            return validate(called, held_out, ranks, batch, options.workers)

    task = Task(
        steps=epochs * steps,
        batches=batches,
        inputs=inputs,
        loss=loss,
        learning_rate=lambda step: schedule.lr_at(step // steps, lr),
        evaluate=evaluate,
        # Once an epoch.
        evaluate_after=range(steps, epochs * steps + 1, steps),
        row_every=steps,
        seed=options.seed,
        settings=common.settings(options, lr=lr, global_batch=batch * ranks.world),
        penalty=pact_decay(q, schedule.weight_decay),
    )
    return train(task, options.out, q, called, optimizer, ranks, options.save_every)


def validate(called: nn.Module, images: Dataset[Any], ranks: Ranks, batch: int, workers: int) -> dict[str, float]:
    """Return the shares of the images whose class is the best, and among the best five; each image counted once.

    An activation's clip is that of its batch. So a quantized model's figures depend, a little, on the batch and on the
    number of ranks, as a float one's do not.
    """
    counts = torch.zeros(3, dtype=torch.long, device=ranks.device)
    for step, (x, labels) in enumerate(validation(images, ranks, batch, workers)):
        real = once(step, batch, len(x), ranks, len(images)).to(ranks.device)  # type: ignore[arg-type]
        logits = called(x.to(ranks.device, non_blocking=True))
        best = logits.topk(min(5, logits.shape[1])).indices
        right = (best == labels.to(ranks.device)[:, None]) & real[:, None]
        counts += torch.stack([right[:, 0].sum(), right.sum(), real.sum()])
    top1, top5, total = summed(counts).tolist()
    return {"top1": top1 / total, "top5": top5 / total, "images": total}


def _model(options: argparse.Namespace, images: Images, ranks: Ranks) -> nn.Module:
    torch.manual_seed(options.seed)
    model = zoo.load(options.model, num_classes=len(images.classes))
    if options.retrain:
        _load(model, options.retrain)
    model.to(ranks.device).train()
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(options.seed))[:_EXAMPLES]
    examples = torch.stack([images[int(index)][0] for index in chosen])
    return common.quantized(model, examples.to(ranks.device), options, ranks)


def _load(model: nn.Module, path: Path) -> None:
    """Load a float checkpoint: a state_dict, alone or as "model" or "state_dict", with or without DDP's "module."."""
    if not path.is_file():
        raise OctavError(f"--retrain {path}: no such file; a state_dict of the float model is expected there")
    found = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("model", "state_dict"):
        found = found.get(key, found)
    try:
        model.load_state_dict({name.removeprefix("module."): value for name, value in found.items()})
    except RuntimeError as error:
        raise OctavError(f"--retrain {path}: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = common.parser("imagenet", "The recipes of arXiv 2206.06501, appendix E.1, on ImageNet.")
    parser.add_argument("data", type=Path, help="folder with train/CLASS/ and val/CLASS/")
    parser.add_argument("--model", required=True, help='a torchvision name ("resnet50") or "package.module:callable"')
    parser.add_argument("--recipe", help="model of the paper whose schedule to follow (default: --model)")
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--from-scratch", action="store_true")
    start.add_argument("--retrain", type=Path, metavar="CHECKPOINT", help="float checkpoint to begin with")
    parser.add_argument("--size", type=int, default=224, help="pixels of the crops (default 224)")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="loading, for each rank")
    return parser


if __name__ == "__main__":
    main()
