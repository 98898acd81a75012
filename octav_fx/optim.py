"""What a loop needs of a quantized model: groups for its optimizer, and PACT's penalty."""

import math
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
