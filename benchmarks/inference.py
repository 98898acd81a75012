"""What inference costs: the float model, ours in each runtime, and what the runtime's own quantizer makes.

One process, one thread. Variants take turns; the least time of the calling thread counts, and ratios of it, because a
shared machine only ever adds time. A variant is a row of VARIANTS: from a float model and a batch to a function that
runs it. Models are untrained: time does not depend on the values.
"""

import copy
import importlib
import importlib.metadata
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from tabulate import tabulate
from torch import Tensor, nn

import octav_fx
from benchmarks import models, result
from octav_fx import Config
from octav_fx.deploy.runtimes import onnx_session

MODELS: Final = ("resnet18", "mobilenet_v2", "encoder")
BATCH: Final = 4
# Runs of each variant in a round.
_RUNS: Final = 4
# What the others are compared with, in their own runtime.
FLOAT: Final = "float onnxruntime"
EAGER: Final = "float PyTorch eager"
COMPILED: Final = "float PyTorch Inductor"

Run = Callable[[], Any]
Make = Callable[[nn.Module, Tensor, Path], Run]


def _load(name: str) -> tuple[nn.Module, Tensor]:
    """The model in eval mode, and 4 images of 224 px or 4 sequences of 128 tokens."""
    model, x, _ = models.load(name)
    return model.eval(), x[:BATCH] if x.dim() == 3 else torch.randn(BATCH, 3, 224, 224)


def _session(path: Path, x: Tensor) -> Run:
    session = onnx_session(path, 1)
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def _float_file(model: nn.Module, x: Tensor, path: Path) -> Path:
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert program is not None
    program.save(str(path))
    return path


def _float_onnx(model: nn.Module, x: Tensor, folder: Path) -> Run:
    return _session(_float_file(model, x, folder / "float.onnx"), x)


def _static(model: nn.Module, x: Tensor, folder: Path) -> Run:
    """Onnxruntime's own: unsigned activations, signed weights for each channel, calibrated on the batch."""
    tools: Any = importlib.import_module("onnxruntime.quantization")
    source, prepared, target = (folder / f"{name}.onnx" for name in ("source", "prepared", "static"))
    _float_file(model, x, source)
    tools.shape_inference.quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    batches = iter([{onnx_session(source, 1).get_inputs()[0].name: x.numpy()}])
    reader = type("Reader", (tools.CalibrationDataReader,), {"get_next": lambda self: next(batches, None)})
    kinds = {"activation_type": tools.QuantType.QUInt8, "weight_type": tools.QuantType.QInt8}
    tools.quantize_static(str(prepared), str(target), reader(), per_channel=True, **kinds)
    return _session(target, x)


def _ours(model: nn.Module, x: Tensor, config: Config) -> nn.Module:
    q = octav_fx.quantize(model, x, config)
    return octav_fx.freeze(octav_fx.calibrate(q, [x]))


def _our_onnx(weight_bits: int, activation_bits: int, residual_bits: int | None = 8) -> Make:
    config = Config(weight_bits, activation_bits, residual_bits=residual_bits)

    def make(model: nn.Module, x: Tensor, folder: Path) -> Run:
        path = folder / "ours.onnx"
        octav_fx.export_onnx(_ours(model, x, config), x, path)
        return _session(path, x)

    return make


def _last(x: Tensor) -> Tensor:
    """Return images channels last, as convolutions on a CPU want them."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _eager(model: nn.Module, x: Tensor, folder: Path) -> Run:
    own: Any = copy.deepcopy(model)
    return _warm(own.to(memory_format=torch.channels_last), _last(x))


def _compiled(model: nn.Module, x: Tensor, folder: Path) -> Run:
    # Freezing: weights are constants, and laid out beforehand.
    with torch._inductor.config.patch(freezing=True):
        return _warm(torch.compile(copy.deepcopy(model)), _last(x))


def _warm(function: Callable[[Tensor], Any], x: Tensor) -> Run:
    function(x)
    return lambda: function(x)


def _our_torch(bits: int, *, is_compiled: bool) -> Make:
    config = Config(bits, bits)

    def make(model: nn.Module, x: Tensor, folder: Path) -> Run:
        converted = octav_fx.convert(_ours(model, x, config))
        return _warm(torch.compile(converted, backend="octav") if is_compiled else converted, _last(x))

    return make


# Variant -> how it is made, and what it is compared with.
VARIANTS: Final[dict[str, tuple[Make, str]]] = {
    FLOAT: (_float_onnx, FLOAT),
    "onnxruntime's quantize_static": (_static, FLOAT),
    "octav_fx W8A8 onnxruntime": (_our_onnx(8, 8), FLOAT),
    "octav_fx W4A8 onnxruntime": (_our_onnx(4, 8), FLOAT),
    "octav_fx W4A4 onnxruntime": (_our_onnx(4, 4), FLOAT),
    "octav_fx W8A8 onnxruntime, residual_bits=None": (_our_onnx(8, 8, residual_bits=None), FLOAT),
    EAGER: (_eager, EAGER),
    "octav_fx W8A8 eager": (_our_torch(8, is_compiled=False), EAGER),
    "octav_fx W4A4 eager": (_our_torch(4, is_compiled=False), EAGER),
    COMPILED: (_compiled, COMPILED),
    "octav_fx W8A8 compiled": (_our_torch(8, is_compiled=True), COMPILED),
    "octav_fx W4A4 compiled": (_our_torch(4, is_compiled=True), COMPILED),
}


def main(rounds: int) -> None:
    """Measure all variants and write results/inference.json."""
    torch.set_num_threads(1)
    rows = [row for name in MODELS for row in measured(name, rounds)]
    ratio = "the float variant it is compared with over the variant"
    setting = {"threads": 1, "rounds": rounds, "runs": _RUNS, "batch": BATCH, "ratio": ratio}
    result.write("inference", {"setting": setting, "versions": _versions(), "rows": rows})
    print(tabulate(rows, headers="keys"))


def measured(name: str, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each variant of a model."""
    model, x = _load(name)
    runs: dict[str, Run] = {}
    notes: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for variant, (make, _) in VARIANTS.items():
            own = Path(folder) / str(len(runs) + len(notes))
            own.mkdir()
            try:
                runs[variant] = make(model, x, own)
                runs[variant]()
            except Exception as error:
                notes[variant] = str(error).strip().splitlines()[-1][:200]
                runs.pop(variant, None)
        least = dict.fromkeys(runs, float("inf"))
        for _ in range(rounds):
            for variant, run in runs.items():
                for _ in range(_RUNS):
                    start = time.thread_time()
                    run()
                    least[variant] = min(least[variant], time.thread_time() - start)
    rows: list[dict[str, Any]] = []
    for variant, (_, base) in VARIANTS.items():
        t, known = least.get(variant), least.get(base)
        ms = None if t is None else round(1000 * t, 2)
        ratio = None if t is None or known is None else round(known / t, 2)
        row = {"model": name, "variant": variant, "ms": ms, "compared with": base, "ratio": ratio}
        rows.append({**row, "note": notes.get(variant, "")})
    return rows


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("onnxruntime",)}
