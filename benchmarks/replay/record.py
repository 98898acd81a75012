"""What the compiler does with one model, as texts by name."""

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import octav_fx
from benchmarks.replay.internals import lowered_graphs
from benchmarks.replay.models import Model
from benchmarks.replay.onnx_text import onnx_text
from benchmarks.replay.text import graph_lines, normal, prepared, table

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


# In place of the rest, where something fails that is no refusal of ours.
FAILED: Final = "failed"


def record(model: Model) -> dict[str, str]:
    """Write all that is recorded of a model: what -> text. A refusal is a text like any other."""
    found: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for what, text in _columns(model):
                found[what] = text
        except Exception as error:
            found[FAILED] = normal(f"{type(error).__name__}: {error}")
    return found


def _columns(model: Model) -> Iterator[tuple[str, str]]:
    try:
        q, inputs = _quantized(model)
    except octav_fx.OctavError as error:
        yield "refused", normal(str(error))
        return
    yield "training graph", prepared(q, True)
    yield "eval graph", prepared(q, False)
    yield "table", table(q)
    if model.lowered:
        yield "training lowered", _lowered(q, inputs, True)
        yield "eval lowered", _lowered(q, inputs, False)
    if model.float_lowered:
        net, inputs = _made(model)
        options = model.config.to_dict()
        yield "float training lowered", _lowered(net, inputs, True, options)
        yield "float eval lowered", _lowered(net, inputs, False, options)
    if model.onnx:
        yield "onnx", _onnx(model)


def _made(model: Model) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    net, inputs = model.make()
    return net.train(model.training), inputs


def _quantized(model: Model, prepare: Callable[[nn.Module], None] = lambda net: None) -> tuple[nn.Module, Any]:
    net, inputs = _made(model)
    prepare(net)
    q = octav_fx.quantize(net, inputs, model.config, rules=model.rules, leaves=model.leaves, blocks=())
    return q, inputs


def _lowered(net: nn.Module, inputs: Any, training: bool, options: dict[str, Any] | None = None) -> str:
    """Write what LOWER leaves of each graph of a compiled model."""
    torch.manual_seed(0)
    args, kwargs = _call(inputs)
    try:
        net.train(training)
        with lowered_graphs(graph_lines) as found, torch.set_grad_enabled(training):
            torch.compile(net, backend="octav", options=options)(*args, **kwargs)
    except octav_fx.OctavError as error:
        return normal(f"refused: {error}")
    return "\n\n".join(found)


def _call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def _onnx(model: Model) -> str:
    """Write the file of the frozen model, of values that no CPU rounds in its own way."""
    q, inputs = _quantized(model, _on_coarse_grid)
    q.eval()
    exact = pytree.tree_map(lambda x: _coarse(x) if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)
    octav_fx.freeze(octav_fx.calibrate(q, [exact]))
    _power_of_two_clips(q)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        try:
            # The exporter prints its progress.
            with contextlib.redirect_stdout(None):
                octav_fx.export_onnx(q, exact, path)
        except octav_fx.OctavError as error:
            return normal(f"refused: {error}")
        return normal(onnx_text(path.read_bytes()))


def _on_coarse_grid(net: nn.Module) -> None:
    """Round all state to multiples of 2^-8: with clips that are powers of two each code is exact."""
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, _NORMS):
                # Not one: 1 / sqrt(1 + eps) is 0.999995, half way between two numbers of five digits.
                factors = torch.arange(module.num_features) % 3
                module.running_var = torch.exp2(1.0 + factors)
                module.running_mean = factors / 16
                nn.init.normal_(module.weight)
        for value in (*net.parameters(), *net.buffers()):
            if value.is_floating_point():
                value.copy_(_coarse(value))


def _coarse(x: Tensor) -> Tensor:
    return (x * 256).round() / 256


def _power_of_two_clips(q: nn.Module) -> None:
    """Replace the clips that freeze() found, which depend on sums: each by its place, so that a swap is seen."""
    for place, (name, clip) in enumerate(q.state_dict().items()):
        if name.rpartition(".")[2] == "clip":
            channels = torch.arange(clip.numel()).reshape(clip.shape)
            clip.copy_(torch.exp2((place + channels) % 3 - 2.0))
