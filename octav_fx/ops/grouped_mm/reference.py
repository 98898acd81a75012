"""grouped_mm and its gradient for the weights, by torch's own function: the definition."""

import torch
from torch import Tensor
from torch.nn import functional as F


def grouped_mm(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Map rows [N, I] sorted by group, weights [G, I, O] and where each group ends [G] -> rows times theirs [N, O].

    Rows beyond the last end are zeros.
    """
    products = F.grouped_mm(rows, weights, offs=ends)
    return products.masked_fill_(beyond_groups(rows.shape[0], ends).unsqueeze(-1), 0)


def grouped_mm_weights(rows: Tensor, gradient: Tensor, ends: Tensor) -> Tensor:
    """Map rows [N, I], the gradient of their products [N, O], ends of groups [G] -> that of weights [G, I, O]."""
    return F.grouped_mm(rows.t(), gradient, offs=ends)


def beyond_groups(count: int, ends: Tensor) -> Tensor:
    """Tell which of so many rows are of no group, [count]."""
    return torch.arange(count, device=ends.device) >= ends[-1]
