"""What inference costs: the float model, ours in each runtime, and what other quantizers make.

One process, one thread. Variants take turns; the least time of the calling thread counts, and ratios of it, because a
shared machine only ever adds time. A variant is a row of VARIANTS: from a case, a float model and a batch, to a
function that runs it. Models are untrained: time does not depend on the values.

A case is written to results/inference.json when it is done, and one that is there for the same sources is not measured
again: so it can run in pieces, by --nets and --batches, and be broken off. CPUs without VNNI have a file of their own.
"""

import copy
import fnmatch
import importlib
import importlib.metadata
import importlib.util
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from tabulate import tabulate
from torch import Tensor, nn

import octav_fx
from benchmarks import models, result
from octav_fx import Config
from octav_fx.deploy.runtimes import onnx_session

MODELS: Final = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "vit_b_16", "encoder", "gpt")
BATCHES: Final = (1, 4, 16)
# Runs of each variant in a round.
_RUNS: Final = 4
# What the others are compared with, in their own runtime.
FLOAT: Final = "float onnxruntime"
EAGER: Final = "float PyTorch eager"
COMPILED: Final = "float PyTorch Inductor"
OPENVINO: Final = "float OpenVINO"
# What others make of the float model.
STATIC: Final = "onnxruntime's quantize_static"
NNCF: Final = "NNCF on OpenVINO"
TORCHAO: Final = "torchao's x86 flow, Inductor"

Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """A float model in eval mode, a batch for it, and a folder for files."""

    model: nn.Module
    x: Tensor
    folder: Path
    _made: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what make() returns, made once for each name: variants share what takes long."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    @property
    def last(self) -> Tensor:
        """Return the batch, images channels last, as convolutions on a CPU want them."""
        return self.x.contiguous(memory_format=torch.channels_last) if self.x.dim() == 4 else self.x


Make = Callable[[Case], Run]


class GPT(nn.Module):
    """Four pre-norm transformer layers, 256 wide with 4 heads, causal, and the next of 1000 tokens at each place."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 4, nn.LayerNorm(256), enable_nested_tensor=False)
        self.tokens, self.head = nn.Embedding(1000, 256), nn.Linear(256, 1000)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(128), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [batch, up to 128] -> logits [batch, as many, 1000]."""
        length = tokens.shape[1]
        mask = self.mask[:length, :length]
        logits: Tensor = self.head(self.blocks(self.tokens(tokens), mask, is_causal=True))
        return logits


def load(name: str, batch: int) -> tuple[nn.Module, Tensor]:
    """The model in eval mode, and images of 224 px or sequences of 128 tokens."""
    torch.manual_seed(0)
    if name == "gpt":
        return GPT().eval(), torch.randint(0, 1000, (batch, 128))
    model, x, _ = models.load(name)
    return model.eval(), torch.randn(batch, *(x.shape[1:] if x.dim() == 3 else (3, 224, 224)))


def _session(path: Path, x: Tensor) -> Run:
    session = onnx_session(path, 1)
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def _float_file(case: Case) -> Path:
    def write() -> Path:
        program = torch.onnx.export(case.model, (case.x,), dynamo=True, verbose=False)
        assert program is not None
        program.save(str(case.folder / "float.onnx"))
        return case.folder / "float.onnx"

    return Path(case.once("float file", write))


def _float_onnx(case: Case) -> Run:
    return _session(_float_file(case), case.x)


def static_file(case: Case) -> Path:
    """Onnxruntime's own: unsigned activations, signed weights for each channel, calibrated on the batch."""
    tools: Any = importlib.import_module("onnxruntime.quantization")
    source = _float_file(case)
    prepared, target = (case.folder / f"{name}.onnx" for name in ("prepared", "static"))
    tools.shape_inference.quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    batches = iter([{onnx_session(source, 1).get_inputs()[0].name: case.x.numpy()}])
    reader = type("Reader", (tools.CalibrationDataReader,), {"get_next": lambda self: next(batches, None)})
    kinds = {"activation_type": tools.QuantType.QUInt8, "weight_type": tools.QuantType.QInt8}
    tools.quantize_static(str(prepared), str(target), reader(), per_channel=True, **kinds)
    return target


def _static(case: Case) -> Run:
    return _session(static_file(case), case.x)


def _ours(case: Case, config: Config) -> nn.Module:
    def make() -> nn.Module:
        q = octav_fx.quantize(case.model, case.x[:1], config)
        return octav_fx.freeze(octav_fx.calibrate(q, [case.x[:1]]))

    made: nn.Module = case.once(repr(config), make)
    return made


