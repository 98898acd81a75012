"""python -m octav_fx: the command line."""

import argparse
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from octav_fx import demo, zoo
from octav_fx.config import Config
from octav_fx.deploy.deployment import deployment
from octav_fx.deploy.export import export_onnx
from octav_fx.deploy.freeze import calibrate, freeze
from octav_fx.errors import OctavError
from octav_fx.reporting.table import table
from octav_fx.training.quantize import quantize


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; an OctavError is printed without a traceback."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except OctavError as error:
        print(f"octav_fx: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m octav_fx", description="Quantization-aware training with OCTAV.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    shown = commands.add_parser("demo", help="train ResNet-18 in float and at 4 bits on handwritten digits")
    shown.add_argument("--epochs", type=int, default=4, help="epochs in float, and again quantized (default 4)")
    shown.add_argument("--seed", type=int, default=0)
    shown.set_defaults(run=lambda options: demo.main(options.epochs, options.seed))
    tabled = commands.add_parser("table", help="print the table of a model with random weights on random inputs")
    tabled.set_defaults(run=lambda options: print(table(_quantized(options)[0])))
    exported = commands.add_parser("export", help="write a model as integers in ONNX, and compare what it computes")
    exported.add_argument("--onnx", required=True, metavar="PATH", help="the file to write")
    exported.set_defaults(run=_export)
    for command in (tabled, exported):
        command.add_argument("model", help='a torchvision name ("resnet18") or "package.module:callable"')
        command.add_argument("--input", default="1x3x224x224", help="shape of the input (default 1x3x224x224)")
        command.add_argument("--weight-bits", type=int, default=4)
        command.add_argument("--activation-bits", type=int, default=4)
        command.add_argument("--clip", default="octav")
    return parser


def _export(options: argparse.Namespace) -> None:
    """Write the model as ONNX, with static clips of the same random inputs."""
    q, x = _quantized(options)
    freeze(calibrate(q, [x]))
    export_onnx(q, x, options.onnx)
    print(deployment(q, x, options.onnx))


def _quantized(options: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    try:
        shape = [int(size) for size in options.input.split("x")]
    except ValueError:
        raise OctavError(f"--input {options.input}: sizes joined by x, as in 1x3x224x224") from None
    config = Config(weight_bits=options.weight_bits, activation_bits=options.activation_bits, clip=options.clip)
    torch.manual_seed(0)
    model = zoo.load(options.model).eval()
    x = torch.randn(shape)
    return quantize(model, x, config), x


if __name__ == "__main__":
    sys.exit(main())
