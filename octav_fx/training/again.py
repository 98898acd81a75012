"""A call that no graph of a quantized module holds for: one graph more, or the module's own Python."""

import warnings
from typing import Final

import torch

from octav_fx.capture.inputs import Inputs, tensors_of
from octav_fx.capture.modules import QuantizedModule
from octav_fx.capture.rerun import has_data, run_once
from octav_fx.clips.distributed import no_sync
from octav_fx.compat.tensors import is_functorch_wrapped
from octav_fx.errors import NotCaptured, OctavError
from octav_fx.nn import FakeQuantizer
from octav_fx.training.one_graph import Recipe, add_records
from octav_fx.training.own_python import own_python

# So many graphs a module may have for each mode.
MOST_GRAPHS: Final = 8


def capture_again(quantized: QuantizedModule, call: Inputs) -> None:
    """Capture a graph for a call, with the quantizers and parameters that are there; else prepare its own Python.

    An error of the model's own on these inputs is raised as it is. Raises OctavError where no graph holds the call and
    nothing below the module can be quantized by itself.
    """
    if any(map(is_functorch_wrapped, tensors_of((call, list(quantized.owner.parameters()))))):
        raise OctavError(
            f"{quantized.user_class.__name__}: no graph holds for this call ({quantized.why_not(*call)}), and none can "
            "be captured inside of a transform of torch.func: call the model once outside with such inputs, or give "
            "octav_fx.quantize an example of them (examples=[...])"
        )
    recipe: Recipe = quantized.recipe
    mode, name = quantized.training, recipe.position.path or quantized.user_class.__name__
    graphs = quantized.graphs_of(mode)
    before = {m for m in quantized.modules() if isinstance(m, FakeQuantizer)}
    # Forward may ask for the gradient mode, and leaving inference mode would turn gradients on.
    gradients = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(gradients), no_sync():
        try:
            if len(graphs) >= MOST_GRAPHS:
                raise NotCaptured(_too_many(quantized, call, name))
            recipe.add_graph(quantized, call)
        except OctavError as error:
            if has_data(quantized.owner, call):
                run_once(quantized.owner, *call, quantized.float_forward)
            reason = str(error)
            own = own_python(quantized, call, recipe, reason)
            for part in own.parts:
                part.capture_again = capture_again
            quantized.run_own_python(own)
            note = f"{name}: calls unlike the example run its own Python, over quantized children: {reason}"
            add_records(quantized, mode, own.rows, [note])
            warnings.warn(note, stacklevel=2)
    _tell_new(quantized, before, name)


def _too_many(quantized: QuantizedModule, call: Inputs, name: str) -> str:
    fault = quantized.why_not(*call)
    return (
        f"{len(quantized.graphs_of(quantized.training))} graphs were captured, and none holds for this call ({fault})"
    )


def _tell_new(quantized: QuantizedModule, before: set[FakeQuantizer], name: str) -> None:
    """Warn of quantizers that freezing or an optimizer could not know of."""
    new = {path: m for path, m in quantized.named_modules() if isinstance(m, FakeQuantizer) and m not in before}
    frozen = any(m.clip is not None for m in before)
    learned = [path for path, m in new.items() if m.learned is not None]
    if new and (frozen or learned):
        what = "finds its clip anew in each call: calibrate and freeze again" if frozen else "is in no optimizer yet"
        warnings.warn(f"{name}: a new graph was captured, and its quantizer {next(iter(new))} {what}", stacklevel=2)
