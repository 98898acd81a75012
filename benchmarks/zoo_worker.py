"""What there is to know about one model of the zoo, column by column, the quickest first."""

import logging
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import octav_fx
from benchmarks.counted import graphs_made
from benchmarks.forked import Column
from benchmarks.zoo_models import Entry
from octav_fx.capture.inputs import as_inputs, tensors_of
from octav_fx.capture.partial import partial_lines
from tests.support.on_grid import OnGrid

# The edges at 4 bits too: one grid for every operand, so that the dispatcher can tell it from a finer one.
_CONFIG = octav_fx.Config(edge_bits=None)
_PACKAGES = str(Path(torch.__file__).parent.parent) + "/"
# They multiply and add as well, and neither the rules nor the count of MACs speak of them: a share of 1 says nothing.
_UNCOUNTED = (
    *("mkldnn_rnn_layer", "_grouped_mm", "_cdist_forward", "deform_conv2d"),
    *("mv", "addmv", "dot", "vdot", "addbmm"),
)


class _Contractions(OnGrid):
    """Operands as tests see them, and the contractions that octav_fx does not know."""

    def __init__(self) -> None:
        assert _CONFIG.weight_bits is not None
        super().__init__(_CONFIG.weight_bits)
        self.uncounted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name in _UNCOUNTED:
            self.uncounted[name] += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


def measure(entry: Entry) -> Iterator[Column]:
    """Yield the columns of one model."""
    torch.set_num_threads(1)
    # What the models' authors warn of, and what stays float under the backend, is no finding here.
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    try:
        model, inputs = _make(entry)
    except Exception as error:
        yield "captured", f"not made: {_reason(error)}"
        return
    start = time.process_time()
    try:
        quantized = octav_fx.quantize(model, inputs, _CONFIG, blocks=())
    except Exception as error:
        yield "captured", _reason(error)
        # The backend quantizes what Dynamo captures of it.
        yield "graphs", _tried(_graphs, model, inputs, entry.trains)
        return
    yield "captured", "yes"
    yield "seconds", round(time.process_time() - start, 1)
    yield "parts", len(partial_lines(quantized))
    yield from _coverage(quantized)
    yield "float_mode equal", _tried(_equal, quantized, model, inputs)
    yield "forward seconds", _tried(_forward_seconds, model, inputs)
    del model
    yield from _operands(quantized, inputs)
    yield "step", _tried(_step, quantized, inputs, entry.trains)
    yield "graphs", _tried(_graphs, quantized, inputs, entry.trains)


def _make(entry: Entry) -> tuple[nn.Module, Any]:
    """In eval mode, with weights that are quick to draw: truncated normal ones take longer than all else."""
    torch.manual_seed(0)

    def normal(t: Tensor, mean: float = 0.0, std: float = 1.0, *rest: Any, **named: Any) -> Tensor:
        return t.data.normal_(mean, std)

    with patch.object(nn.init, "trunc_normal_", normal):
        model, inputs = entry.make(entry.name)
    return model.eval(), inputs


def _forward_seconds(model: nn.Module, inputs: Any) -> float:
    """Of this process, as those of quantize: other processes on the machine are no part of it."""
    with torch.no_grad():
        _call(model, inputs)
        start = time.process_time()
        _call(model, inputs)
    return round(time.process_time() - start, 3)


def _coverage(quantized: nn.Module) -> Iterator[Column]:
    covered = octav_fx.coverage(quantized)
    yield "share", covered.quantized_macs / covered.total_macs if covered.total_macs else None
    yield "float nodes", [[site, reason, macs] for site, reason, macs in covered.skipped]


def _equal(quantized: nn.Module, model: nn.Module, inputs: Any) -> bool:
    """Bit for bit; tensors of the outputs, in their order."""
    with torch.no_grad():
        torch.manual_seed(1)
        expected = tensors_of(_call(model, inputs))
        torch.manual_seed(1)
        with octav_fx.float_mode(quantized):
            found = tensors_of(_call(quantized, inputs))
    return len(expected) == len(found) and all(map(torch.equal, expected, found))


def _operands(quantized: nn.Module, inputs: Any) -> Iterator[Column]:
    """What the dispatcher is given, fused attention's q, k and v among it."""
    seen = _Contractions()
    try:
        with torch.no_grad():
            # Caches that forward fills may ask for a new graph, which is compared with the float model.
            _call(quantized, inputs)
            with seen:
                _call(quantized, inputs)
    except Exception as error:
        yield "off grid", _reason(error)
        return
    yield "contractions", seen.checked
    yield "uncounted", dict(seen.uncounted)
    yield "off grid", [[op, list(shape), count] for (op, shape), count in Counter(seen.off_grid).items()]


def _step(quantized: nn.Module, inputs: Any, trains: bool) -> str:
    """Forward and backward: gradients where the float model has them, and finite."""
    quantized.train(trains)
    with octav_fx.float_mode(quantized):
        expected = set(_gradients(quantized, inputs))
    found = _gradients(quantized, inputs)
    if missing := sorted(expected - set(found)):
        return f"no gradient: {', '.join(missing[:3])} ({len(missing)} of {len(expected)})"
    infinite = [name for name, gradient in found.items() if not gradient.isfinite().all()]
    return f"not finite: {', '.join(infinite[:3])} ({len(infinite)} of {len(found)})" if infinite else "finite"


def _gradients(module: nn.Module, inputs: Any) -> dict[str, Tensor]:
    module.zero_grad()
    _backward(module, inputs)
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def _backward(module: Any, inputs: Any) -> None:
    torch.manual_seed(1)
    outputs = [t for t in tensors_of(_call(module, inputs)) if t.requires_grad]
    torch.stack([t.square().mean() for t in outputs]).sum().backward()


def _graphs(module: nn.Module, inputs: Any, trains: bool) -> int | str:
    """How many graphs two training steps took through the backend; run as they are instead of through Inductor."""
    torch.compiler.reset()
    module.zero_grad()
    module.train(trains)
    compiled = torch.compile(module, backend="octav")
    with graphs_made() as made:
        _backward(compiled, inputs)
        first = len(made)
        _backward(compiled, inputs)
    return first if len(made) == first else f"{first}, then {len(made) - first} more"


def _call(module: Any, inputs: Any) -> Any:
    args, kwargs = as_inputs(inputs)
    return module(*args, **kwargs)


def _tried(function: Any, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception as error:
        return _reason(error)


def _reason(error: Exception) -> str:
    """Kind and first line, without the folder that packages are in."""
    line = next(iter(str(error).splitlines()), "").replace(_PACKAGES, "")
    return f"{type(error).__name__}: {line[:300]}"