def _our_file(case: Case, config: Config, target: str) -> Path:
    path = case.folder / f"{target}-{config.weight_bits}-{config.activation_bits}-{config.residual_bits}.onnx"
    octav_fx.export_onnx(_ours(case, config), case.x, path, target=target)
    return path


def _our_onnx(config: Config) -> Make:
    return lambda case: _session(_our_file(case, config, "onnxruntime"), case.x)


def _our_openvino(config: Config) -> Make:
    return lambda case: _in_openvino(_our_file(case, config, "openvino"), case.x)


def _in_openvino(path: Path, x: Tensor) -> Run:
    return _openvino_run(openvino_model(path), x)


def openvino_model(model: Path | bytes) -> Any:
    """Compile an ONNX file, or its bytes, with OpenVINO for one thread, in float32 where it is no integer."""
    core = _openvino()
    return _compiled_by(core, core.read_model(model))


def nncf_model(case: Case) -> Any:
    """NNCF's post-training quantization of the float file for OpenVINO, calibrated on the batch."""
    nncf: Any = importlib.import_module("nncf")
    core = _openvino()
    return _compiled_by(core, nncf.quantize(core.read_model(_float_file(case)), nncf.Dataset([case.x.numpy()])))


def _openvino() -> Any:
    return importlib.import_module("openvino").Core()


def _compiled_by(core: Any, model: Any) -> Any:
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    return core.compile_model(model, "CPU", options)


def _openvino_run(model: Any, x: Tensor) -> Run:
    request, given = model.create_infer_request(), [x.numpy()]
    return lambda: request.infer(given)


def torchao_model(case: Case) -> Any:
    """Return what the x86 flow of torchao makes, not compiled: exported, calibrated on the batch, converted."""
    flow: Any = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
    x86: Any = importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    # Only a strict export tells the calls of ResNet's shared ReLUs apart, which the quantizer asks. Only one that is
    # not takes PyTorch's transformer layers apart, whose linear layers would stay float.
    strict = not any(isinstance(module, nn.MultiheadAttention) for module in case.model.modules())
    exported = torch.export.export(copy.deepcopy(case.model), (case.last,), strict=strict).module()
    prepared = flow.prepare_pt2e(exported, quantizer)
    prepared(case.last)
    return flow.convert_pt2e(prepared)


