"""torch.ops.octav.code_sum."""
