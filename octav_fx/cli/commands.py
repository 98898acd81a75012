"""What each command does, in the library's own calls."""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from octav_fx import demo
from octav_fx.cli import models
from octav_fx.cli.compare import compared
from octav_fx.cli.models import Subject
from octav_fx.cli.output import as_csv, as_text
from octav_fx.cli.progress import stage
from octav_fx.deploy.deployment import deployment
from octav_fx.deploy.export import export_onnx
from octav_fx.deploy.freeze import calibrate, freeze
from octav_fx.errors import OctavError
from octav_fx.nn import FakeQuantizer
from octav_fx.reporting.report.page import report
from octav_fx.reporting.rows import coverage, rows
from octav_fx.reporting.table import table
from octav_fx.training.quantize import quantize


def run_demo(options: argparse.Namespace) -> None:
    """Train ResNet-18 in float and at 4 bits on handwritten digits; write it for onnxruntime, with a report."""
    demo.main(options.epochs, options.seed, options.out)


def run_table(options: argparse.Namespace) -> None:
    """Print the table of a model, or its rows as data."""
    subject, q = _quantized(options)
    with stage("measuring"):
        if options.json or options.csv:
            found = rows(q, subject.inputs).chosen(options.filter, options.sort)
            print(found.to_json() if options.json else found.to_csv().rstrip())
            return
        width = shutil.get_terminal_size((120, 24)).columns if sys.stdout.isatty() else 120
        text = table(q, subject.inputs, filter=options.filter, sort=options.sort, width=width)
    print(text)


def run_report(options: argparse.Namespace) -> None:
    """Write the report of a model."""
    subject, q = _quantized(options)
    with stage("measuring"):
        path = report(q, options.output, subject.inputs, title=options.model)
    print(f"{path}: open it in a browser")


def run_quantize(options: argparse.Namespace) -> None:
    """Quantize after training: calibrate, freeze, write an ONNX file, and say what it costs."""
    subject, q = _quantized(options)
    _freeze(q, subject)
    with stage("writing"):
        export_onnx(q, subject.inputs, options.onnx, target=options.target)
        if options.state is not None:
            torch.save(q.state_dict(), options.state)
    with stage("comparing"):
        found = compared(subject.model, q, subject.inputs, seconds=0, quantized_file=options.onnx)
    quantized = coverage(q).share
    summary = {"quantized_macs": quantized, "onnx_bytes": Path(options.onnx).stat().st_size}
    if options.json:
        print(json.dumps({**summary, "runs": found}, indent=1))
        return
    _show(found, options)
    if not options.csv:
        print(f"\n{quantized:.2%} of the multiply-accumulates are quantized; {options.onnx} is written")


def run_export(options: argparse.Namespace) -> None:
    """Write a trained and frozen model as ONNX; without clips in --weights they are calibrated first."""
    subject = _subject(options)
    with stage("quantizing"):
        q = quantize(subject.model, subject.inputs, models.config(options))
    models.load_weights(q, options.weights)
    if any(m.clip is None for m in q.modules() if isinstance(m, FakeQuantizer)):
        _freeze(q, subject)
    with stage("writing"):
        export_onnx(q, subject.inputs, options.onnx, target=options.target)
    with stage("comparing"):
        print(deployment(q, subject.inputs, options.onnx))


def run_compare(options: argparse.Namespace) -> None:
    """Print time, size and outputs of the float and the quantized model in PyTorch and onnxruntime."""
    subject, q = _quantized(options)
    _freeze(q, subject)
    with stage("timing"):
        found = compared(subject.model, q, subject.inputs, seconds=options.seconds)
    if options.json:
        print(json.dumps(found, indent=1))
        return
    _show(found, options)


def _subject(options: argparse.Namespace) -> Subject:
    # Modules of the user's own are looked for where the command is given.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    with stage("loading"):
        return models.load(options)


def _quantized(options: argparse.Namespace) -> tuple[Subject, nn.Module]:
    subject, config = _subject(options), models.config(options)
    models.load_weights(subject.model, options.weights)
    with stage("quantizing"):
        return subject, quantize(subject.model, subject.inputs, config)


def _freeze(q: nn.Module, subject: Subject) -> None:
    if subject.is_noise:
        print(
            "octav-fx: clips are those of random inputs: give data with --data package.module:callable",
            file=sys.stderr,
        )
    with stage("calibrating"):
        freeze(calibrate(q, subject.batches))


def _show(found: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> None:
    print(as_csv(found) if options.csv else as_text(found))


def check_writable(path: str) -> None:
    """Raise OctavError, before minutes of work, where a file cannot be written."""
    folder = Path(path).resolve().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OctavError(f"{path}: {folder} is no folder that can be written to")
