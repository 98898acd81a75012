"""grouped_mm and its gradient for the weights, by torch's own function: the definition."""

from torch import Tensor
from torch.nn import functional as F


def grouped_mm(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Map rows [N, I] sorted by group, weights [G, I, O] and where each group ends [G] -> rows times theirs [N, O]."""
    return F.grouped_mm(rows, weights, offs=ends)


def grouped_mm_weights(rows: Tensor, gradient: Tensor, ends: Tensor) -> Tensor:
    """Map rows [N, I], the gradient of their products [N, O], ends of groups [G] -> that of weights [G, I, O]."""
    return F.grouped_mm(rows.t(), gradient, offs=ends)
