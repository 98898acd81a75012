"""Multiply-accumulates, counted by torch's own FlopCounterMode while a node runs on fake tensors."""

import math
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def _attention_on_cpu(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _trilinear(first: Any, weight: Any, second: Any, *args: Any, **kwargs: Any) -> int:
    """Bilinear layers: first [..., 1, I], weight [O, I, J], second [..., 1, J] after torch's expansions."""
    return 2 * math.prod(first[:-1]) * math.prod(weight)


class MacCounter(FlopCounterMode):
    """With MacCounter() as counter: ...; counter.macs is what matmuls and convolutions inside took."""

    def __init__(self) -> None:
        # Missing from torch's table: the fused attention that a CPU runs, and the product in bilinear layers.
        aten = torch.ops.aten
        missing = {aten._scaled_dot_product_flash_attention_for_cpu: _attention_on_cpu, aten._trilinear: _trilinear}
        super().__init__(display=False, custom_mapping=missing)

    @property
    def macs(self) -> int:
        """One multiply-accumulate is two operations."""
        return int(self.get_total_flops()) // 2
