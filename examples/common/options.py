"""What both recipes take on the command line, and the quantized model that follows from it."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from examples.common.checkpoint import Row
from examples.common.distributed import PARALLEL, Ranks, process_group
from octav_fx import Config, OctavError, coverage, quantize


def parser(recipe: str, description: str) -> argparse.ArgumentParser:
    """Return a parser of what concerns quantization, processes and checkpoints; the recipe adds its own."""
    made = argparse.ArgumentParser(
        prog=f"torchrun --nproc-per-node=N -m examples.{recipe}.train", description=description
    )
    made.add_argument("--out", type=Path, required=True, help="folder of checkpoint.pt and curve.csv")
    made.add_argument("--clip", default=Config.clip)
    made.add_argument("--bits", type=int, default=4, help="of weights and activations (default 4)")
    made.add_argument("--config", default="{}", help="""further fields of Config, as JSON: '{"edge_bits": null}'""")
    made.add_argument("--float", action="store_true", dest="is_float", help="no quantizers: the float baseline")
    made.add_argument("--parallel", choices=PARALLEL, default=PARALLEL[0])
    made.add_argument("--compile", action="store_true", help='torch.compile(backend="octav")')
    made.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    made.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--epochs", type=int, help="default: the recipe's")
    made.add_argument("--batch", type=int, help="of each rank (default: the recipe's)")
    made.add_argument("--lr", type=float, help="default: the recipe's, in proportion to the global batch")
    made.add_argument("--save-every", type=int, default=1000, help="steps between checkpoints (default 1000)")
    return made


def start(recipe: str, run: Callable[[argparse.Namespace, Ranks], list[Row]], options: argparse.Namespace) -> list[Row]:
    """Run a recipe on a process group; an OctavError ends the process with one line."""
    try:
        check(options)
        with process_group(options.device) as ranks:
            return run(options, ranks)
    except OctavError as error:
        raise SystemExit(f"examples.{recipe}: {error}") from error


def config_of(options: argparse.Namespace, **fields: Any) -> Config:
    """Return the Config that the options ask for. fields: defaults of the recipe, which --config overrides."""
    try:
        further = json.loads(options.config)
    except json.JSONDecodeError as error:
        raise OctavError(f"--config {options.config}: no JSON: {error}") from error
    if not isinstance(further, dict):
        raise OctavError(f"--config {options.config}: a JSON object of Config's fields")
    named = {"weight_bits": options.bits, "activation_bits": options.bits, "clip": options.clip}
    return Config.from_dict({**fields, **named, **further})


def quantized(model: nn.Module, examples: Any, options: argparse.Namespace, ranks: Ranks, **fields: Any) -> nn.Module:
    """Return the model with quantizers, or itself with --float. fields: a recipe's own defaults of Config."""
    config = config_of(options, **fields)
    if options.is_float:
        return model
    q = quantize(model, examples, config)
    found = coverage(q)
    ranks.say(f"{found.share:.2%} of the multiply-accumulates are quantized")
    return q


def learning_rate(asked: float | None, lr: float, global_batch: int, batch: int, ranks: Ranks) -> float:
    """Return what is asked for, or the recipe's in proportion to the global batch; print it where it is another."""
    total = batch * ranks.world
    chosen = lr * total / global_batch if asked is None else asked
    if total != global_batch:
        how = "scaled in proportion" if asked is None else "as asked"
        ranks.say(
            f"global batch {total}, the paper's is {global_batch}: learning rate {chosen:g} ({how}), "
            f"the paper's is {lr:g}"
        )
    return chosen


def check(options: argparse.Namespace) -> None:
    """Raise OctavError for numbers that no run can have."""
    for name in ("epochs", "batch", "save_every"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise OctavError(f"--{name.replace('_', '-')} {value}: at least 1")
    if options.is_float and options.compile:
        raise OctavError("--float --compile: backend='octav' would quantize the float model; leave one of them out")


def settings(options: argparse.Namespace, **decided: Any) -> dict[str, Any]:
    """Return what a run and its checkpoint have in common: all but places of files, kinds of parallelism and length."""
    left_out = ("out", "data", "device", "parallel", "compile", "save_every", "workers", "batch", "epochs")
    kept = {name: value for name, value in vars(options).items() if name not in left_out}
    return {name: str(value) if isinstance(value, Path) else value for name, value in {**kept, **decided}.items()}
