"""Whether a runtime computes of an ONNX file what the frozen program does: from equal codes, and of the whole file."""

import copy
from collections import Counter
from pathlib import Path
from typing import Final

import onnx
import torch
from torch import Tensor, nn

import octav_fx
from octav_fx.capture.integer_module import IntegerModule
from octav_fx.errors import OctavError
from octav_fx.ir.dataflow import holds_tensor
from octav_fx.ir.ops import in_place
from tests.support.alike import tensors
from tests.support.deployable_models import Seen, check_codes, levels_of, observed
from tests.support.given_levels import Run, calls_of, with_given_activations

# Ops of onnxruntime whose results do not depend on who computes them: integers, moves, one rounding for each element.
EXACT: Final = frozenset(
    [
        *("QLinearConv", "QGemm", "QLinearAdd", "QLinearGlobalAveragePool", "QuantizeLinear", "DequantizeLinear"),
        *("MaxPool", "Clip", "Relu", "Abs", "Max", "Neg", "Add", "Sub", "Mul", "Div", "Round", "Cast"),
        *("Concat", "Split", "Slice", "Reshape", "Transpose", "Pad", "Gather", "Unsqueeze", "Squeeze", "Flatten"),
        *("Shape", "Expand", "Identity", "Range", "ScatterND", "ReduceMax", "Where", "Equal", "ConstantOfShape"),
    ]
)
# Of the largest result, where sums of floats are in another order: the sums here are of a hundred terms or so.
ROUNDING: Final = 1e-5


def write(q: nn.Module, args: tuple[Tensor, ...], path: Path, target: str, axes: dict[str, list[int]]) -> bool:
    """Write a file for all sizes, or for that of the arguments where the program has no other; tell which."""
    try:
        octav_fx.export_onnx(q, tuple(map(torch.clone, args)), path, target=target, dynamic_axes=axes)
        return True
    except OctavError:
        octav_fx.export_onnx(q, tuple(map(torch.clone, args)), path, target=target, dynamic_batch=False)
        return False


def check_file(path: Path, defined: nn.Module, args: tuple[Tensor, ...], compute: Run, is_exact: bool) -> list[float]:
    """Check a file on inputs of a size, and return how far each image or text is off at the end.

    defined: what it is to compute, convert(q, integers=False).
    """
    results, activations = _expected(defined, args)
    named = dict(zip((value.name for value in onnx.load(path).graph.input), args, strict=True))
    counts = Counter(call.partition("/")[0] for call in calls_of(onnx.load(path).graph))
    activations = {name: calls for name, calls in activations.items() if name in counts}
    # Of a quantizer some of whose calls no result is computed from nobody says here which.
    if counts == {name: len(calls) for name, calls in activations.items()}:
        file, given = with_given_activations(path, levels_of(activations))
        outputs = compute(file, named | {f"{call}.given": levels for call, levels in given.items()})
        levels: dict[str, list[Tensor]] = {}
        for call in given:
            levels.setdefault(call.partition("/")[0], []).append(outputs[f"{call}.levels"])
        check_codes(activations, levels)
        _check_results(list(outputs.values())[: len(results)], results, "from equal codes")
    found = list(compute(path.read_bytes(), named).values())
    assert not is_exact or all(map(torch.equal, found, results)), "not equal bits"
    return _of_images(found, results)


def without_dead(defined: nn.Module) -> nn.Module:
    """Erase from the graphs of a converted model, and return it, what no result is computed from, as exporting does."""
    for part in (p for p in defined.modules() if isinstance(p, IntegerModule)):
        for graph in (part.graph, *(further.graph for further in part.octav_further)):
            for node in reversed(graph.nodes):
                is_ours = str(getattr(node.target, "__module__", "")).startswith("octav_fx.nn")
                computes = node.op == "call_module" or is_ours or holds_tensor(node)
                if node.op not in ("placeholder", "output") and not node.users and computes and not in_place(node):
                    graph.erase_node(node)
    return defined


def _expected(defined: nn.Module, args: tuple[Tensor, ...]) -> tuple[list[Tensor], dict[str, list[Seen]]]:
    results: list[Tensor] = []
    model = copy.deepcopy(defined)
    handle = model.register_forward_hook(lambda m, args, y: results.extend(t.clone() for t in tensors(y)))
    torch.manual_seed(1)
    _, activations, _ = observed(model, tuple(map(torch.clone, args)))
    handle.remove()
    return results, activations


def _check_results(found: list[Tensor], expected: list[Tensor], what: str) -> None:
    assert len(found) == len(expected), what
    for f, e in zip(found, expected, strict=True):
        assert (f.shape, f.dtype) == (e.shape, e.dtype), f"{what}: {f.dtype} {[*f.shape]} for {e.dtype} {[*e.shape]}"
        difference = (f - e).abs().max() / e.abs().max().clamp_min(1e-30)
        assert difference < ROUNDING, f"{what}: a result is {difference:.1e} off"


def _of_images(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """How far each image or text is off, of the largest result."""
    assert len(found) == len(expected), "another number of results"
    assert all(f.shape == e.shape for f, e in zip(found, expected, strict=True)), "a result of another shape"
    far = [
        (f - e).abs().flatten(1).amax(1) / e.abs().max().clamp_min(1e-30) for f, e in zip(found, expected, strict=True)
    ]
    return torch.stack(far).amax(0).tolist()
