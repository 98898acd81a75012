"""pact_penalty(): what PACT adds to the loss, so that its clips come in from where they begin."""

import torch
from torch import Tensor, nn

from octav_fx.errors import OctavError
from octav_fx.nn import FakeQuantizer


def pact_penalty(q: nn.Module) -> Tensor:
    """The sum of the squared clips that q learns with clip="pact" (arXiv 1805.06085, section 3.1), [], float32.

    loss + factor * pact_penalty(q) regularizes them by themselves. weight_decay=2 * factor of SGD or Adam over
    q.parameters() does the same: use one or the other. (AdamW's does not pass through its gradients, and is not the
    same.) Raises OctavError for a model without such a clip.
    """
    learned = [m.learned for m in q.modules() if isinstance(m, FakeQuantizer) and m.spec.method == "pact"]
    clips = [clip for clip in learned if clip is not None]
    if not clips:
        raise OctavError(f"{type(q).__name__} learns no clip: quantize it with octav_fx.Config(clip='pact')")
    return torch.stack([clip.square().sum() for clip in clips]).sum()
