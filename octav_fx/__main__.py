"""octav-fx, or python -m octav_fx: the command line."""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from octav_fx.cli import commands
from octav_fx.errors import OctavError
from octav_fx.version import __version__

_MODEL = (
    "a torchvision name (resnet18), timm/NAME, transformers/TYPE or transformers/FOLDER, or package.module:callable, "
    "which returns a module, or a module and its inputs"
)
# After training, 4 bits are too few for most models.
_POST_TRAINING = {"weight_bits": 8, "activation_bits": 8, "residual_bits": 8}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; errors are printed without a traceback, OCTAV_FX_TRACEBACK=1 shows those of other libraries."""
    options = _parser().parse_args(arguments)
    try:
        for path in (getattr(options, "onnx", None), getattr(options, "output", None)):
            if path is not None:
                commands.check_writable(path)
        with warnings.catch_warnings():
            # Of torch's exporter, to whoever calls it.
            warnings.simplefilter("ignore", FutureWarning)
            options.run(options)
    except OctavError as error:
        print(f"octav_fx: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if os.environ.get("OCTAV_FX_TRACEBACK"):
            raise
        print(f"octav_fx: {type(error).__name__}: {error}", file=sys.stderr)
        print("OCTAV_FX_TRACEBACK=1 shows where it comes from", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="octav-fx", description="Quantization-aware training with OCTAV.")
    parser.add_argument("--version", action="version", version=f"octav_fx {__version__}, torch {torch.__version__}")
    found = parser.add_subparsers(required=True, metavar="COMMAND")
    shown = found.add_parser("demo", help="train ResNet-18 in float and at 4 bits on handwritten digits")
    shown.add_argument("--epochs", type=int, default=4, help="epochs in float, and again quantized (default 4)")
    shown.add_argument("--seed", type=int, default=0)
    shown.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write an ONNX file and a report there, and time them"
    )
    shown.set_defaults(run=commands.run_demo)
    tabled = found.add_parser("table", help="print what becomes of each operand of a model")
    tabled.add_argument("--filter", metavar="GLOB", help="rows of these nodes only")
    tabled.add_argument("--sort", metavar="FIELD", help="order by a field of the rows: --sort sqnr, --sort=-macs")
    tabled.set_defaults(run=commands.run_table, fields={})
    reported = found.add_parser("report", help="write what becomes of each operand as one HTML file with plots")
    reported.add_argument("-o", "--output", default="report.html", metavar="PATH", help="(default report.html)")
    reported.set_defaults(run=commands.run_report, fields={})
    quantized = found.add_parser("quantize", help="after training, to 8 bits: calibrate, freeze and write an ONNX file")
    quantized.add_argument("--state", metavar="PATH", help="write the frozen state_dict too")
    quantized.set_defaults(run=commands.run_quantize, fields=_POST_TRAINING)
    exported = found.add_parser("export", help="write a trained model as integers in ONNX, and say what it computes")
    exported.set_defaults(run=commands.run_export, fields={})
    for command in (quantized, exported):
        command.add_argument("--onnx", required=True, metavar="PATH", help="the file to write")
        command.add_argument("--target", default="onnxruntime", help="as for octav_fx.export_onnx")
    timed = found.add_parser("compare", help="time float and integers in PyTorch and onnxruntime, side by side")
    timed.add_argument("--seconds", type=float, default=1.0, help="for each way to run it (default 1)")
    timed.set_defaults(run=commands.run_compare, fields=_POST_TRAINING)
    for command in (tabled, reported, quantized, exported, timed):
        _add_model(command)
    for command in (tabled, quantized, timed):
        form = command.add_mutually_exclusive_group()
        form.add_argument("--json", action="store_true", help="print JSON")
        form.add_argument("--csv", action="store_true", help="print CSV")
    return parser


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help=_MODEL)
    command.add_argument("--input", metavar="SIZES", help="shape of random inputs, as 1x3x224x224")
    command.add_argument("--weights", metavar="PATH", help="a state_dict of torch.save or .safetensors, not random")
    command.add_argument("--data", metavar="CALLABLE", help="package.module:callable, which returns batches")
    command.add_argument("--batches", type=int, default=32, help="at most so many of them (default 32)")
    quantized = command.add_argument_group("configuration, as in octav_fx.Config")
    quantized.add_argument("--config", metavar="JSON", help="fields as a JSON object, or a file of one")
    quantized.add_argument("--weight-bits", type=int)
    quantized.add_argument("--activation-bits", type=int)
    quantized.add_argument("--edge-bits", metavar="BITS", help='a number, or "none"')
    quantized.add_argument("--residual-bits", metavar="BITS", help='a number, or "none"')
    quantized.add_argument("--clip")
    quantized.add_argument("--attention")
    quantized.add_argument("--override", action="append", default=[], metavar="GLOB=BITS", help='BITS may be "float"')


if __name__ == "__main__":
    sys.exit(main())
