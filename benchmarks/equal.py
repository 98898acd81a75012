"""What a deployed model computes beside the frozen one, on 256 inputs: bits, codes, classes, accuracy.

A net is trained briefly in float, quantized and trained a little more, and frozen. Each runtime then gives its results
of inputs it has not seen, and its codes twice: end to end, and of layers that all read the frozen model's codes. A code
that moved there is the runtime's own doing; one that moved end to end may follow another.

A net and its bits are written to results/equal.json when they are done, and are not done again for the same sources: so
it can run in pieces, by --nets, and be broken off.
"""

import copy
import fnmatch
import functools
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from tabulate import tabulate
from torch import Tensor, nn

import octav_fx
from benchmarks import inference, result, trained
from benchmarks.inference import Case
from benchmarks.trained import Task
from octav_fx import Config
from octav_fx.capture.integer_module import IntegerModule
from octav_fx.capture.modules import quantized_modules
from octav_fx.deploy.codes import Codes, codes_of_quantizers
from octav_fx.deploy.rule import rule_of
from octav_fx.deploy.runtimes import onnx_session
from octav_fx.formats.granularity import along
from octav_fx.formats.grid import Grid
from octav_fx.nn import StaticQuantizer
from tests.support.given_levels import Levels, Run, computed, with_levels

FLOAT: Final = "float"
CONFIGS: Final = {
    "W8A8": Config(8, 8, residual_bits=8),
    "W4A8": Config(4, 8, residual_bits=8),
    "W4A4": Config(4, 4, residual_bits=8),
    "W8A8, residual_bits=None": Config(8, 8),
    "W4A4, residual_bits=None": Config(4, 4),
}
# Inputs at a time: the levels of all activations are held at once.
_BATCH: Final = 32
# Nets with nothing but integers between the first quantizer and the result, when residuals are quantized.
INTEGER_NETS: Final = ("resnet18", "resnet50", "mobilenet_v2")

# Inputs, and what every layer reads or None -> results, and the codes that quantizers returned; None: not known.
Runtime = Callable[[Tensor, Codes | None], tuple[Tensor, Codes | None]]


