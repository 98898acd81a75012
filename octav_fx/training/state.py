"""What a checkpoint of a quantized model needs besides its state_dict."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from octav_fx.errors import OctavError
from octav_fx.nn import FakeQuantizer


def state(q: nn.Module) -> dict[str, dict[str, Any]]:
    """Return what the state_dict does not hold, because its keys are those of the float model.

    That is, for each quantizer, by its name in q: the clip of the last call, where Newton starts ("hint"), the running
    mean of an activation's clips, which freeze() reads, and whether a learned clip has seen data ("initialized").
    Without it a run that is resumed differs in the last digits, and has to be calibrated again before it is frozen.

    The tensors are copies on the CPU; torch.load(weights_only=True) reads them back. Each rank of a distributed run has
    its own. Empty for a float model.

    Graphs are not in it: a call of another kind than the examples of quantize() is captured anew after a restart.
    """
    return {name: _extra(quantizer) for name, quantizer in _named_quantizers(q).items()}


def load_state(q: nn.Module, state: Mapping[str, Mapping[str, Any]]) -> None:
    """Bring the quantizers of q to where state() found them. Call q.load_state_dict() first.

    Raises OctavError for the state of another model, or of one with graphs for further kinds of calls, and then changes
    nothing.
    """
    quantizers = _named_quantizers(q)
    for name in sorted(quantizers.keys() | state.keys()):
        own = _shapes(_extra(quantizers[name])) if name in quantizers else None
        saved = _shapes(state[name]) if name in state else None
        if own != saved:
            raise OctavError(
                f"the state is of another model: {name} is {saved or 'not in it'}, here {own or 'not there'}; quantize "
                "the same model, in the same mode, with the same octav_fx.Config, and examples=[...] of all kinds of "
                "calls that it got"
            )
    for name, quantizer in quantizers.items():
        quantizer.initialized = bool(state[name]["initialized"])
        with torch.no_grad():
            for buffer, value in _unsaved_buffers(quantizer).items():
                value.copy_(state[name][buffer])


def _extra(quantizer: FakeQuantizer) -> dict[str, Any]:
    copies = {name: value.detach().cpu().clone() for name, value in _unsaved_buffers(quantizer).items()}
    return {"initialized": quantizer.initialized, **copies}


def _unsaved_buffers(quantizer: FakeQuantizer) -> dict[str, Tensor]:
    saved = quantizer.state_dict()
    return {name: value for name, value in quantizer.named_buffers() if name not in saved}


def _shapes(values: Mapping[str, Any]) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in values.items() if isinstance(value, Tensor)}


def _named_quantizers(q: nn.Module) -> dict[str, FakeQuantizer]:
    """Return the quantizers by their names in what quantize() returned, whatever that is wrapped in."""
    while True:
        if isinstance(q, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            q = q.module
        elif isinstance(compiled := getattr(q, "_orig_mod", None), nn.Module):
            q = compiled
        else:
            return {name: module for name, module in q.named_modules() if isinstance(module, FakeQuantizer)}