def _float_in(case: Case, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    own: Any = copy.deepcopy(case.model)
    x = case.last.to(dtype) if case.x.is_floating_point() else case.x
    return own.to(dtype).to(memory_format=torch.channels_last), x


def _eager(dtype: torch.dtype) -> Make:
    return lambda case: _warm(*_float_in(case, dtype))


def _compiled(dtype: torch.dtype) -> Make:
    return lambda case: _frozen(*_float_in(case, dtype))


def _frozen(model: Any, x: Tensor) -> Run:
    # Freezing: weights are constants, and laid out beforehand.
    with torch._inductor.config.patch(freezing=True):
        return _warm(torch.compile(model), x)


def _warm(function: Callable[[Tensor], Any], x: Tensor) -> Run:
    function(x)
    return lambda: function(x)


def _our_torch(config: Config, *, is_compiled: bool) -> Make:
    def make(case: Case) -> Run:
        converted = case.once(f"converted {config!r}", lambda: octav_fx.convert(_ours(case, config)))
        return _warm(torch.compile(converted, backend="octav") if is_compiled else converted, case.last)

    return make


def _bits(weight_bits: int, activation_bits: int, residual_bits: int | None = 8) -> Config:
    return Config(weight_bits, activation_bits, residual_bits=residual_bits)


# Variant -> how it is made, and what it is compared with.
VARIANTS: Final[dict[str, tuple[Make, str]]] = {
    FLOAT: (_float_onnx, FLOAT),
    STATIC: (_static, FLOAT),
    "octav_fx W8A8 onnxruntime": (_our_onnx(_bits(8, 8)), FLOAT),
    "octav_fx W4A8 onnxruntime": (_our_onnx(_bits(4, 8)), FLOAT),
    "octav_fx W4A4 onnxruntime": (_our_onnx(_bits(4, 4)), FLOAT),
    "octav_fx W8A8 onnxruntime, residual_bits=None": (_our_onnx(_bits(8, 8, None)), FLOAT),
    OPENVINO: (lambda case: _in_openvino(_float_file(case), case.x), OPENVINO),
    NNCF: (lambda case: _openvino_run(nncf_model(case), case.x), OPENVINO),
    "octav_fx W8A8 OpenVINO": (_our_openvino(_bits(8, 8)), OPENVINO),
    "octav_fx W4A4 OpenVINO": (_our_openvino(_bits(4, 4)), OPENVINO),
    EAGER: (_eager(torch.float32), EAGER),
    "bfloat16 PyTorch eager": (_eager(torch.bfloat16), EAGER),
    "octav_fx W8A8 eager": (_our_torch(_bits(8, 8), is_compiled=False), EAGER),
    "octav_fx W4A4 eager": (_our_torch(_bits(4, 4), is_compiled=False), EAGER),
    # First: graphs that are there before it are compiled anew after it, and not for frozen weights.
    TORCHAO: (lambda case: _frozen(torchao_model(case), case.last), COMPILED),
    COMPILED: (_compiled(torch.float32), COMPILED),
    "bfloat16 PyTorch Inductor": (_compiled(torch.bfloat16), COMPILED),
    "octav_fx W8A8 compiled": (_our_torch(_bits(8, 8), is_compiled=True), COMPILED),
    "octav_fx W4A4 compiled": (_our_torch(_bits(4, 4), is_compiled=True), COMPILED),
    "octav_fx W8A8 compiled, residual_bits=None": (_our_torch(_bits(8, 8, None), is_compiled=True), COMPILED),
}

# What a variant needs that may not be there.
_NEEDS: Final = {
    OPENVINO: ("openvino",),
    NNCF: ("nncf", "openvino"),
    **{f"octav_fx {bits} OpenVINO": ("openvino",) for bits in ("W8A8", "W4A4")},
    TORCHAO: ("torchao",),
}


def absent_of(variant: str) -> str:
    """Return what a variant needs that is not installed, as a note; empty where all is there."""
    absent = [part for part in _NEEDS.get(variant, ()) if importlib.util.find_spec(part) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def main(rounds: int, nets: str = "*", batches: Sequence[int] = BATCHES) -> None:
    """Measure the cases that a glob of models and some batches name, and keep each when it is done."""
    torch.set_num_threads(1)
    rows = result.kept(result.of_cpu("inference"))
    for name, batch in ((name, batch) for name in MODELS if fnmatch.fnmatch(name, nets) for batch in batches):
        if not any(row["model"] == name and row["batch"] == batch for row in rows):
            rows += measured(name, batch, rounds)
            _keep(rows, rounds)
    print(tabulate(rows, headers="keys"))


def _keep(rows: list[dict[str, Any]], rounds: int) -> None:
    places = {(name, batch): (i, j) for i, name in enumerate(MODELS) for j, batch in enumerate(BATCHES)}
    rows.sort(key=lambda row: places.get((row["model"], row["batch"]), (len(MODELS), row["batch"])))
    ratio = "the float variant it is compared with over the variant"
    setting = {"threads": 1, "rounds": rounds, "runs": _RUNS, "ratio": ratio, "sources": result.sources()}
    result.write(result.of_cpu("inference"), {"setting": setting, "versions": _versions(), "rows": rows})


def measured(name: str, batch: int, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each variant of a model at a batch."""
    runs: dict[str, Run] = {}
    notes: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        case = Case(*load(name, batch), Path(folder))
        for variant, (make, _) in VARIANTS.items():
            if absent := absent_of(variant):
                notes[variant] = absent
                continue
            try:
                runs[variant] = make(case)
                runs[variant]()
            except Exception as error:
                notes[variant] = (str(error).strip() or type(error).__name__).splitlines()[-1][:200]
                runs.pop(variant, None)
        # Another variant's flow may have broken what a graph was compiled under, and its next one would be another.
        with torch.compiler.set_stance("fail_on_recompile"):
            least = _least(runs, rounds)
    rows: list[dict[str, Any]] = []
    for variant, (_, base) in VARIANTS.items():
        t, known = least.get(variant), least.get(base)
        ms = None if t is None else round(1000 * t, 2)
        ratio = None if t is None or known is None else round(known / t, 2)
        row = {"model": name, "batch": batch, "variant": variant, "ms": ms, "compared with": base, "ratio": ratio}
        rows.append({**row, "note": notes.get(variant, "")})
    torch._dynamo.reset()
    return rows


def _least(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Return the least seconds of a run of each; all take turns."""
    least = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for variant, run in runs.items():
            for _ in range(_RUNS):
                start = time.thread_time()
                run()
                least[variant] = min(least[variant], time.thread_time() - start)
    return least


def _versions() -> dict[str, str]:
    names = ("onnxruntime", "openvino", "nncf", "torchao")
    return {name: importlib.metadata.version(name) for name in names if importlib.util.find_spec(name) is not None}
