"""torch.ops.octav.integer_sum."""