@dataclass(frozen=True)
class Bound:
    """What must hold of a runtime: equal results, or the shares of codes that may move and of classes that stay."""

    moved: float
    same_class: float | None = 0.995
    is_equal: bool = False

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Tell whether a row is within it."""
        is_near = row["moved"] <= self.moved * row["codes"]
        is_same = self.same_class is None or row["same class"] >= self.same_class
        return is_near and is_same and (not self.is_equal or row["equal"] == row["inputs"])


_EQUAL: Final = Bound(0, 1, is_equal=True)
# Float between layers (SiLU, GELU, layer norm, softmax, sums that are not quantized) no two runtimes round alike.
_FLOAT_BETWEEN: Final = Bound(1e-4)
# A code at a tie falls to its other side where scales are multiplied in another order. One of a million in each layer
# moves many behind it, and now and then the class.
_PYTORCH: Final = Bound(1e-5, None)
_OPENVINO: Final = Bound(1e-3, None)


def bound(net: str, runtime: str, residual_bits: int | None) -> Bound:
    """Return what must hold of a net in a runtime, whose sums are integers, or float where residual_bits is None."""
    is_integer = net in INTEGER_NETS and residual_bits is not None
    if runtime == "definition" or (runtime.startswith("onnxruntime") and is_integer):
        return _EQUAL
    return {"PyTorch": _PYTORCH, "OpenVINO": _OPENVINO}.get(runtime, _FLOAT_BETWEEN)


def main(nets: str = "*") -> None:
    """Compare the nets that a glob names, and write results/equal.json."""
    torch.set_num_threads(1)
    rows = result.kept("equal")
    for net in fnmatch.filter(trained.NETS, nets):
        done = {row["bits"] for row in rows if row["net"] == net}
        left = [bits for bits in (FLOAT, *CONFIGS) if bits not in done]
        if not left:
            continue
        given = trained.task(net)
        trained.train(given.model, given)
        for bits in left:
            rows += of_float(net, given) if bits == FLOAT else compared(net, given, bits)
            rows.sort(key=lambda row: trained.NETS.index(row["net"]))
            result.write("equal", {"setting": {"threads": 1, "sources": result.sources()}, "rows": rows})
    print(tabulate(rows, headers="keys"))


def of_float(net: str, given: Task) -> list[dict[str, Any]]:
    """Return how many classes the float model finds, in bfloat16 too, and what other quantizers make of it.

    They are calibrated on as many inputs of the training as there are inputs to classify.
    """
    calibration, _ = zip(*(given.batch() for _ in range(trained.INPUTS // len(given.batch()[0]))), strict=True)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        expected = given.model(given.x)
        case = inference.Case(given.model, torch.cat(calibration), Path(folder))
        rows = [_row(net, FLOAT, "PyTorch", given, expected, expected)]
        for name, run in _OTHERS.items():
            if note := inference.absent_of(name):
                rows.append({"net": net, "bits": FLOAT, "runtime": name, "note": note})
            else:
                rows.append(_row(net, FLOAT, name, given, run(case, given.x), expected))
    return rows


def _bfloat16(case: Case, x: Tensor) -> Tensor:
    model: nn.Module = copy.deepcopy(case.model).to(torch.bfloat16)
    return model(x.to(torch.bfloat16) if x.is_floating_point() else x).float()


def _static(case: Case, x: Tensor) -> Tensor:
    session = onnx_session(inference.static_file(case), 1)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(found)


# What others make of a float model: from a case with inputs to calibrate on, and inputs, to results.
_OTHERS: Final[dict[str, Callable[[Case, Tensor], Tensor]]] = {
    "bfloat16 PyTorch": _bfloat16,
    inference.STATIC: _static,
    inference.NNCF: lambda case, x: torch.from_numpy(inference.nncf_model(case)([x.numpy()])[0]),
    inference.TORCHAO: lambda case, x: inference.torchao_model(case)(x),
}


def compared(net: str, given: Task, bits: str) -> list[dict[str, Any]]:
    """Return a row for each runtime of a trained net, quantized as CONFIGS says."""
    batches = [given.batch()[0] for _ in range(4)]
    q = octav_fx.quantize(given.model, batches[0], CONFIGS[bits])
    octav_fx.freeze(octav_fx.calibrate(trained.retrain(q, given), batches))
    (quantized,) = quantized_modules(q)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        rule, runtimes = rule_of(quantized, 0), dict(_runtimes(q, given.x[:_BATCH], Path(folder)))
        tallies = {name: _Tally() for name in runtimes}
        for x in given.x.split(_BATCH):
            codes = codes_of_quantizers(rule, (x,), {})
            for name, runtime in runtimes.items():
                tallies[name].add(runtime, x, codes)
        expected = torch.cat([q(x) for x in given.x.split(_BATCH)])
    rows = []
    for name, tally in tallies.items():
        row = _row(net, bits, name, given, torch.cat(tally.results), expected)
        row |= {"codes": tally.codes, "moved": tally.moved, "end to end": tally.end_to_end}
        rows.append({**row, "holds": bound(net, name, CONFIGS[bits].residual_bits).holds(row)})
    return rows


class _Tally:
    """What a runtime returned so far, and how many of its codes are others than those of the frozen model."""

    def __init__(self) -> None:
        self.results: list[Tensor] = []
        self.codes = self.moved = 0
        self.end_to_end: int | None = 0

    def add(self, runtime: Runtime, x: Tensor, expected: Codes) -> None:
        """Run a batch and count."""
        found, codes = runtime(x, None)
        self.results.append(found)
        self.codes += sum(codes.numel() for calls in expected.values() for codes in calls)
        differing = None if codes is None else _differing(codes, expected)
        self.end_to_end = None if self.end_to_end is None or differing is None else self.end_to_end + differing
        if differing != 0:
            # Else every layer has read those codes already.
            _, own = runtime(x, expected)
            assert own is not None
            self.moved += _differing(own, expected)


def _differing(found: Codes, expected: Codes) -> int:
    assert found.keys() == expected.keys()
    pairs = [pair for name in expected for pair in zip(found[name], expected[name], strict=True)]
    return sum(int((ours != theirs).sum()) for ours, theirs in pairs)


def _row(net: str, bits: str, runtime: str, given: Task, found: Tensor, expected: Tensor) -> dict[str, Any]:
    differing, classes = (found - expected).abs(), found.argmax(-1)
    return {
        "net": net,
        "bits": bits,
        "runtime": runtime,
        "inputs": len(found),
        "equal": int((differing.flatten(1).amax(1) == 0).sum()),
        "difference": float(differing.max() / expected.abs().max()),
        "same class": float((classes == expected.argmax(-1)).double().mean()),
        "accuracy": float((classes == given.classes).double().mean()),
    }


def _runtimes(q: nn.Module, x: Tensor, folder: Path) -> Iterator[tuple[str, Runtime]]:
    """Yield each runtime by its name."""
    definition = octav_fx.convert(q, integers=False)
    grids = {name: part for name, part in definition.named_modules() if isinstance(part, StaticQuantizer)}
    yield "definition", _in_torch(definition)
    yield "PyTorch", _in_torch(octav_fx.convert(q))
    for name, target, is_free, run in (
        ("onnxruntime", "onnxruntime", True, _in_onnxruntime),
        ("onnxruntime, fixed batch", "onnxruntime", False, _in_onnxruntime),
        ("OpenVINO", "openvino", True, _in_openvino),
    ):
        if name == "OpenVINO" and importlib.util.find_spec("openvino") is None:
            continue
        path = folder / f"{name}.onnx"
        octav_fx.export_onnx(q, x, path, target=target, dynamic_batch=is_free)
        yield name, _of_file(path, run, grids)


def _in_torch(module: nn.Module) -> Runtime:
    assert isinstance(module, IntegerModule)
    return lambda x, given: (module(x), codes_of_quantizers(module, (x,), {}, given))


def _of_file(path: Path, run: Run, grids: Mapping[str, StaticQuantizer]) -> Runtime:
    plain, (with_outputs, names) = path.read_bytes(), with_levels(path)

    def run_file(x: Tensor, given: Codes | None) -> tuple[Tensor, Codes | None]:
        if given is not None:
            levels = {name: [_levels(grids[name], codes) for codes in calls] for name, calls in given.items()}
            found, levels = computed(path, (x,), levels, run)
            return found, _all_codes(grids, levels)
        (found,), seen = run(plain, {"x": x}).values(), run(with_outputs, {"x": x})
        # More outputs may leave less to be computed in one kernel, which rounds otherwise.
        if not torch.equal(found, next(iter(seen.values()))):
            return found, None
        return found, _all_codes(grids, {name: [seen[y] for y in calls] for name, calls in names.items()})

    return run_file


def _levels(quantizer: StaticQuantizer, codes: Tensor) -> Tensor:
    steps = codes.float() + Grid(quantizer.bits, quantizer.signed).low
    return steps * along(quantizer.scale, steps, quantizer.dim)


def _all_codes(grids: Mapping[str, StaticQuantizer], levels: Levels) -> Codes:
    return {name: [_codes(grids[name], y) for y in calls] for name, calls in levels.items()}


def _codes(quantizer: StaticQuantizer, levels: Tensor) -> Tensor:
    steps = (levels / along(quantizer.scale, levels, quantizer.dim)).round()
    return (steps - Grid(quantizer.bits, quantizer.signed).low).to(torch.uint8)


def _in_onnxruntime(model: bytes, feed: dict[str, Tensor]) -> dict[str, Tensor]:
    session = _onnxruntime(model)
    given = {value.name: feed[name].numpy() for value, name in zip(session.get_inputs(), feed, strict=True)}
    names = [value.name for value in session.get_outputs()]
    return {name: torch.from_numpy(y) for name, y in zip(names, session.run(None, given), strict=True)}


def _in_openvino(model: bytes, feed: dict[str, Tensor]) -> dict[str, Tensor]:
    net = _openvino(model)
    found = net([value.numpy() for value in feed.values()])
    return {name: torch.from_numpy(found[value]) for value in net.outputs for name in value.get_names()}


@functools.lru_cache(maxsize=3)
def _onnxruntime(model: bytes) -> Any:
    return onnx_session(model, 1)


@functools.lru_cache(maxsize=3)
def _openvino(model: bytes) -> Any:
    return inference.openvino_model(model)
