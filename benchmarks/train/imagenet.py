"""The paper's recipes on ImageNet.

torchrun --nproc-per-node=8 -m benchmarks.train.imagenet DATA --model resnet50 --from-scratch --out OUT
torchrun --nproc-per-node=4 -m benchmarks.train.imagenet DATA --model resnet50 --retrain float.pt --out OUT
"""

import argparse
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from benchmarks.train import options as common
from benchmarks.train.epochs import Row, Run, Task, train
from benchmarks.train.folder import Images, folders
from benchmarks.train.paper import FROM_SCRATCH, RETRAIN, recipe_of
from benchmarks.train.ranks import Ranks, spread, summed
from benchmarks.train.shares import once, training, validation
from octav_fx import OctavError, zoo

# Images that the hints are filled with.
_EXAMPLES = 8


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Train as the arguments say; returns the curve. An OctavError ends the process without a traceback."""
    return common.started("imagenet", run, _parser().parse_args(arguments))


def run(options: argparse.Namespace, ranks: Ranks) -> list[Row]:
    """One run on a process group that stands."""
    start = FROM_SCRATCH if options.from_scratch else RETRAIN
    recipe = recipe_of(options.recipe or options.model, start)
    batch, epochs = options.batch or recipe.batch, options.epochs or recipe.epochs
    images, held_out = folders(options.data, options.size, options.seed)
    lr = common.learning_rate(options.lr, recipe.lr, recipe.global_batch, batch, ranks)
    q = _model(options, images, ranks)
    called = spread(q, options.parallel, ranks, compiled=options.compile)
    optimizer = torch.optim.SGD(common.groups(q, recipe.weight_decay), lr, recipe.momentum)
    steps = len(training(images, ranks, batch, options.seed, 0))

    def batches(epoch: int, done: int) -> DataLoader[Any]:
        images.epoch = epoch
        return training(images, ranks, batch, options.seed, epoch, done, options.workers)

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

    task = Task(steps, batches, inputs, loss, lambda step: recipe.lr_at(step // steps, lr), evaluate)
    settings = common.settings(options, lr=lr, global_batch=batch * ranks.world)
    return train(
        task, Run(options.out, epochs, options.save_every, options.seed, settings), q, called, optimizer, ranks
    )


def validate(called: nn.Module, images: Dataset[Any], ranks: Ranks, batch: int, workers: int) -> dict[str, float]:
    """Shares of the images whose class is the best, and among the best five; each image counted once.

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
    """A float checkpoint: a state_dict, alone or as "model" or "state_dict", with or without DDP's "module."."""
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
