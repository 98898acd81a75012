"""torch.ops.octav.max_pool."""
