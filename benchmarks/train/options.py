"""What both recipes of the paper take on the command line, and the quantized model that follows from it."""

import argparse
import json
from pathlib import Path
from typing import Any

from octav_fx import Config, OctavError


def parser(module: str, description: str) -> argparse.ArgumentParser:
    """Quantization, processes, checkpoints; the recipe adds its own."""
    made = argparse.ArgumentParser(
        prog=f"torchrun --nproc-per-node=N -m benchmarks.train.{module}", description=description
    )
    made.add_argument("--out", type=Path, required=True, help="folder of checkpoint.pt and curve.csv")
    made.add_argument("--clip", default=Config.clip)
    made.add_argument("--bits", type=int, default=4, help="of weights and activations (default 4)")
    made.add_argument("--config", default="{}", help="""further fields of Config, as JSON: '{"edge_bits": null}'""")
    made.add_argument("--float", action="store_true", dest="is_float", help="no quantizers: the float baseline")
    made.add_argument("--parallel", choices=("ddp", "fsdp2"), default="ddp")
    made.add_argument("--compile", action="store_true", help='torch.compile(backend="octav")')
    made.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    made.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--epochs", type=int, help="default: the recipe's")
    made.add_argument("--batch", type=int, help="of each rank (default: the recipe's)")
    made.add_argument("--save-every", type=int, default=1000, help="steps between checkpoints (default 1000)")
    return made


def config_of(options: argparse.Namespace) -> Config:
    """The Config that the options ask for."""
    try:
        further = json.loads(options.config)
    except json.JSONDecodeError as error:
        raise OctavError(f"--config {options.config}: no JSON: {error}") from error
    if not isinstance(further, dict):
        raise OctavError(f"--config {options.config}: a JSON object of Config's fields")
    fields = {"weight_bits": options.bits, "activation_bits": options.bits, "clip": options.clip}
    return Config.from_dict({**fields, **further})


def check(options: argparse.Namespace) -> None:
    """Raise OctavError for numbers that no run can have."""
    for name in ("epochs", "batch", "save_every"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise OctavError(f"--{name.replace('_', '-')} {value}: at least 1")
    if options.is_float and options.compile:
        raise OctavError("--float --compile: backend='octav' would quantize the float model; leave one of them out")


def settings(options: argparse.Namespace, **decided: Any) -> dict[str, Any]:
    """What a run and its checkpoint have in common: all but where files are, how it is spread, how long it is."""
    left_out = ("out", "data", "device", "parallel", "compile", "save_every", "workers", "batch", "epochs")
    kept = {name: value for name, value in vars(options).items() if name not in left_out}
    return {name: str(value) if isinstance(value, Path) else value for name, value in {**kept, **decided}.items()}
