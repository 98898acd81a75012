"""torch.ops.octav.max_pool_gradient."""
