"""torch.ops.octav.integer_max_pool."""
