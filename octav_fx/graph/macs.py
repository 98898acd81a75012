"""Multiply-accumulates, counted by torch's own FlopCounterMode while a node runs on fake tensors."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def _attention_on_cpu(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


class MacCounter(FlopCounterMode):
    """With MacCounter() as counter: ...; counter.macs is what matmuls and convolutions inside took."""

    def __init__(self) -> None:
        # Missing from torch's table: the fused attention that a CPU runs.
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        super().__init__(display=False, custom_mapping={fused: _attention_on_cpu})

    @property
    def macs(self) -> int:
        """One multiply-accumulate is two operations."""
        return int(self.get_total_flops()) // 2
