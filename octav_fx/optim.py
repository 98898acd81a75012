"""What a loop needs of a quantized model: groups for its optimizer, PACT's penalty, the rest of its checkpoint."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from octav_fx.errors import OctavError
from octav_fx.nn import FakeQuantizer

# Norms whose parameters may have several axes; those of all others have one.
_NORMS = (nn.LayerNorm, nn.RMSNorm)


def param_groups(q: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups for any torch optimizer: with this weight decay, and without.

    Without decay are the learned clips ("lsq", "pact"), the parameters of norms, and biases: everything of one axis
    or none, LayerNorm and RMSNorm of any shape, and what has "bias" in its name. All else decays. Each trainable
    parameter is there once, tied ones too, in the order of q.parameters(); a group that would be empty is left out.

    q: a float model, or one that quantize() returned, whole or in parts, compiled or wrapped in
    DistributedDataParallel. The groups of a float model and of its quantized one are the same, but for learned clips.

    PACT's clips want an L2 penalty (arXiv 1805.06085), which decay is in SGD and is not in AdamW. Add pact_penalty(q)
    to the loss: that is right with every optimizer.

    Raises OctavError for a module without trainable parameters or with lazy ones, and for a decay that is negative or
    not finite.
    """
    if not 0 <= weight_decay < math.inf:
        raise OctavError(f"weight_decay={weight_decay}: a finite number from 0 on")
    decayed: dict[nn.Parameter, None] = {}
    plain: dict[nn.Parameter, None] = {}
    for module in q.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in decayed or parameter in plain:
                continue
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise OctavError(f"{type(module).__name__}.{name} has no shape yet: run the model on a batch first")
            is_plain = parameter.ndim < 2 or isinstance(module, _NORMS) or "bias" in name
            (plain if is_plain else decayed)[parameter] = None
    if not decayed and not plain:
        raise OctavError(f"{type(q).__name__} has no trainable parameter")
    groups = [
        {"params": list(decayed), "weight_decay": float(weight_decay)},
        {"params": list(plain), "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def pact_penalty(q: nn.Module) -> Tensor:
    """Return the sum of the squared clips that q learns with clip="pact" (arXiv 1805.06085, section 3.1), [], float32.

    loss + factor * pact_penalty(q) draws them in from where they begin. Weight decay of 2 * factor on the clips does
    the same in SGD and in Adam, and does not in AdamW, whose decay leaves out the gradient. param_groups() gives them
    no decay. Raises OctavError for a model without such a clip.
    """
    learned = [m.learned for m in q.modules() if isinstance(m, FakeQuantizer) and m.settings.method == "pact"]
    clips = [clip for clip in learned if clip is not None]
    if not clips:
        raise OctavError(f"{type(q).__name__} learns no clip: quantize it with octav_fx.Config(clip='pact')")
    return torch.stack([clip.square().sum() for clip in clips]).sum()


def extra_state(q: nn.Module) -> dict[str, dict[str, Any]]:
    """Return what the state_dict does not hold, because its keys are those of the float model.

    That is, for each quantizer, by its name in q: the clip of the last call, where Newton starts ("hint"), the running
    mean of an activation's clips, which freeze() reads, and whether a learned clip has seen data ("initialized").
    Without it a run that is resumed differs in the last digits, and has to be calibrated again before it is frozen.

    The tensors are copies on the CPU; torch.load(weights_only=True) reads them back. Each rank of a distributed run has
    its own. Empty for a float model.
    """
    return {name: _extra(quantizer) for name, quantizer in _named_quantizers(q).items()}


def load_extra_state(q: nn.Module, state: Mapping[str, Mapping[str, Any]]) -> None:
    """Bring the quantizers of q to where extra_state() found them. Call q.load_state_dict() first.

    Raises OctavError for the state of another model, and then changes nothing.
    """
    quantizers = _named_quantizers(q)
    for name in sorted(quantizers.keys() | state.keys()):
        own = _shapes(_extra(quantizers[name])) if name in quantizers else None
        saved = _shapes(state[name]) if name in state else None
        if own != saved:
            raise OctavError(
                f"the state is of another model: {name} is {saved or 'not in it'}, here {own or 'not there'}; quantize "
                "the same model with the same octav_fx.Config"
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
