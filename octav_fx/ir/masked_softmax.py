"""What a fused attention does between its two matrix multiplications."""

import torch
from torch import Tensor


def masked_softmax(scores: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Return the softmax of scores [..., L, S] over S, masked as F.scaled_dot_product_attention does.

    mask [..., L, S]: bool, True where a query may look, or added to the scores. A query that may look nowhere gets
    weights of zero.
    """
    if is_causal:
        before = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~before, -torch.inf)
    if mask is None:
        # The first key is there for every query.
        return torch.softmax(scores, -1)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask.to(scores.dtype)
    nowhere = (scores == -torch.inf).all(-1, keepdim=True)
    return torch.softmax(scores, -1).masked_fill(nowhere, 0)
